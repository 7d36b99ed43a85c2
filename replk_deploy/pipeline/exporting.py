"""`replk export`: fused weights, or a checkpoint after fusing it → a proved .onnx file, or cast weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from replk_deploy import export as exporting
from replk_deploy import files, graph, machine, publish, sources, weights
from replk_deploy import proof as proving
from replk_deploy.backends.base import Backend, Engine
from replk_deploy.batch import DYNAMIC, Batch
from replk_deploy.container import Source
from replk_deploy.errors import ContractError, MismatchError, ReplkError
from replk_deploy.export import Export
from replk_deploy.metadata import Verdict
from replk_deploy.pipeline import entries, fusing
from replk_deploy.pipeline.fusing import Fused
from replk_deploy.precision import Precision
from replk_deploy.progress import Progress, silent
from replk_deploy.proof import Proof
from replk_deploy.sources import FUSED
from replk_deploy.workspace import ROOT, Workspace

LOWERED = "lowered"  # folder of a run for what is made of portable files


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An exported file and what vouches for it; `export` is None for cast weights."""

    KIND: ClassVar[str] = "exported"
    FORMAT: ClassVar[int] = 1

    export: Export | None
    proof: Proof | None
    verdict: Verdict
    file: Path


def export(
    artefact: Path | None = None,
    *,
    onnx: bool = True,
    output: Path | None = None,
    source: Source = "model",
    head: str | None = None,
    precision: Precision = "fp32",
    size: sources.Size | None = None,
    batch: Batch = DYNAMIC,
    embed: bool = False,
    prove: bool = True,
    root: Path = ROOT,
    progress: Progress = silent,
) -> Exported:
    """Export fused weights, or a checkpoint after fusing it, as ONNX or as cast weights."""
    ending = ".onnx" if onnx else ".safetensors"
    if output and output.suffix != ending:
        raise ReplkError(
            f"{output} does not end in {ending}", f"{'leave out' if onnx else 'add'} --onnx, or name a {ending} file"
        )
    fused, run = fused_for(artefact, output, source=source, head=head, prove=prove, root=root, progress=progress)
    return export_fused(
        fused,
        run,
        onnx=onnx,
        output=output,
        precision=precision,
        size=size,
        batch=batch,
        embed=embed,
        prove=prove,
        progress=progress,
    )


def fused_for(
    artefact: Path | None,
    output: Path | None,
    *,
    source: Source,
    head: str | None,
    prove: bool,
    root: Path,
    progress: Progress,
) -> tuple[Fused, Workspace | None]:
    """Return the fused weights of a run or file, fused first where they are not, and the run that is concerned."""
    if output:
        entries.spare_runs(output)
    if artefact is None or artefact.is_dir():
        run = Workspace.latest(root) if artefact is None else Workspace.open(artefact)
        return fusing.reopen(sources.fused_of(run), prove=prove), run
    loaded = sources.load_either(artefact, source, head)
    if output:
        entries.spare(artefact, output)
    return fusing.fused_source(loaded, output, prove=prove, root=root, progress=progress)


def export_fused(
    fused: Fused,
    run: Workspace | None,
    *,
    onnx: bool = True,
    output: Path | None = None,
    precision: Precision = "fp32",
    size: sources.Size | None = None,
    batch: Batch = DYNAMIC,
    embed: bool = False,
    prove: bool = True,
    progress: Progress = silent,
) -> Exported:
    """Export open fused weights."""
    if fused.verdict.state == "rejected":
        raise MismatchError(f"the fusion was rejected: {fused.verdict.why}", f"see {fused.file}")
    folded = fused.fusion.model
    size = size or fused.metadata.preprocessing.size
    name = f"model.{precision}.{'onnx' if onnx else 'safetensors'}"
    final = output or (run.path(name) if run else Path(name))
    metadata = dataclasses.replace(fused.metadata, form=folded.form, precision=precision, verdict=None)
    metadata = dataclasses.replace(metadata, batch=str(batch) if onnx else "")
    if size != metadata.preprocessing.size:
        preprocessing = dataclasses.replace(metadata.preprocessing, size=size, said_by="user")
        metadata = dataclasses.replace(metadata, preprocessing=preprocessing)
    made, proof = None, None
    with files.staged(final) as part:
        progress(f"export {precision}", 0, None)
        if onnx:
            inside = metadata.preprocessing if embed else None
            made = exporting.export(folded, part, precision=precision, size=size, batch=batch, embed=inside)
            graph.seal(part, metadata)
            content = graph.content_hash(part)
            if prove:
                written = made
                proof = publish.proved(
                    "export",
                    lambda: proving.prove_onnx(
                        fused.oracle, part, written, metadata=metadata, folded=folded, progress=progress
                    ),
                )
        else:
            weights.write(part, proving.cast(folded, precision), metadata)
            stored, _ = weights.read(part)
            content = weights.judged_hash(stored, metadata)
            if prove:
                proof = publish.proved(
                    "export", lambda: proving.prove_weights(fused.oracle, stored, precision, size=size)
                )
        verdict = publish.judged(proof, content, fused.oracle.sha256)
        metadata = dataclasses.replace(metadata, verdict=verdict)
        if onnx:
            graph.seal(part, metadata)
        else:
            weights.write(part, stored, metadata)
        file = publish.place(part, final, verdict, run)
    exported = Exported(export=made, proof=proof, verdict=verdict, file=file)
    if run and not output:
        options = options_of(precision, size, batch, embed=embed, prove=prove)
        entries.enter(run, name, exported, made_from={FUSED: files.sha256(fused.file)}, by="export", options=options)
    return exported


def needed(
    run: Workspace | None,
    kind: type[Backend],
    precision: Precision | None,
    progress: Progress,
    *,
    any_verdict: bool,
    batches: Sequence[int] = (),
) -> Path:
    """Return the newest sound artefact of a run that a backend can start from, exporting it when there is none.

    One whose batch can take all of `batches` comes before newer ones that cannot.
    """
    if run is None:
        raise ContractError("neither a run nor a file")
    states = {"pass", "provisional"} if issubclass(kind, Engine) else {"pass"}  # the engine is judged by itself
    found = []
    for name in run.artefacts(sources.starts_from(kind)):
        entry = run.entry(name)
        sound = any_verdict or (entry is not None and entry.verdict.state in states)
        fits = _precision(name) in ({precision} if precision else kind.precisions)
        if sound and fits and name != "merged.safetensors" and not name.startswith(f"{LOWERED}/"):
            found.append(run.take(name))
    if found:
        return next((path for path in found if _takes(path, batches)), found[0])
    fused, onnx = fusing.reopen(sources.fused_of(run), prove=True), kind.takes == "onnx"
    able: Precision = "fp32" if "fp32" in kind.precisions else "fp16"
    made = export_fused(fused, run, onnx=onnx, precision=precision or able, progress=progress)
    return made.file


def _precision(name: str) -> str:
    """Return the precision that the name of a portable file in a run tells."""
    return "fp32" if name == FUSED else name.split(".")[1]


def _takes(path: Path, batches: Sequence[int]) -> bool:
    said = sources.header(path)
    stated = Batch.parse(said.batch) if said and said.batch else None
    return stated is None or all(stated.holds(count) for count in batches)


def options_of(
    precision: Precision, size: sources.Size, batch: Batch, *, embed: bool, prove: bool
) -> Mapping[str, Any]:
    """Return what decides an exported file; another exporter may write another graph."""
    made_with = machine.versions("torch", "onnx", "onnxscript")
    chosen = {"precision": precision, "size": size, "batch": str(batch), "embed": embed, "proved": prove}
    return {**chosen, "made_with": made_with}
