"""A run folder → what its report may say, each file checked against the manifest, each verdict against its numbers."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from replk_deploy import __version__, records, verify
from replk_deploy.erf import state_of
from replk_deploy.errors import Exit, IntegrityError, ReplkError
from replk_deploy.measurement import misquoted
from replk_deploy.metadata import State
from replk_deploy.proof import Proof
from replk_deploy.quantiles import same
from replk_deploy.verify import Agreement, Bound, Row
from replk_deploy.workspace import Workspace

Record = Mapping[str, Any]
Outcome = State | Literal["error"]
ORDER: tuple[State, ...] = ("rejected", "unverified", "provisional", "pass")
# kind of record → the newest format that is understood here
NEWEST = dict.fromkeys(("fused", "exported", "lowered-file", "built", "deployment", "profile", "erf"), 1) | {"bench": 2}
STEPS = {"fuse": "fused", "export": "exported", "lower": "lowered-file", "build": "built"}
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)  # of reading what is not as written


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison with the float64 network: the worst image's error, its gate, the share of the allowance used."""

    name: str
    error: float
    gate: float
    share: float
    state: State


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One file of the chain and its verdict.

    Attributes:
        modules: error of each re-parameterised block alone, by name; the gate is 1e-12.
        blocks: error of each block fed the reference's input, and its limit; only after a failure.
    """

    file: str
    by: str
    bytes: int | None
    sha256: str
    state: State
    worst: float | None
    why: str
    checks: tuple[Check, ...]
    modules: Mapping[str, float]
    blocks: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run folder vouches for; the records are as their commands wrote them.

    Attributes:
        problem: what ended the deployment early, or why nothing was timed.
        code: the exit code that it ended with for that; 0 where it went on.
        wrong: whether an answer was wrong.
        failures: the rows that were lost while they were timed.
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("state",)

    name: str
    label: str
    steps: tuple[Step, ...]
    problem: str
    code: int
    wrong: bool
    commands: tuple[str, ...]
    inspection: Record | None
    accuracy: tuple[Record, ...]
    skipped: Mapping[str, str]
    bench: Record | None
    profiles: tuple[Record, ...]
    erf: Record | None

    @property
    def failures(self) -> Mapping[str, str]:
        """Return why each row that was lost was lost."""
        return self.bench["failures"] if self.bench else {}

    @property
    def state(self) -> Outcome:
        """Return the worst verdict, where a wrong answer or a moved field is a rejection; an error where it failed."""
        moved = [state_of(self.erf["apart"])] if self.erf else []
        worst = worst_of([*(s.state for s in self.steps), *moved, *(["rejected"] if self.wrong else [])])
        return "error" if worst != "rejected" and (self.code or self.failures) else worst


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Runs side by side."""

    KIND: ClassVar[str] = "report"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ("state",)

    runs: tuple[Run, ...]
    version: str = __version__

    @property
    def state(self) -> Outcome:
        """Return the worst outcome of all runs."""
        found = [run.state for run in self.runs]
        worst = worst_of(found)
        return "error" if worst != "rejected" and "error" in found else worst

    @property
    def code(self) -> int:
        """Return the exit code: that which the first failed deployment ended with."""
        failed = (run.code or Exit.UNAVAILABLE for run in self.runs if run.state == "error")
        return {"rejected": Exit.MISMATCH, "error": next(failed, Exit.OK)}.get(self.state, Exit.OK)


def worst_of(states: Sequence[str]) -> State:
    """Return the worst of some verdicts; without one nothing is verified."""
    return next((state for state in ORDER if state in states), "unverified")


def read(folders: Sequence[Path]) -> Report:
    """Read runs.

    Raises:
        ReplkError: a folder is not a run.
        IntegrityError: a file is missing, altered, damaged or of a newer version, or a verdict is not that of its
            numbers.
    """
    return Report(runs=tuple(_undamaged(Workspace.open(folder)) for folder in folders))


def _undamaged(run: Workspace) -> Run:
    try:
        return _run(run)
    except DAMAGE as exc:
        raise damaged(run.name, exc) from exc


