"""`replk report`: run folders → HTML, Markdown and JSON; all is read before anything is written."""

from collections.abc import Sequence
from pathlib import Path

from replk_deploy import files
from replk_deploy.errors import ReplkError
from replk_deploy.report import facts, forms
from replk_deploy.report.facts import Report
from replk_deploy.workspace import ROOT, Workspace


def report(
    runs: Sequence[Path] = (),
    *,
    html: Path | None = None,
    markdown: Path | None = None,
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
    if html is None and markdown is None and json is None:
        if len(folders) > 1:
            raise ReplkError("a report of several runs belongs to none of them", "name its place: --html report.html")
        write(found, folders[0])
        return found
    texts = [(html, forms.html), (markdown, forms.markdown), (json, forms.as_json)]
    for path, text in [(path, form(found)) for path, form in texts if path and str(path) != "-"]:
        files.write_text(path, text)
    return found


def write(found: Report, folder: Path) -> None:
    """Write all forms into a run folder."""
    texts = {"json": forms.as_json(found), "md": forms.markdown(found), "html": forms.html(found)}
    for suffix, text in texts.items():
        files.write_text(folder / f"report.{suffix}", text)
