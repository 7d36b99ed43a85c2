"""`replk compare`: two bench records, or two folders of them → the same, faster, slower or ambiguous."""

from collections.abc import Sequence
from pathlib import Path

from replk_deploy import compare as comparing
from replk_deploy.compare import Comparison
from replk_deploy.errors import ReplkError


def compare(base: Path, new: Path, *, max_regress: float | None = None) -> Comparison:
    """Compare two sides row by row, each a bench record or a folder with one record per process.

    Raises:
        ReplkError: a folder without records, or sides that are not comparable.
        IntegrityError: a file is no bench record.
    """
    return comparing.compare(_records(base), _records(new), max_regress=max_regress)


def _records(side: Path) -> Sequence[Path]:
    if not side.is_dir():
        return [side]
    found = sorted(side.glob("*.json"))
    if not found:
        raise ReplkError(f"{side} holds no .json file", "write records into it: replk bench --json FOLDER/1.json")
    return found
