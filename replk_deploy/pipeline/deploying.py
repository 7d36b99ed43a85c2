"""`replk deploy`: the whole chain, resumed where a run already vouches for a step."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from replk_deploy import checkpoint, erf, files, images, records, sources, weights
from replk_deploy import evaluate as evaluation
from replk_deploy import inspect as inspection
from replk_deploy import proof as proving
from replk_deploy import verify as verifying
from replk_deploy.batch import DYNAMIC, Batch
from replk_deploy.bench import demand
from replk_deploy.checkpoint import Loaded
from replk_deploy.container import Source
from replk_deploy.errors import IntegrityError, MismatchError, ReplkError
from replk_deploy.inspect import Inspection
from replk_deploy.metadata import State
from replk_deploy.pipeline import benching, entries, exporting, fusing, receptive, reporting
from replk_deploy.pipeline.benching import Benched
from replk_deploy.pipeline.exporting import Exported
from replk_deploy.pipeline.fusing import Fused
from replk_deploy.precision import Precision
from replk_deploy.progress import Progress, silent
from replk_deploy.records import live
from replk_deploy.report import facts
from replk_deploy.sources import FUSED
from replk_deploy.workspace import ROOT, Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A whole run: each step with its verdict, as it stands in the report.

    `problem` says what ended it early, `code` the exit code for that, `wrong` whether that was a wrong answer;
    `command` repeats it all.
    """

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
    code: int
    wrong: bool
    command: str
    timed: Benched | None = live()

    @property
    def state(self) -> State:
        """Return the worst verdict of the chain; a backend that answers wrongly is a rejection, too."""
        states = [step["verdict"]["state"] for step in (self.fuse, *self.exports)]
        states += ["rejected"] if self.wrong else []
        return facts.worst_of(states)


def deploy(
    path: Path,
    *,
    source: Source = "model",
    head: str | None = None,
    precisions: Sequence[Precision] = ("fp32",),
    size: sources.Size | None = None,
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
    benching.demand_batches(batches)
    demand((), max_seconds)
    loaded = checkpoint.load(path, source=source, head=head)
    seen = inspection.inspect(loaded, size=size)
    run = Workspace(root / sources.run_name(loaded))
    pictures = images.read(data, classes=loaded.model.geometry.classes) if data else None
    chosen, skipped = sources.present(backends)
    reused: list[str] = []
    fused = fusing.resume(loaded, run, seen.size, reused, progress)
    if fused.verdict.state not in {"pass", "rejected"}:
        raise IntegrityError(f"{path} is {fused.verdict.state}", "deploy the training checkpoint, or fuse it again")
    exports: list[Mapping[str, Any]] = []
    for precision in precisions if fused.verdict.state == "pass" else ():
        if any(e["verdict"]["state"] == "rejected" for e in exports):
            break
        options = exporting.options_of(precision, seen.size, batch, embed=embed, prove=True)
        name = f"model.{precision}.onnx"
        if run.fresh(name, {FUSED: files.sha256(fused.file)}, options):
            reused.append(name)
            exports.append(entries.result(run, name, Exported.KIND))
        else:
            made = exporting.export_fused(
                fused, run, precision=precision, size=seen.size, batch=batch, embed=embed, progress=progress
            )
            exports.append(records.plain(made))
    run.make_latest()
    sound = fused.verdict.state == "pass" and all(e["verdict"]["state"] != "rejected" for e in exports)
    accuracy: list[Mapping[str, Any]] = []
    timed: Benched | None = None
    failure: ReplkError | None = None
    if sound and pictures:
        try:
            accuracy = [records.plain(a) for a in _accuracies(loaded, fused, run, exports, pictures, progress)]
        except ReplkError as exc:  # the report is written all the same
            failure = exc
    passed = [p for p, e in zip(precisions, exports, strict=False) if e["verdict"]["state"] == "pass"]
    if sound and chosen and passed and failure is None:
        try:
            timed = benching.bench(
                run.folder,
                backends=chosen,
                batches=batches,
                max_seconds=max_seconds,
                precision=passed[0],
                progress=progress,
            )
            timed = dataclasses.replace(timed, skipped=skipped)
        except ReplkError as exc:
            failure = exc
    moved = _field(loaded, run, seen.size, pictures, progress) if sound else None
    failure = failure or moved
    done = Deployment(
        run=run.name,
        folder=run.folder,
        inspection=seen,
        fuse=entries.result(run, FUSED, Fused.KIND) if FUSED in reused else records.plain(fused),
        exports=tuple(exports),
        bench=records.plain(timed) if timed else None,
        accuracy=tuple(accuracy),
        reused=tuple(reused),
        problem=str(failure) if failure else "" if passed or not sound else "nothing was timed: no export passed",
        code=failure.code if failure else 0,
        wrong=isinstance(failure, MismatchError),
        command=_command(
            path,
            {
                "weights": source,
                "head": head,
                "precision": precisions,
                "size": f"{seen.size[0]}x{seen.size[1]}",
                "batch": batch,
                "embed-preprocess": embed,
                "backend": chosen,
                "bench-batch": batches,
                "max-seconds": max_seconds,
                "data": data,
            },
        ),
        timed=timed,
    )
    files.write_text(run.path("results/deployment.json"), records.to_json(done))
    reporting.write(facts.read([run.folder]), run.folder)
    if failure:
        raise failure
    return done


def _field(
    loaded: Loaded, run: Workspace, size: sources.Size, pictures: images.Pictures | None, progress: Progress
) -> ReplkError | None:
    """Record the receptive field; return what speaks against it."""
    try:
        fused, _ = weights.read(sources.fused_of(run))
        field = receptive.of_networks(loaded, fused, size=size, pictures=pictures, progress=progress)
    except ReplkError as exc:
        return exc
    files.write_text(run.path("results/erf.json"), records.to_json(field))
    said = erf.moved(field.apart)
    return MismatchError(said, "report this file") if said else None


def _command(path: Path, choices: Mapping[str, Any]) -> str:
    """Write the line that repeats a deployment, with every choice that shaped it."""
    words = ["replk", "deploy", str(path)]
    for name, value in choices.items():
        if isinstance(value, bool):
            words += [f"--{name}"] if value else []
        elif value is not None:
            each = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
            words += [word for one in each for word in (f"--{name}", str(one))]
    return shlex.join(words)


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
    stored, _ = weights.read(sources.fused_of(run))
    answer = verifying.answer_of(stored)
    found = [first, evaluation.evaluate(answer, pictures, rules, step="fused", first=first, progress=progress)]
    for made in exports:
        precision, path = made["export"]["precision"], run.take(Path(made["file"]).name)
        made_size = tuple(made["export"]["size"])
        with proving.open_onnx(path, precision) as backend:
            taken = verifying.any_batch(backend)
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
