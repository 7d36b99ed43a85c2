"""The choices of a project: `replk.toml`, or `[tool.replk]` in pyproject.toml → defaults of options.

    size = 224                      # of every command that has --size
    precision = ["fp32", "fp16"]    # of every command that takes several

    [bench]                         # of one command, before the above
    backend = ["ort-cpu", "torch"]
    max-seconds = 20

Keys are names of options without dashes in front. Paths are relative to the file. The command line comes first.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replk_deploy.errors import ReplkError

FILE, SHARED = "replk.toml", "pyproject.toml"
Table = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What a command takes: the name of its parameter, its choices, and whether it repeats, is a switch, or a file."""

    parameter: str
    repeats: bool = False
    switch: bool = False
    path: bool = False
    choices: tuple[str, ...] = ()


def choices(
    folder: Path, commands: Mapping[str, Mapping[str, Option]]
) -> tuple[Path | None, dict[str, dict[str, Any]]]:
    """Return the file that speaks for a folder, and what it says, by command and parameter.

    The file is looked for in the folder and above it, up to the root of its repository.

    Args:
        folder: where the command runs.
        commands: their options, by the name without dashes.

    Raises:
        ReplkError: it is no TOML, or has a key or a value that no command takes.
    """
    path, table = _found(folder)
    if path is None:
        return None, {}
    said: dict[str, dict[str, Any]] = {}
    everywhere = {key: value for key, value in table.items() if not isinstance(value, dict)}
    known = {key for options in commands.values() for key in options}
    for key, value in everywhere.items():
        if key not in known:
            raise _unknown(path, key, key, {*known, *commands})
        having = {name: options[key] for name, options in commands.items() if key in options}
        takers = [name for name, option in having.items() if _fits(option, value)]
        if not takers:
            raise _unfit(path, key, value, next(iter(having.values())))
        for name in takers:
            option = commands[name][key]
            said.setdefault(name, {})[option.parameter] = _taken(option, value, path)
    for name, own in table.items():
        if not isinstance(own, dict):
            continue
        if name not in commands:
            raise _unknown(path, f"[{name}]", name, commands)
        for key, value in own.items():
            if key not in commands[name]:
                raise _unknown(path, f"[{name}] {key}", key, commands[name])
            option = commands[name][key]
            if not _fits(option, value):
                raise _unfit(path, f"[{name}] {key}", value, option)
            said.setdefault(name, {})[option.parameter] = _taken(option, value, path)
    return path, said


def _found(folder: Path) -> tuple[Path | None, Table]:
    for place in (folder, *folder.parents):
        own, shared = place / FILE, place / SHARED
        if own.is_file():
            return own, _read(own)
        tools = _read(shared).get("tool") if shared.is_file() else None
        if isinstance(tools, dict) and isinstance(table := tools.get("replk"), dict):
            return shared, table
        if (place / ".git").exists():
            break
    return None, {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ReplkError(f"{path} cannot be read: {exc}", "mend it, or take it away") from exc


def _fits(option: Option, value: Any) -> bool:
    if option.switch:
        return isinstance(value, bool)
    if isinstance(value, list) and not option.repeats:
        return False
    items = value if isinstance(value, list) else [value]
    return all(_is_plain(item) and (not option.choices or str(item) in option.choices) for item in items)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _taken(option: Option, value: Any, path: Path) -> Any:
    if option.switch:
        return value
    items = [str(v) for v in (value if isinstance(value, list) else [value])]
    if option.path:  # but - is stdout
        items = [v if v == "-" else str(path.parent / v) for v in items]
    return items if option.repeats else items[0]


def _unknown(path: Path, where: str, key: str, known: Iterable[str]) -> ReplkError:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.4)
    remedy = f"did you mean {near[0]}?" if near else "its keys are names of options: replk COMMAND --help"
    return ReplkError(f"{path}: nothing is called {where}", remedy)


def _unfit(path: Path, where: str, value: Any, option: Option) -> ReplkError:
    remedy = "write true or false, without quotes" if option.switch else "see replk COMMAND --help"
    if option.choices:
        remedy = f"choose from {', '.join(option.choices)}"
    return ReplkError(f"{path}: {where} = {value!r} is no value that it takes", remedy)
