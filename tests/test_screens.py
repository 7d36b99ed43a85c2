"""Every command has a screen, which the pages show, and which holds what the program said and nothing of a machine."""

import re
import runpy
import socket
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import typer.main

from replk_deploy import cli, render

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(cli.app).commands
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "screens.py"))
SECTION = re.compile(r"^## (\w+)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)


def text_of(svg: str) -> list[str]:
    """Return the lines of a screen."""
    rows: dict[str, str] = {}
    for piece in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        if piece.get("textLength"):
            rows[piece.get("y", "")] = rows.get(piece.get("y", ""), "") + (piece.text or "").replace("\xa0", " ")
    return [row.rstrip() for row in rows.values()]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_each_command_has_a_screen_on_its_page(command: str) -> None:
    svg = (SCRIPT["FOLDER"] / f"{command}.svg").read_text(encoding="utf-8")
    assert len(svg.encode()) < 60_000
    first, *said = text_of(svg)
    assert first == f"$ replk {command} {SCRIPT['SCREENS'][command]}".rstrip()
    words = "|".join(map(re.escape, render.WORDS.values()))
    assert re.search(rf"^({words}) {command}\b[^┏]*\Z", "\n".join(said), re.MULTILINE)
    line = SCRIPT["SCREENS"][command].split()
    COMMANDS[command].make_context(command, line)
    for word in (str(Path.home()), "/tmp/", str(ROOT)):  # noqa: S108
        assert word not in svg
    assert not re.search(r"(?<![\w.])/\w+/", "\n".join((first, *said)))  # no absolute path of any machine
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", svg)
    assert set(re.findall(r"https?://[^\"\s<]+", svg)) == {"http://www.w3.org/2000/svg"}
    pages = dict(SECTION.findall((ROOT / "docs" / "commands.md").read_text(encoding="utf-8")))
    assert f"](figures/screens/{command}.svg)" in pages[command]


def test_there_is_no_screen_of_a_command_that_is_gone() -> None:
    assert {path.stem for path in SCRIPT["FOLDER"].iterdir()} == SCRIPT["SCREENS"].keys() == COMMANDS.keys()


def test_a_screen_is_what_the_program_says(tmp_path: Path) -> None:
    SCRIPT["begin"](tmp_path)
    drawn = SCRIPT["draw"]("inspect", "inspect digits.pth", SCRIPT["run"]("inspect digits.pth", tmp_path))
    assert text_of(drawn) == text_of((SCRIPT["FOLDER"] / "inspect.svg").read_text(encoding="utf-8"))
    assert "PASS inspect RepLKNet-digits" in "\n".join(text_of(drawn))
