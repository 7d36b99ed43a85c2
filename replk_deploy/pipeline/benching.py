"""`replk bench`: what a run or file holds → latencies on runtimes, each judged just before."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from replk_deploy import backends as runtimes
from replk_deploy import bench as benching
from replk_deploy import files, records, sources
from replk_deploy import proof as proving
from replk_deploy.backends.base import Backend
from replk_deploy.bench import Bench
from replk_deploy.errors import ContractError, MismatchError, ReplkError
from replk_deploy.pipeline import exporting, fusing
from replk_deploy.precision import Precision
from replk_deploy.progress import Progress, silent
from replk_deploy.sources import FUSED
from replk_deploy.verify import Agreement
from replk_deploy.workspace import ROOT, Workspace

ROTATE = 4  # distinct inputs that take turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Benched:
    """Latencies, and how far each timed backend was from the float64 network just before.

    `unverified` names the backends whose artefact no passing verdict speaks of.
    """

    KIND: ClassVar[str] = "benched"
    FORMAT: ClassVar[int] = 1

    bench: Bench
    agreements: Mapping[str, Agreement]
    artefacts: Mapping[str, str]
    skipped: Mapping[str, str]
    unverified: tuple[str, ...] = ()


def bench(
    artefact: Path | None = None,
    *,
    backends: Sequence[str],
    batches: Sequence[int] = (1,),
    max_seconds: float = 60.0,
    percentiles: tuple[int, ...] = (50, 90),
    allow_unverified: bool = False,
    precision: Precision | None = None,
    root: Path = ROOT,
    progress: Progress = silent,
) -> Benched:
    """Time an artefact on runtimes, judged just before where its weights are at hand.

    What a run lacks for a backend is built and proved first.
    """
    demand_batches(batches)
    kinds = {name: runtimes.find(name) for name in backends}
    for kind in kinds.values():
        kind.probe()
    run, single = sources.run_or_file(artefact, root)
    if single:
        for kind in kinds.values():
            sources.check_kind(single, kind)
    oracle = sources.oracle_of(run, single)
    contestants, agreements, artefacts, unverified = [], {}, {}, []
    with contextlib.ExitStack() as opened:
        for name, kind in kinds.items():
            path = single or _needed(run, kind, precision, progress, any_verdict=allow_unverified)
            metadata = sources.vouched(path, allow_unverified=allow_unverified)
            if allow_unverified and not sources.sound(path):
                unverified.append(name)
            start = time.perf_counter()
            backend = opened.enter_context(kind(path))
            load_s = time.perf_counter() - start
            artefacts[name] = path.name
            if oracle is not None and metadata is not None:
                progress(f"verify {name}", 0, None)
                agreements[name] = proving.judge_backend(name, oracle, backend, metadata)
                if not agreements[name].passed:
                    raise MismatchError(f"{name} answers wrongly: {agreements[name].sentence}", "do not deploy it")
            for count in batches:
                rounds = [proving.probe_for(backend, metadata, count=count, seed=n).images for n in range(ROTATE)]
                entered = benching.enter(backend, rounds, load_s=load_s)
                facts = {
                    **entered.facts,
                    "artefact": path.name,
                    "verdict": "unverified" if name in unverified else "pass",
                }
                if name in agreements:
                    facts["error"] = agreements[name].sentence
                contestants.append(dataclasses.replace(entered, facts=facts))
        result = benching.measure(contestants, max_seconds=max_seconds, percentiles=percentiles, progress=progress)
    benched = Benched(
        bench=result, agreements=agreements, artefacts=artefacts, skipped={}, unverified=tuple(unverified)
    )
    if run:
        files.write_text(run.path("results/bench.json"), records.to_json(benched.bench))
    return benched


def demand_batches(batches: Sequence[int]) -> None:
    """Raise ReplkError unless every batch holds an image."""
    wrong = [count for count in batches if count < 1]
    if wrong:
        raise ReplkError(f"a batch of {wrong[0]} images cannot be timed", "give 1 or more")


def _needed(
    run: Workspace | None, kind: type[Backend], precision: Precision | None, progress: Progress, *, any_verdict: bool
) -> Path:
    """Return the newest sound artefact of a run that a backend can start from, building it when there is none."""
    if run is None:
        raise ContractError("neither a run nor a file")
    suffix = ".onnx" if kind.takes == "onnx" else ".safetensors"
    for name in run.artefacts(suffix):
        entry = run.entry(name)
        sound = any_verdict or (entry is not None and entry.verdict.state == "pass")
        fits = precision in {None, "fp32"} if name == FUSED else precision is None or f".{precision}." in name
        if sound and fits and name != "merged.safetensors":
            return run.take(name)
    fused, onnx = fusing.reopen(run.take(FUSED), prove=True), kind.takes == "onnx"
    made = exporting.export_fused(fused, run, onnx=onnx, precision=precision or "fp32", progress=progress)
    return made.file
