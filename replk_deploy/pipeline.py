"""One function per command; the only place where the steps meet.

    checkpoint ──fuse──▶ fused.safetensors ──export──▶ model.<precision>.onnx ──bench──▶ latencies
         └───────────────── proof: every file against the float64 network ─────────────┘

A file gets its final name only after its proof. One that fails is kept apart, under `rejected`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from replk_deploy import backends as runtimes
from replk_deploy import (
    bench as benching,
)
from replk_deploy import (
    checkpoint as checkpoints,
)
from replk_deploy import (
    evaluate as evaluation,
)
from replk_deploy import (
    export as exporting,
)
from replk_deploy import (
    files,
    graph,
    images,
    publish,
    records,
    sources,
    weights,
)
from replk_deploy import (
    fuse as fusing,
)
from replk_deploy import (
    inspect as inspection,
)
from replk_deploy import (
    proof as proving,
)
from replk_deploy import (
    report as reporting,
)
from replk_deploy import (
    verify as verifying,
)
from replk_deploy.backends.base import Backend
from replk_deploy.bench import Bench
from replk_deploy.checkpoint import Loaded
from replk_deploy.container import Source
from replk_deploy.errors import ContractError, IntegrityError, MismatchError, ReplkError
from replk_deploy.export import Batch, Export
from replk_deploy.fuse import Fusion, Level
from replk_deploy.inspect import Inspection
from replk_deploy.metadata import Metadata, State, Verdict
from replk_deploy.models.base import Network
from replk_deploy.precision import TOLERANCES, Precision
from replk_deploy.progress import Progress, silent
from replk_deploy.proof import Oracle, Proof
from replk_deploy.records import live
from replk_deploy.sources import FUSED
from replk_deploy.verify import Agreement
from replk_deploy.workspace import ROOT, Workspace

Size = tuple[int, int]
DYNAMIC = Batch(min=1, opt=8, max=64)
ROTATE = 4


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An exported file and what vouches for it; `export` is None for cast weights."""

    KIND: ClassVar[str] = "exported"
    FORMAT: ClassVar[int] = 1

    export: Export | None
    proof: Proof | None
    verdict: Verdict
    file: Path


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A whole run: each step with its verdict, as it stands in the report."""

    KIND: ClassVar[str] = "deployment"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ("state",)

    run: str
    folder: Path
    inspection: Inspection
    fuse: Mapping[str, Any]
    exports: tuple[Mapping[str, Any], ...]
    bench: Mapping[str, Any] | None
    accuracy: tuple[Mapping[str, Any], ...]
    reused: tuple[str, ...]
    problem: str
    timed: Benched | None = live()

    @property
    def state(self) -> State:
        """Return the worst verdict of the chain."""
        states = [step["verdict"]["state"] for step in (self.fuse, *self.exports)]
        order: tuple[State, ...] = ("rejected", "unverified", "provisional", "pass")
        return next(s for s in order if s in states)


def inspect(path: Path, *, source: Source = "model", head: str | None = None, size: Size | None = None) -> Inspection:
    """Say what a checkpoint is and what it costs."""
    return inspection.inspect(checkpoints.load(path, source=source, head=head), size=size)


def fuse(
    path: Path,
    *,
    output: Path | None = None,
    level: Level = "full",
    source: Source = "model",
    head: str | None = None,
    size: Size | None = None,
    prove: bool = True,
    root: Path = ROOT,
    progress: Progress = silent,
) -> Fused:
    """Fuse a checkpoint into a proved weights file, in a run or at `output`."""
    loaded = checkpoints.load(path, source=source, head=head)
    run = None if output else Workspace(root / sources.run_name(loaded))
    return _fuse(loaded, run, output=output, level=level, size=size, prove=prove, progress=progress)


def _fuse(
    loaded: Loaded,
    run: Workspace | None,
    *,
    output: Path | None = None,
    level: Level = "full",
    size: Size | None = None,
    prove: bool = True,
    progress: Progress = silent,
) -> Fused:
    result = fusing.fuse(loaded.model, level=level, progress=progress)
    name = FUSED if level == "full" else "merged.safetensors"
    final = output or (run.path(name) if run else Path(name))
    if final.suffix not in {".safetensors", ".pth"}:
        raise ReplkError(f"{final} has no known ending", "end it in .safetensors, or .pth for the reference code")
    _spare(loaded.path, final)
    oracle = Oracle(loaded.model, loaded.sha256)
    metadata = _metadata(loaded, result.model, size)
    known = metadata.verdict if loaded.metadata and not result.changed else None
    metadata = dataclasses.replace(metadata, verdict=known)  # the source's verdict does not speak of what is made of it
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
            proof = dataclasses.replace(proof, doubt=_doubt(loaded))
        verdict = known or publish.judged(proof, weights.content_hash(stored), loaded.sha256)
        metadata = dataclasses.replace(metadata, verdict=verdict)
        if final.suffix == ".safetensors":
            weights.write(part, stored, metadata)
        file = publish.place(part, final, verdict, run)
    fused = Fused(fusion=result, proof=proof, verdict=verdict, file=file, oracle=oracle, metadata=metadata)
    if run:
        options = _fuse_options(loaded, level, size or loaded.preprocessing.size, prove=prove)
        _enter(run, name, fused, made_from={loaded.file: loaded.sha256}, by="fuse", options=options)
    return fused


def export(
    artefact: Path | None = None,
    *,
    onnx: bool = True,
    output: Path | None = None,
    source: Source = "model",
    head: str | None = None,
    precision: Precision = "fp32",
    size: Size | None = None,
    batch: Batch = DYNAMIC,
    embed: bool = False,
    prove: bool = True,
    root: Path = ROOT,
    progress: Progress = silent,
) -> Exported:
    """Export fused weights, or a checkpoint after fusing it, as ONNX or as cast weights."""
    if artefact is None or artefact.is_dir():
        latest = Workspace.latest(root) if artefact is None else Workspace.open(artefact)
        run: Workspace | None = latest
        fused = _open_fused(latest.take(FUSED), prove=prove)
    else:
        loaded = _load_either(artefact, source, head)
        if output:
            _spare(artefact, output)
        fused, run = _fused_source(loaded, output, prove=prove, root=root, progress=progress)
    return _export(
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


def _export(
    fused: Fused,
    run: Workspace | None,
    *,
    onnx: bool = True,
    output: Path | None = None,
    precision: Precision = "fp32",
    size: Size | None = None,
    batch: Batch = DYNAMIC,
    embed: bool = False,
    prove: bool = True,
    progress: Progress = silent,
) -> Exported:
    if fused.verdict.state == "rejected":
        raise MismatchError(f"the fusion was rejected: {fused.verdict.why}", f"see {fused.file}")
    folded = fused.fusion.model
    size = size or fused.metadata.preprocessing.size
    name = f"model.{precision}.{'onnx' if onnx else 'safetensors'}"
    final = output or (run.path(name) if run else Path(name))
    if final.suffix != Path(name).suffix:
        raise ReplkError(f"{final} has no known ending", f"end it in {Path(name).suffix}")
    metadata = dataclasses.replace(fused.metadata, form=folded.form, precision=precision, verdict=None)
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
                    lambda: proving.prove_onnx(fused.oracle, part, written, metadata=metadata, progress=progress),
                )
        else:
            weights.write(part, proving.cast(folded, precision), metadata)
            stored, _ = weights.read(part)
            content = weights.content_hash(stored)
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
        options = {"precision": precision, "size": size, "batch": str(batch), "embed": embed, "proved": prove}
        _enter(run, name, exported, made_from={FUSED: files.sha256(fused.file)}, by="export", options=options)
    return exported


def verify(
    reference: Path,
    candidate: Path,
    *,
    source: Source = "model",
    head: str | None = None,
    size: Size | None = None,
    progress: Progress = silent,
) -> Proof:
    """Judge one file by another: checkpoints, fused weights and ONNX files in any pair."""
    if reference.suffix == ".onnx" and candidate.suffix != ".onnx":
        reference, candidate = candidate, reference  # the question is symmetric, and only weights have a float64 answer
    if size and candidate.suffix == ".onnx":
        raise ReplkError(f"{candidate} has its own size", "leave out --size")
    if reference.suffix == ".onnx":
        return publish.proved("verify", lambda: proving.prove_graphs(reference, candidate, progress=progress))
    loaded = _load_either(reference, source, head)
    oracle, doubt = Oracle(loaded.model, loaded.sha256), _doubt(loaded)
    if candidate.suffix == ".onnx":
        return publish.proved("verify", lambda: proving.prove_file(oracle, candidate, doubt=doubt, progress=progress))
    other = _load_either(candidate, source, head)
    if _rounding(loaded) > _rounding(other):
        loaded, other, oracle = other, loaded, Oracle(other.model, other.sha256)  # rounded weights judge nobody
        doubt = _doubt(loaded)
    shown = size or loaded.preprocessing.size
    return publish.proved(
        "verify", lambda: proving.prove_pair(oracle, other, size=shown, doubt=doubt, progress=progress)
    )


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
    _demand_batches(batches)
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


def deploy(
    path: Path,
    *,
    source: Source = "model",
    head: str | None = None,
    precisions: Sequence[Precision] = ("fp32",),
    size: Size | None = None,
    batch: Batch = DYNAMIC,
    embed: bool = False,
    backends: Sequence[str] = (),
    batches: Sequence[int] = (1,),
    max_seconds: float = 20.0,
    data: Path | None = None,
    root: Path = ROOT,
    progress: Progress = silent,
) -> Deployment:
    """Take a checkpoint through the whole chain; what a run already holds and vouches for is taken from it.

    Stops at the first step that is not equivalent; the report says which.
    """
    _demand_batches(batches)
    loaded = checkpoints.load(path, source=source, head=head)
    seen = inspection.inspect(loaded, size=size)
    run = Workspace(root / sources.run_name(loaded))
    pictures = images.read(data, classes=loaded.model.geometry.classes) if data else None
    chosen, skipped = sources.present(backends)
    reused: list[str] = []
    fused = _resume_fuse(loaded, run, seen.size, reused, progress)
    if fused.verdict.state not in {"pass", "rejected"}:
        raise IntegrityError(f"{path} is {fused.verdict.state}", "deploy the training checkpoint, or fuse it again")
    exports: list[Mapping[str, Any]] = []
    for precision in precisions if fused.verdict.state == "pass" else ():
        if any(e["verdict"]["state"] == "rejected" for e in exports):
            break
        options = {"precision": precision, "size": seen.size, "batch": str(batch), "embed": embed, "proved": True}
        name = f"model.{precision}.onnx"
        if run.fresh(name, {FUSED: files.sha256(fused.file)}, options):
            reused.append(name)
            exports.append(_result(run, name))
        else:
            made = _export(fused, run, precision=precision, size=seen.size, batch=batch, embed=embed, progress=progress)
            exports.append(records.plain(made))
    run.make_latest()
    sound = fused.verdict.state == "pass" and all(e["verdict"]["state"] != "rejected" for e in exports)
    accuracy: list[Mapping[str, Any]] = []
    timed: Benched | None = None
    if sound and pictures:
        accuracy = [records.plain(a) for a in _accuracies(loaded, fused, run, exports, pictures, progress)]
    passed = [p for p, e in zip(precisions, exports, strict=False) if e["verdict"]["state"] == "pass"]
    failure: ReplkError | None = None
    if sound and chosen and passed:
        try:
            timed = bench(
                run.folder,
                backends=chosen,
                batches=batches,
                max_seconds=max_seconds,
                precision=passed[0],
                progress=progress,
            )
            timed = dataclasses.replace(timed, skipped=skipped)
        except ReplkError as exc:  # the report is written all the same
            failure = exc
    done = Deployment(
        run=run.name,
        folder=run.folder,
        inspection=seen,
        fuse=_result(run, FUSED) if FUSED in reused else records.plain(fused),
        exports=tuple(exports),
        bench=records.plain(timed) if timed else None,
        accuracy=tuple(accuracy),
        reused=tuple(reused),
        problem=str(failure) if failure else "" if passed or not sound else "nothing was timed: no export passed",
        timed=timed,
    )
    files.write_text(run.path("report.json"), records.to_json(done))
    files.write_text(run.path("report.md"), reporting.markdown(records.plain(done)))
    if failure:
        raise failure
    return done


def _spare(source: Path, output: Path) -> None:
    """Refuse to write a result over what it is made from."""
    if output.exists() and output.samefile(source):
        raise ReplkError(f"{output} is the file to start from", "name another file with -o")


def _demand_batches(batches: Sequence[int]) -> None:
    wrong = [count for count in batches if count < 1]
    if wrong:
        raise ReplkError(f"a batch of {wrong[0]} images cannot be timed", "give 1 or more")


def _metadata(loaded: Loaded, model: Network, size: Size | None) -> Metadata:
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
        verdict=known.verdict if known else None,
    )


def _fuse_options(loaded: Loaded, level: Level, size: Size, *, prove: bool) -> Mapping[str, Any]:
    """Return what decides a fused file; one checkpoint file may hold several sets of weights and heads."""
    return {"level": level, "size": size, "proved": prove, "weights": weights.content_hash(loaded.model)}


def _enter(
    run: Workspace,
    name: str,
    made: Fused | Exported,
    *,
    made_from: Mapping[str, str],
    by: str,
    options: Mapping[str, Any],
) -> None:
    """Write a step's record, then the manifest, then make the run the latest.

    What a run held under the name of a rejected file stays: its own verdict still speaks of it.
    """
    rejected = made.verdict.state == "rejected"
    files.write_text(run.path(f"{'rejected' if rejected else 'results'}/{name}.json"), records.to_json(made))
    if rejected:
        run.save()
    else:
        run.record(name, made_from=made_from, by=by, options=options, verdict=made.verdict)
    run.make_latest()


def _result(run: Workspace, name: str) -> Mapping[str, Any]:
    """Read back what a step of this run said."""
    path = run.path(f"results/{name}.json")
    if not path.is_file():
        raise IntegrityError(f"{path} is missing", f"make the run again: rm -r {run.folder}")
    return records.read(path, "fused" if name == FUSED else "exported", 1)


def _resume_fuse(loaded: Loaded, run: Workspace, size: Size, reused: list[str], progress: Progress) -> Fused:
    options = _fuse_options(loaded, "full", size, prove=True)
    if not run.fresh(FUSED, {loaded.file: loaded.sha256}, options):
        return _fuse(loaded, run, size=size, progress=progress)
    reused.append(FUSED)
    fused = _open_fused(run.take(FUSED), prove=True)
    return dataclasses.replace(fused, oracle=Oracle(loaded.model, loaded.sha256))


def _open_fused(path: Path, *, prove: bool) -> Fused:
    """Open fused weights that were proved before; their float64 form is the oracle."""
    model, metadata = sources.open_fused(path, prove=prove)
    verdict = metadata.verdict or publish.judged(None, "", "")
    fusion = Fusion(model=model, level="full", merged=(), folded=(), left=fusing.batch_norms(model))
    oracle = Oracle(model, files.sha256(path))
    return Fused(fusion=fusion, proof=None, verdict=verdict, file=path, oracle=oracle, metadata=metadata)


def _fused_source(
    loaded: Loaded, output: Path | None, *, prove: bool, root: Path, progress: Progress
) -> tuple[Fused, Workspace | None]:
    """Return the fused weights of a file, fused first where they are not; a run only where one is concerned."""
    run = Workspace(root / sources.run_name(loaded))
    if loaded.metadata and loaded.form == "folded":
        return _open_fused(
            loaded.path, prove=prove
        ), run if loaded.path.resolve().parent == run.folder.resolve() else None
    if output is None:
        return _fuse(loaded, run, prove=prove, progress=progress), run
    beside = output.with_name(f"{output.stem}.fused.safetensors")
    return _fuse(loaded, None, output=beside, prove=prove, progress=progress), None


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
    fused, onnx = _open_fused(run.take(FUSED), prove=True), kind.takes == "onnx"
    made = _export(fused, run, onnx=onnx, precision=precision or "fp32", progress=progress)
    return made.file


def _accuracies(
    loaded: Loaded,
    fused: Fused,
    run: Workspace,
    exports: Sequence[Mapping[str, Any]],
    pictures: images.Pictures,
    progress: Progress,
) -> list[evaluation.Accuracy]:
    rules = fused.metadata.preprocessing
    size = rules.size
    trained = verifying.answer_of(proving.cast(loaded.model, torch.float32))
    first = evaluation.evaluate(trained, pictures, rules, step="trained", progress=progress)
    stored, _ = weights.read(run.take(FUSED))
    answer = verifying.answer_of(stored)
    found = [first, evaluation.evaluate(answer, pictures, rules, step="fused", first=first, progress=progress)]
    for made in exports:
        precision, path = made["export"]["precision"], run.take(Path(made["file"]).name)
        made_size = tuple(made["export"]["size"])
        with proving.open_onnx(path, precision) as backend:
            taken = verifying.any_batch(backend.run, backend.input.shape[0])
            found.append(
                evaluation.evaluate(
                    taken,
                    pictures,
                    rules if made_size == size else dataclasses.replace(rules, size=made_size),
                    step=f"ONNX {precision}",
                    first=first,
                    uint8=made["export"]["embeds_preprocessing"],
                    progress=progress,
                )
            )
    return found


def _load_either(path: Path, source: Source, head: str | None) -> Loaded:
    """Open a training checkpoint at `source`, or a file of ours, which holds one set of weights."""
    ours = path.suffix == ".safetensors" and path.is_file() and path.stat().st_size and weights.header(path)
    return checkpoints.load(path) if ours else checkpoints.load(path, source=source, head=head)


def _rounding(loaded: Loaded) -> float:
    return TOLERANCES[loaded.metadata.precision if loaded.metadata else "fp32"].typical


def _doubt(loaded: Loaded) -> str:
    verdict = loaded.metadata.verdict if loaded.metadata else None
    if loaded.metadata and (verdict is None or verdict.state != "pass"):
        return f"the reference {loaded.file} has no passing verdict itself"
    if loaded.metadata and loaded.metadata.precision != "fp32":
        return f"the reference {loaded.file} holds weights rounded to {loaded.metadata.precision}"
    return ""
