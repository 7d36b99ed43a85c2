"""A run folder → what its report may say, each file checked against the manifest, each verdict against its numbers."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from replk_deploy import __version__, records
from replk_deploy.errors import IntegrityError, ReplkError
from replk_deploy.metadata import State
from replk_deploy.precision import ALGEBRA
from replk_deploy.workspace import Workspace

Record = Mapping[str, Any]
ORDER: tuple[State, ...] = ("rejected", "unverified", "provisional", "pass")
# kind of record → the newest format that is understood here
NEWEST = dict.fromkeys(("fused", "exported", "lowered-file", "built", "deployment", "profile", "erf"), 1) | {"bench": 2}
STEPS = {"fuse": "fused", "export": "exported", "lower": "lowered-file", "build": "built"}
CLOSE = 1e-9  # the same number, written and read again


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
    """What one run folder vouches for; the records are as their commands wrote them."""

    DERIVED: ClassVar[tuple[str, ...]] = ("state",)

    name: str
    label: str
    steps: tuple[Step, ...]
    problem: str
    wrong: bool
    commands: tuple[str, ...]
    inspection: Record | None
    accuracy: tuple[Record, ...]
    skipped: Mapping[str, str]
    bench: Record | None
    profiles: tuple[Record, ...]
    erf: Record | None

    @property
    def state(self) -> State:
        """Return the worst verdict; a backend that answers wrongly is a rejection, too."""
        return worst_of([*(s.state for s in self.steps), *(["rejected"] if self.wrong else [])])


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Runs side by side."""

    KIND: ClassVar[str] = "report"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ("state",)

    runs: tuple[Run, ...]
    version: str = __version__

    @property
    def state(self) -> State:
        """Return the worst verdict of all runs."""
        return worst_of([run.state for run in self.runs])


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
    return Report(runs=tuple(_run(Workspace.open(folder)) for folder in folders))


def _run(run: Workspace) -> Run:
    found: dict[str, list[Record]] = {}
    for path in sorted(run.path("results").glob("*.json")):
        kind, record = _record(path)
        found.setdefault(kind, []).append(record)
    deployed = next(iter(found.get("deployment", ())), None)
    bench = next(iter(found.get("bench", ())), None)
    if bench is not None:
        _believe(run, bench)
    steps = (*_steps(run), *_rejected(run))
    if not steps:
        raise ReplkError(f"{run.folder} holds no verdict to report", "begin with: replk fuse CHECKPOINT")
    label = deployed["inspection"]["checkpoint"]["label"] if deployed else run.name
    return Run(
        name=run.name,
        label=label,
        steps=steps,
        problem=deployed["problem"] if deployed else "",
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
        entry, path = run.entry(name), run.path(f"results/{name}.json")
        if entry is None or entry.by not in STEPS:
            continue
        file, again = run.take(name), f"make it again: rm {run.path(name)} and repeat replk {entry.by}"
        if not path.is_file():
            raise IntegrityError(f"{path} is missing", again)
        kind = STEPS[entry.by]
        record = records.read(path, kind, NEWEST[kind])
        if record.get("verdict") != records.plain(entry.verdict):
            raise IntegrityError(f"{path} does not tell the verdict that the manifest holds", again)
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
        proof, verdict = record["proof"], record["verdict"]
        checks = tuple(_check(path, judged) for judged in (proof or {"agreements": ()})["agreements"])
        modules = {n: float(e) for n, e in (proof["modules"] if proof else {}).items()}
        blocks = tuple((proof.get("bisection") or {"blocks": ()})["blocks"]) if proof else ()
        step = Step(
            file=name,
            by=by,
            bytes=size,
            sha256=sha256,
            state=verdict["state"],
            worst=None if verdict["worst"] is None else float(verdict["worst"]),
            why=verdict["why"],
            checks=checks,
            modules=modules,
            blocks=blocks,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise IntegrityError(f"{path} is damaged: {exc}", f"make it again: replk {by}") from exc
    shares = [check.share for check in checks] + [error / ALGEBRA for error in modules.values()]
    largest = max((math.inf if math.isnan(s) else s for s in shares), default=None)
    if proof and largest is not None and math.isfinite(largest) and not _same(step.worst, largest):
        raise IntegrityError(
            f"{path} says that {step.worst} of the allowance was used, its rows say {largest}",
            f"make it again: replk {by}",
        )
    if largest is not None and not largest <= 1 and step.state != "rejected":
        raise IntegrityError(f"{path} is {step.state} beyond its gate", f"make it again: replk {by}")
    return step


def _check(path: Path, judged: Record) -> Check:
    """Read a comparison; what stands for all its images must be what its rows say."""
    rows = judged["rows"]
    errors, shares = [float(r["rel_l2"]) for r in rows], [float(r["share"]) for r in rows]
    said, used = float(judged["rel_l2"]), float(judged["worst"])
    for stated, each in ((said, errors), (used, shares)):
        if rows and math.isfinite(stated) and not _same(stated, max(each)):
            raise IntegrityError(f"{path}: {judged['name']} says {stated}, its rows say {max(each)}", "make it again")
    gate = max(float(limit) for limit in judged["bound"]["rel_l2"].values())
    return Check(name=judged["name"], error=said, gate=gate, share=used, state=judged["state"])


def _believe(run: Workspace, bench: Record) -> None:
    """Refuse medians that are not those of their samples."""
    for row in bench["rows"]:
        said, found = row["p50_ms"]["value"], statistics.median(row["samples_ms"])
        if not _same(said, found):
            raise IntegrityError(
                f"{run.path('results/bench.json')}: {row['name']} says a median of {said} ms, its samples {found} ms",
                f"measure again: replk bench {run.folder}",
            )


def _same(stated: float | None, found: float) -> bool:
    return stated is not None and math.isclose(stated, found, rel_tol=CLOSE, abs_tol=1e-300)


def _size(file: Path) -> int:
    """Return the bytes of a file and of the data beside it."""
    return sum(p.stat().st_size for p in (file, file.with_name(f"{file.name}.data")) if p.is_file())