def damaged(name: str, exc: Exception) -> IntegrityError:
    """Say that a run has a record which is not as its command wrote it."""
    return IntegrityError(f"a record of {name} is damaged: {exc!r}", "repeat replk deploy, which writes them again")


def _run(run: Workspace) -> Run:
    found: dict[str, list[Record]] = {}
    for path in sorted(run.path("results").glob("*.json")):
        kind, record = _record(path)
        found.setdefault(kind, []).append(record)
    deployed = next(iter(found.get("deployment", ())), None)
    bench = next(iter(found.get("bench", ())), None)
    if bench is not None:
        _believe(run, bench)
    if deployed is not None:
        _believe_accuracy(run, deployed)
    steps = (*_steps(run), *_rejected(run))
    if not steps:
        raise ReplkError(f"{run.folder} holds no verdict to report", "begin with: replk fuse CHECKPOINT")
    label = deployed["inspection"]["checkpoint"]["label"] if deployed else run.name
    return Run(
        name=run.name,
        label=label,
        steps=steps,
        problem=deployed["problem"] if deployed else "",
        code=deployed["code"] if deployed else 0,
        wrong=deployed["wrong"] if deployed else False,
        commands=(deployed["command"],) if deployed and deployed.get("command") else (),
        inspection=deployed["inspection"] if deployed else None,
        accuracy=tuple(deployed["accuracy"]) if deployed else (),
        skipped=deployed["bench"]["skipped"] if deployed and deployed["bench"] else {},
        bench=bench,
        profiles=tuple(found.get("profile", ())),
        erf=next(iter(found.get("erf", ())), None),
    )


def _record(path: Path) -> tuple[str, Record]:
    try:
        kind = str(json.loads(path.read_text(encoding="utf-8"))["schema"]).removeprefix("replk.").rpartition("/")[0]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise IntegrityError(
            f"{path} is not a record of replk", f"remove it, and repeat what wrote it: {path}"
        ) from exc
    return kind, records.read(path, kind, NEWEST.get(kind, 1))


def _steps(run: Workspace) -> Iterator[Step]:
    for name in reversed(run.artefacts("")):
        entry = run.entry(name)
        if entry is None or entry.by not in STEPS:
            continue
        file, path = run.take(name), run.result(name)
        kind = STEPS[entry.by]
        record = records.read(path, kind, NEWEST[kind])
        if record.get("verdict") != records.plain(entry.verdict):
            raise IntegrityError(
                f"{path} does not tell the verdict that the manifest holds",
                f"make it again: rm {file} and repeat replk {entry.by}",
            )
        yield _step(path, name, entry.by, record, sha256=entry.sha256, size=_size(file))


def _rejected(run: Workspace) -> Iterator[Step]:
    for path in sorted(run.path("rejected").rglob("*.json")):
        kind, record = _record(path)
        if kind in STEPS.values():
            by = next(command for command, k in STEPS.items() if k == kind)
            name = path.relative_to(run.path("rejected")).as_posix().removesuffix(".json")
            yield _step(path, name, by, record, sha256=record["verdict"]["content"], size=None)


def _step(path: Path, name: str, by: str, record: Record, *, sha256: str, size: int | None) -> Step:
    try:
        stated, verdict = record["proof"], record["verdict"]
        proof = _proof(stated) if stated else None
        step = Step(
            file=name,
            by=by,
            bytes=size,
            sha256=sha256,
            state=verdict["state"],
            worst=None if verdict["worst"] is None else float(verdict["worst"]),
            why=verdict["why"],
            checks=tuple(map(_check, proof.agreements)) if proof else (),
            modules=proof.modules if proof else {},
            blocks=tuple((stated.get("bisection") or {"blocks": ()})["blocks"]) if stated else (),
        )
        wrong = _contradictions(stated, proof, step) if proof else _unproved(record, step)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise IntegrityError(f"{path} is damaged: {exc}", f"make it again: replk {by}") from exc
    for said in wrong:
        raise IntegrityError(f"{path}: {said}", f"make it again: replk {by}")
    return step


