"""Completion in bash, zsh and fish: the script names the program, and what was begun is finished."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from replk_deploy import cli

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(cli.app).commands
FIRST_LINE = {
    "bash": "_replk_completion() {",
    "zsh": "#compdef replk",
    "fish": "complete --command replk ",
}


def asked(**variables: str) -> str:
    """Call the program as a shell's completion does."""
    done = CliRunner().invoke(cli.app, [], env=variables, prog_name="replk", catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def finished(shell: str, line: str) -> list[str]:
    """Return what a shell is offered for the last word of a line."""
    said = asked(
        _REPLK_COMPLETE=f"complete_{shell}",
        _TYPER_COMPLETE_ARGS=line,
        _TYPER_COMPLETE_FISH_ACTION="get-args",
        COMP_WORDS=line,
        COMP_CWORD=str(len(line.split(" ")) - 1),
    )
    if shell == "zsh":
        return re.findall(r'(?:^|\()"([^"]+)"', said, re.MULTILINE)
    return [word.partition("\t")[0] for word in said.splitlines()]


@pytest.mark.parametrize("shell", FIRST_LINE)
def test_a_shell_gets_its_script(shell: str) -> None:
    said = asked(_REPLK_COMPLETE=f"source_{shell}")
    assert said.startswith(FIRST_LINE[shell])
    assert f"_REPLK_COMPLETE=complete_{shell}" in said


@pytest.mark.parametrize("shell", FIRST_LINE)
def test_a_command_an_option_and_a_choice_are_finished(shell: str, in_empty_folder: Path) -> None:
    (in_empty_folder / "replk.toml").write_text("broken")  # a damaged file of the project is no matter of completion
    assert finished(shell, "replk fu") == ["fuse"]
    assert sorted(finished(shell, "replk ")) == sorted(COMMANDS)
    assert finished(shell, "replk bench --cuda-graph o") == ["on", "off"]
    assert finished(shell, "replk export --on") == ["--onnx"]


def test_bash_itself_finishes_a_command(tmp_path: Path) -> None:
    program = tmp_path / "replk"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "cli.py"}" "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(_REPLK_COMPLETE=source_bash replk)"; COMP_WORDS=(replk fu); COMP_CWORD=1;'
        ' _replk_completion replk; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "fuse\n", done.stderr
