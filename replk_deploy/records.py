"""Results as versioned JSON.

A result is a frozen dataclass with two class variables: KIND, its name in the file, and FORMAT, an
integer that grows when a field changes its meaning. Properties named in DERIVED are written too.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from replk_deploy.errors import IntegrityError, ReplkError


def live(**kwargs: Any) -> Any:
    """Mark a dataclass field that is never written, such as a model in memory."""
    return dataclasses.field(metadata={"live": True}, **kwargs)


def plain(value: Any) -> Any:
    """Return a value made of JSON's own types; non-finite numbers become text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if not f.metadata.get("live")]
        names += getattr(value, "DERIVED", ())
        head = {"schema": schema(value)} if hasattr(value, "KIND") else {}
        return head | {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def schema(value: Any) -> str:
    """Return `replk.<kind>/<format>` of a result or its class."""
    return f"replk.{value.KIND}/{value.FORMAT}"


def to_json(value: Any) -> str:
    """Return a result as indented JSON text that ends with a newline."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read(
    path: Path, kind: str, newest: int, *, remedy: str = "make it again with the command that wrote it"
) -> dict[str, Any]:
    """Read a record of ours; `remedy` is what to do about one of another kind.

    Raises:
        ReplkError: there is no such file.
        IntegrityError: not JSON, of another kind, or of a newer format than `newest`.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        name, _, digits = str(record["schema"]).rpartition("/")
        number = int(digits)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        if not path.exists():
            raise ReplkError(f"{path} does not exist", "name a record that a command wrote with --json") from exc
        raise IntegrityError(
            f"{path} is not a record of replk", "make it again with the command that wrote it"
        ) from exc
    if name != f"replk.{kind}":
        raise IntegrityError(f"{path} holds {name}, not replk.{kind}", remedy)
    if number > newest:
        raise IntegrityError(
            f"{path} has format {number}; this version reads up to {newest}", "pip install --upgrade replk-deploy"
        )
    return dict(record)
