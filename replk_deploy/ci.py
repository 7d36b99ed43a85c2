"""What a verdict is called in continuous integration: JUnit, annotations and a summary of GitHub.

A case is one comparison: what it is called, and why it failed. An artefact that was never compared is no case, so an
empty suite fails.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree as ET

from replk_deploy.compare import Comparison
from replk_deploy.errors import Exit, ReplkError
from replk_deploy.metadata import State
from replk_deploy.proof import Proof

COUNTS = ("tests", "failures", "errors", "skipped")
NOTHING = "nothing was compared"
UNENDED = "it has not ended: it is still at work, or it was killed, which a lack of memory may do"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison: what was found, in words, and why it failed; empty when it passed.

    An `error` is a failure that is no answer, because something stopped the question. A `doubt` says why it vouches for
    nothing, though it did not fail. The `file` is the one that it speaks of, where that is not what the command was
    asked about.
    """

    name: str
    found: str
    failure: str = ""
    error: bool = False
    file: str = ""
    doubt: str = ""

    @classmethod
    def stopped(cls, name: str, why: str) -> Self:
        """Return the case of a question that has no answer."""
        return cls(name=name, found="", failure=why, error=True)

    @classmethod
    def judged(cls, name: str, state: State, said: str, file: str = "") -> Self:
        """Return the case of a verdict."""
        why = said or state
        bad, doubt = why * (state == "rejected"), why * (state in {"provisional", "unverified"})
        return cls(name=name, found=said, failure=bad, doubt=doubt, file=file)


def of_proof(proof: Proof) -> tuple[Case, ...]:
    """Return a case for each comparison of a proof, and one for the proof itself."""
    parts = [Case.judged(f"{a.name}, {a.precision}", a.state, a.sentence) for a in proof.agreements]
    return (*parts, Case.judged(proof.edge, proof.state, proof.sentence))


def of_comparison(found: Comparison, *, require_stable: bool = False) -> tuple[Case, ...]:
    """Return a case for each row of two records of latencies."""
    wrong = {*found.regressions, *found.undecided, *(found.ambiguous if require_stable else ())}
    cases = [
        Case(
            name=row.name,
            found=(said := f"{row.word}, {row.ratio:.3f} of before"),
            failure=said if row.name in wrong else "",
        )
        for row in found.rows
    ]
    lost = found.only_in_base if found.max_regress is not None else ()
    return (*cases, *(Case(name=name, found="", failure="it is not in the new record") for name in lost))


def of_deployment(run: Mapping[str, Any]) -> tuple[Case, ...]:
    """Return a case for each file of a `replk.deployment` record and for each backend that was judged or failed."""
    cases = []
    for step in (run["fuse"], *run["exports"]):
        verdict = step["verdict"]
        said = f"{verdict['state']}: {verdict['why']}".removesuffix(": ")
        cases.append(Case.judged(step["file"].rsplit("/", 1)[-1], verdict["state"], said, step["file"]))
    for name, agreement in (run["bench"] or {"agreements": {}})["agreements"].items():
        cases.append(Case.judged(name, agreement["state"], agreement["sentence"]))
    lost = run["bench"]["bench"]["failures"] if run["bench"] else {}
    cases += [Case.stopped(name, why) for name, why in lost.items()]
    if run["problem"]:
        cases.append(ended("deploy", run["problem"], run["code"]))
    return tuple(cases)


def ended(name: str, problem: str, code: int) -> Case:
    """Return the case of what ended a deployment early, or of why nothing was timed."""
    if code == Exit.MISMATCH:
        return Case(name=name, found="", failure=problem)
    return Case.stopped(name, problem) if code else Case(name=name, found="", doubt=problem)


def junit(suite: str, cases: Sequence[Case]) -> str:
    """Write a suite as JUnit's XML, as test reporters of CI systems read it."""
    cases = cases or (Case(name=suite, found="", failure=NOTHING),)
    errors = sum(case.error for case in cases)
    failures = sum(bool(case.failure) for case in cases) - errors
    skipped = sum(bool(case.doubt) for case in cases)
    counts = {name: str(n) for name, n in zip(COUNTS, (len(cases), failures, errors, skipped), strict=True)}
    root = ET.Element("testsuites", counts)
    inside = ET.SubElement(root, "testsuite", counts, name=suite)
    for case in cases:
        found = ET.SubElement(inside, "testcase", classname=f"replk.{suite}", name=_text(case.name))
        if case.failure:
            ET.SubElement(found, "error" if case.error else "failure", message=_text(case.failure))
        elif case.doubt:
            ET.SubElement(found, "skipped", message=_text(case.doubt))
        if case.found:
            ET.SubElement(found, "system-out").text = _text(case.found)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def annotations(suite: str, cases: Sequence[Case], *, about: Path, workspace: Path) -> Iterator[str]:
    """Yield a workflow command of GitHub for each case that failed or vouches for nothing, else one notice.

    Args:
        suite: the command.
        cases: what it found.
        about: the file that it was asked about.
        workspace: from where GitHub names files.
    """
    told = [
        ("error" if case.failure else "warning", f": {case.name}", Path(case.file or about), case.failure or case.doubt)
        for case in cases
        if case.failure or case.doubt
    ]
    passed = ("notice", "", about, f"{len(cases)} comparisons passed")
    for word, name, file, text in told or [passed if cases else ("error", "", about, NOTHING)]:
        place, title = _property(_place(file, workspace)), _property(f"replk {suite}{name}")
        yield f"::{word} file={place},title={title}::{_message(text)}"


def summary(suite: str, cases: Sequence[Case]) -> str:
    """Write the table that GitHub shows on the page of a run."""
    failed = sum(bool(case.failure) for case in cases)
    doubted = sum(bool(case.doubt) for case in cases)
    passed = f"{len(cases) - doubted} passed" + f", {doubted} not proved" * bool(doubted)
    word = f"{failed} of {len(cases)} failed" if failed else passed if cases else NOTHING
    rows = "".join(
        f"| {_cell(case.name)} | {_outcome(case)} | {_cell(case.failure or case.doubt or case.found)} |\n"
        for case in cases
    )
    return f"### replk {suite}: {word}\n\n| | | |\n| --- | --- | --- |\n{rows}\n"


def _outcome(case: Case) -> str:
    return "**failed**" if case.failure else "not proved" if case.doubt else "passed"


def append(summary: Path, text: str) -> None:
    """Add to the summary of a step.

    Raises:
        ReplkError: it cannot be written.
    """
    try:
        with summary.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as exc:
        raise ReplkError(
            f"GITHUB_STEP_SUMMARY names {summary}, which cannot be written: {exc.strerror}",
            "unset it, or let it name a file in a folder that can be written",
        ) from exc


def _text(text: str) -> str:
    """Leave out what XML cannot hold."""
    return "".join(c for c in text if c.isprintable() or c in "\t\n")


def _place(file: Path, workspace: Path) -> str:
    """Name a file from the workspace where it lies inside, wherever it may link to."""
    whole, root = file.parent.resolve() / file.name, workspace.resolve()
    return (whole.relative_to(root) if whole.is_relative_to(root) else whole).as_posix()


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
