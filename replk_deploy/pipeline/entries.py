"""What a step leaves in a run: its file, its record, its line in the manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from replk_deploy import files, records
from replk_deploy.errors import ReplkError
from replk_deploy.workspace import Workspace


def spare(source: Path, output: Path) -> None:
    """Refuse to write a result over what it is made from."""
    if output.exists() and output.samefile(source):
        raise ReplkError(f"{output} is the file to start from", "name another file with -o")


def spare_runs(output: Path) -> None:
    """Refuse a place that was asked for where it would replace what a run vouches for."""
    for folder in output.absolute().parents[:2]:  # engines lie one folder down
        name = output.absolute().relative_to(folder).as_posix()
        if (folder / "manifest.json").is_file() and Workspace.open(folder).entry(name):
            raise ReplkError(f"{output} belongs to the run {folder.name}", "leave out -o, or name another file")


def enter(
    run: Workspace,
    name: str,
    made: Any,
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
        for outdated in (name, f"{name}.json"):  # what was rejected under this name is answered
            run.path(f"rejected/{outdated}").unlink(missing_ok=True)
        run.record(name, made_from=made_from, by=by, options=options, verdict=made.verdict)
    run.make_latest()


def result(run: Workspace, name: str, kind: str) -> Mapping[str, Any]:
    """Read back what a step of this run said."""
    return records.read(run.result(name), kind, 1)
