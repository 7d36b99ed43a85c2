"""`replk report`: run folders → HTML, Markdown, JUnit and JSON; all is read before anything is written."""

from collections.abc import Sequence
from pathlib import Path

from replk_deploy import ci, files
from replk_deploy.ci import Case
from replk_deploy.errors import ReplkError
from replk_deploy.report import facts, forms, sections
from replk_deploy.report.facts import Report, Run
from replk_deploy.workspace import ROOT, Workspace


def report(
    runs: Sequence[Path] = (),
    *,
    html: Path | None = None,
    markdown: Path | None = None,
    junit: Path | None = None,
    json: Path | None = None,
    root: Path = ROOT,
) -> Report:
    """Write the report of runs, by default of the latest, as `report.*` into its folder unless places are named.

    The JSON path `-` writes no file: the caller shows it.

    Raises:
        ReplkError: there is no such run, or a place cannot be written.
        IntegrityError: a file is missing, altered, damaged or of a newer version.
    """
    folders = list(runs) or [Workspace.latest(root).folder]
    doubled = [str(a) for i, a in enumerate(folders) if a.resolve() in {b.resolve() for b in folders[:i]}]
    if doubled:
        raise ReplkError(f"{doubled[0]} is named twice", "name each run once")
    found = facts.read(folders)
    texts = forms.every(found)
    if not any((html, markdown, junit, json)):
        if len(folders) > 1:
            raise ReplkError("a report of several runs belongs to none of them", "name its place: --html report.html")
        _place(texts, folders[0])
        return found
    for path, text in ((html, texts["html"]), (markdown, texts["md"]), (junit, _junit(found)), (json, texts["json"])):
        if path and str(path) != "-":
            files.write_text(path, text)
    return found


def _junit(found: Report) -> str:
    return ci.junit("report", [case for run in found.runs for case in cases(run)])


def cases(run: Run) -> tuple[Case, ...]:
    """Return a case for each comparison and each file of a run, and one for what ended it early."""
    made = []
    for step in run.steps:
        name = f"{run.name}: {step.file}"
        for check in step.checks:
            said = f"{check.error:.1e} off, gate {check.gate:.1e}, {check.share:.2f} of the allowance"
            made.append(Case.judged(f"{name}: {check.name}", check.state, said))
        made.append(Case.judged(name, step.state, f"{step.state}: {step.why}"))
    moved = sections.moved(run)
    if moved:
        made.append(Case(name=f"{run.name}: receptive field", found="", failure=moved))
    made += [Case.stopped(f"{run.name}: {name}", why) for name, why in run.failures.items()]
    if run.problem:
        made.append(ci.ended(run.name, run.problem, run.code))
    return tuple(made)


def write(found: Report, folder: Path) -> None:
    """Write all forms into a run folder."""
    _place(forms.every(found), folder)


def _place(texts: dict[str, str], folder: Path) -> None:
    for suffix, text in texts.items():
        files.write_text(folder / f"report.{suffix}", text)
