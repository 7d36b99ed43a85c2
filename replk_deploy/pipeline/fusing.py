"""`replk fuse`: checkpoint → proved fused weights."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from replk_deploy import checkpoint, files, machine, publish, sources, weights
from replk_deploy import fuse as fusing
from replk_deploy import proof as proving
from replk_deploy.checkpoint import Loaded
from replk_deploy.container import Source
from replk_deploy.errors import ReplkError
from replk_deploy.fuse import Fusion, Level
from replk_deploy.metadata import Metadata, Verdict
from replk_deploy.models.base import Network
from replk_deploy.pipeline import entries
from replk_deploy.progress import Progress, silent
from replk_deploy.proof import Oracle, Proof
from replk_deploy.records import live
from replk_deploy.sources import FUSED
from replk_deploy.workspace import ROOT, Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """A fused weights file and what vouches for it."""

    KIND: ClassVar[str] = "fused"
    FORMAT: ClassVar[int] = 1

    fusion: Fusion
    proof: Proof | None
    verdict: Verdict
    file: Path
    oracle: Oracle = live()
    metadata: Metadata = live()


def fuse(
    path: Path | str,
    *,
    output: Path | str | None = None,
    level: Level = "full",
    source: Source = "model",
    head: str | None = None,
    size: sources.Size | None = None,
    prove: bool = True,
    root: Path = ROOT,
    progress: Progress = silent,
) -> Fused:
    """Fuse a checkpoint into a proved weights file, in a run or at `output`."""
    output = Path(output) if output else None
    loaded = checkpoint.load(path, source=source, head=head)
    run = None if output else Workspace(root / sources.run_name(loaded))
    return fuse_loaded(loaded, run, output=output, level=level, size=size, prove=prove, progress=progress)


def fuse_loaded(
    loaded: Loaded,
    run: Workspace | None,
    *,
    output: Path | None = None,
    level: Level = "full",
    size: sources.Size | None = None,
    prove: bool = True,
    progress: Progress = silent,
) -> Fused:
    """Fuse an open checkpoint."""
    name = FUSED if level == "full" else "merged.safetensors"
    final = output or (run.path(name) if run else Path(name))
    if final.suffix not in {".safetensors", ".pth"}:
        raise ReplkError(f"{final} has no known ending", "end it in .safetensors, or .pth for the reference code")
    entries.spare(loaded.path, final)
    if output:
        entries.spare_runs(output)
    result = fusing.fuse(loaded.model, level=level, progress=progress)
    oracle = Oracle(loaded.model, loaded.sha256)
    same = loaded.metadata if not result.changed and size in {None, loaded.preprocessing.size} else None
    metadata = same or _metadata(loaded, result.model, size)
    known = metadata.verdict
    with files.staged(final) as part:
        dtype = next(loaded.model.parameters()).dtype if known else torch.float32
        publish.store(part, final.suffix, proving.cast(result.model, dtype), metadata)
        stored = publish.restore(part, final.suffix, result.model)
        proof = None
        if prove and known is None:
            shown = metadata.preprocessing.size
            proof = publish.proved(
                "fuse",
                lambda: proving.prove_fusion(oracle, stored, level=level, size=shown, progress=progress),
            )
            proof = dataclasses.replace(proof, doubt=sources.doubt(loaded))
        verdict = known or publish.judged(proof, weights.judged_hash(stored, metadata), loaded.sha256)
        metadata = dataclasses.replace(metadata, verdict=verdict)
        if final.suffix == ".safetensors":
            weights.write(part, stored, metadata)
        file = publish.place(part, final, verdict, run)
    fused = Fused(fusion=result, proof=proof, verdict=verdict, file=file, oracle=oracle, metadata=metadata)
    if run:
        options = _fuse_options(loaded, level, size or loaded.preprocessing.size, prove=prove)
        entries.enter(run, name, fused, made_from={loaded.file: loaded.sha256}, by="fuse", options=options)
    return fused


def _metadata(loaded: Loaded, model: Network, size: sources.Size | None) -> Metadata:
    known, rules = loaded.metadata, loaded.preprocessing
    return Metadata(
        family=loaded.family,
        form=model.form,
        geometry=model.describe(),
        label=loaded.label,
        precision=known.precision if known else "fp32",
        preprocessing=rules if size in {None, rules.size} else dataclasses.replace(rules, size=size, said_by="user"),
        source_sha256=known.source_sha256 if known else loaded.sha256,
        source_name=known.source_name if known else loaded.file,
        selected=loaded.selected,
    )


def _fuse_options(loaded: Loaded, level: Level, size: sources.Size, *, prove: bool) -> Mapping[str, Any]:
    """Return what decides a fused file; one checkpoint file may hold several sets of weights and heads."""
    made_with = machine.versions("torch")
    chosen = {"level": level, "size": size, "proved": prove, "weights": weights.content_hash(loaded.model)}
    return {**chosen, "made_with": made_with}


def resume(
    loaded: Loaded,
    run: Workspace,
    size: sources.Size,
    reused: list[str],
    progress: Progress,
    *,
    prove: bool = True,
) -> Fused:
    """Take the fused weights that a run vouches for, noting it in `reused`; fuse again where there are none."""
    options = _fuse_options(loaded, "full", size, prove=True)
    if not run.fresh(FUSED, {loaded.file: loaded.sha256}, options):
        return fuse_loaded(loaded, run, size=size, prove=prove, progress=progress)
    reused.append(FUSED)
    fused = reopen(sources.fused_of(run), prove=True)
    return dataclasses.replace(fused, oracle=Oracle(loaded.model, loaded.sha256))


def reopen(path: Path, *, prove: bool) -> Fused:
    """Open fused weights that were proved before; their float64 form is the oracle."""
    model, metadata = sources.open_fused(path, prove=prove)
    verdict = metadata.verdict or publish.judged(None, "", "")
    fusion = Fusion(model=model, level="full", merged=(), folded=(), left=fusing.batch_norms(model))
    oracle = Oracle(model, files.sha256(path))
    return Fused(fusion=fusion, proof=None, verdict=verdict, file=path, oracle=oracle, metadata=metadata)


def fused_source(
    loaded: Loaded, output: Path | None, *, prove: bool, root: Path, progress: Progress
) -> tuple[Fused, Workspace | None]:
    """Return the fused weights of a file, fused first where they are not; a run only where one is concerned."""
    run = Workspace(root / sources.run_name(loaded))
    if loaded.metadata and loaded.form == "folded":
        return reopen(loaded.path, prove=prove), run if loaded.path.resolve().parent == run.folder.resolve() else None
    if output is None:
        return resume(loaded, run, loaded.preprocessing.size, [], progress, prove=prove), run
    beside = output.with_name(f"{output.stem}.fused.safetensors")
    return fuse_loaded(loaded, None, output=beside, prove=prove, progress=progress), None