def _proof(stated: Record) -> Proof:
    """Judge the rows of a record anew: only what was measured is read, each share and verdict follows from it."""
    return Proof(
        edge=stated["edge"],
        agreements=tuple(map(_agreement, stated["agreements"])),
        modules={name: float(error) for name, error in stated["modules"].items()},
        structure=tuple(stated["structure"]),
        bisection=None,
        doubt=stated["doubt"],
    )


def _agreement(stated: Record) -> Agreement:
    bound = stated["bound"]
    limits = {output: float(limit) for output, limit in bound["rel_l2"].items()}
    return Agreement(
        name=stated["name"],
        precision=stated["precision"],
        rows=tuple(_row(row, limits[row["output"]]) for row in stated["rows"]),
        bound=Bound(rel_l2=limits, eager=bound["eager"], why=bound["why"]),
        signal=float(stated["signal"]),
        noise=stated["noise"],
        undecidable=float(stated["undecidable"]),
        doubt=stated["doubt"],
    )


def _row(stated: Record, limit: float) -> Row:
    numbers = {name: float(stated[name]) for name in ("rel_l2", "max_abs", "peak")}
    share = verify.share_of(numbers["rel_l2"], numbers["peak"], limit)
    return Row(image=stated["image"], output=stated["output"], share=share, top1=stated["top1"], **numbers)


def _check(judged: Agreement) -> Check:
    gate = max(judged.bound.rel_l2.values())
    return Check(name=judged.name, error=judged.rel_l2, gate=gate, share=judged.worst, state=judged.state)


def _contradictions(stated: Record, proof: Proof, step: Step) -> Iterator[str]:
    """Name what a record claims and its rows do not."""
    for claim, found in zip(stated["agreements"], proof.agreements, strict=True):
        pairs = [(claim["rel_l2"], found.rel_l2), (claim["worst"], found.worst)]
        pairs += [(row["share"], judged.share) for row, judged in zip(claim["rows"], found.rows, strict=True)]
        for said, number in pairs:
            if not same(float(said), number):
                yield f"{found.name} says {said}, its rows say {number}"
        if claim["state"] != found.state:
            yield f"{found.name} is called {claim['state']}, its rows say {found.state}"
    for name, said in (("the proof", stated["state"]), ("the file", step.state)):
        if said != proof.state:
            yield f"{name} is called {said}, what was compared says {proof.state}"
    worst = proof.worst if math.isfinite(proof.worst) else None
    if not (step.worst is worst is None or same(step.worst, proof.worst)):
        yield f"{step.worst} of the allowance was used, its rows say {worst}"


def _unproved(record: Record, step: Step) -> Iterator[str]:
    """Refuse a verdict without a proof, unless it came with weights that needed no fusing."""
    fusion = record.get("fusion")
    if step.state != "unverified" and (fusion is None or fusion["merged"] or fusion["folded"]):
        yield f"the file is called {step.state}, and there is no proof"


def _believe(run: Workspace, bench: Record) -> None:
    """Refuse percentiles and ratios that are not those of their samples."""
    path, again = run.path("results/bench.json"), f"measure again: replk bench {run.folder}"
    try:
        for said in misquoted(bench, intervals=True):
            raise IntegrityError(f"{path}: {said}", again)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise IntegrityError(f"{path} is damaged: {exc!r}", again) from exc


def _believe_accuracy(run: Workspace, deployed: Record) -> None:
    """Refuse a share of right answers that is not that of their number, and a backend that is called wrong nowhere."""
    path, again = run.path("results/deployment.json"), "repeat replk deploy"
    for step in deployed["accuracy"]:
        if not same(step["top1"], step["correct"] / step["images"]):
            raise IntegrityError(
                f"{path}: {step['step']} says {step['top1']} right, it is {step['correct']} of {step['images']}", again
            )
    for name, stated in (deployed["bench"] or {"agreements": {}})["agreements"].items():
        judged = _agreement(stated)
        if judged.state != stated["state"]:
            raise IntegrityError(f"{path}: {name} is called {stated['state']}, its rows say {judged.state}", again)


def _size(file: Path) -> int:
    """Return the bytes of a file and of the data beside it."""
    return sum(p.stat().st_size for p in (file, file.with_name(f"{file.name}.data")) if p.is_file())
