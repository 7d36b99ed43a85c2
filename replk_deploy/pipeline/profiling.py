"""`replk profile`: what a run or file holds → the time of each layer on one runtime, beside what could be had."""

from pathlib import Path

from replk_deploy import backends as runtimes
from replk_deploy import profile as profiling
from replk_deploy import proof as proving
from replk_deploy import roofline, sites, sources
from replk_deploy.backends.base import Settings
from replk_deploy.errors import ReplkError
from replk_deploy.pipeline import building
from replk_deploy.precision import Precision
from replk_deploy.profile import Profile
from replk_deploy.progress import Progress, silent
from replk_deploy.workspace import ROOT


def profile(
    artefact: Path | None = None,
    *,
    backend: str,
    batch: int = 1,
    repeats: int = profiling.REPEATS,
    settings: Settings | None = None,
    precision: Precision | None = None,
    allow_unverified: bool = False,
    root: Path = ROOT,
    progress: Progress = silent,
) -> Profile:
    """Time each layer of an artefact on one runtime; the roofline is measured in the same run.

    Raises:
        UnavailableError: the runtime cannot run, or does not tell its layers apart.
        IntegrityError: no verdict vouches for the artefact.
        ReplkError: a setting that the backend does not honour, or a wrong source.
    """
    kind, settings = runtimes.find(backend), settings or Settings()
    vain = sorted(settings.made() - kind.honours)
    if vain:
        raise ReplkError(f"--{vain[0].replace('_', '-')} means nothing to {backend}", "leave it out")
    kind.probe()
    run, single = sources.run_or_file(artefact, root)
    if single:
        sources.check_kind(single, kind, sources.opens(kind))
    path = single or building.needed(run, kind, precision, progress, any_verdict=allow_unverified)
    metadata = sources.vouched(path, allow_unverified=allow_unverified)
    oracle = sources.oracle_of(run, single)
    with kind(path, settings) as opened:
        images = proving.probe_for(opened, metadata, count=batch).images
        height, width = images.shape[1:3] if opened.input.dtype == "uint8" else images.shape[2:4]
        if oracle is not None:
            found = sites.of_network(oracle.model, batch=batch, size=(height, width))
        else:
            found = sites.of_file(path, images.shape) if path.suffix == ".onnx" else {}
        progress("roofline", 0, None)
        limits = roofline.measure(opened.precision, device=opened.device)
        return profiling.profile(opened, images, sites=found, roofline=limits, repeats=repeats, progress=progress)
