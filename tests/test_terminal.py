"""Each command on a terminal and in a pipe: the verdict comes last, no line is too wide, and no word is lost."""

import dataclasses
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from typer.testing import CliRunner, Result

from replk_deploy import cli, doctor, pipeline, render, selftest
from replk_deploy.models.replknet import RepLKGeometry
from replk_deploy.pipeline import demonstrating
from tests import networks

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(cli.app).commands
TINY = RepLKGeometry(
    channels=(4, 6), depths=(1, 1), kernels=(13, 7), small=3, dw_channels=(4, 6), ffn_channels=(8, 12), classes=10
)
CASES = {
    "inspect": "digits.pth",
    "fuse": "digits.pth -o fused.safetensors",
    "export": "--onnx --precision fp16",
    "lower": "",
    "verify": "digits.pth RUN/model.fp32.onnx",
    "build": "--backend trt-rtx",
    "bench": "--backend ort-cpu --backend torch --max-seconds 0.01",
    "compare": "RUN/results/bench.json RUN/results/bench.json",
    "profile": "--backend ort-cpu --repeats 3",
    "doctor": "",
    "erf": "digits.pth --images 1",
    "report": "",
    "deploy": "digits.pth --backend ort-cpu --max-seconds 0.01 --size 32",
    "demo": "--max-seconds 0.01",
    "selftest": "",
}
FRAME = re.compile(r"[\s─━│┃┏┳┓┡╇┩├┼┤└┴┘]")
VERDICT = re.compile(rf"^({'|'.join(map(re.escape, render.WORDS.values()))}) (.*)\Z", re.DOTALL | re.MULTILINE)
XTERM = {"TERM": "xterm-256color"}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a few pictures and a run; never change it."""
    folder = tmp_path_factory.mktemp("deployed")
    networks.save_as_trained(networks.trained(TINY, size=32), folder / "digits.pth", input_size=32)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "digits-test.npz", images=pictures, labels=np.arange(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        networks.shorten_timing(patch)
        pipeline.deploy(Path("digits.pth"), backends=("ort-cpu",), max_seconds=0.01)
    return folder


@pytest.fixture
def folder(deployed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and the current one."""
    monkeypatch.chdir(shutil.copytree(deployed, tmp_path / "work"))
    return tmp_path / "work"


@pytest.fixture
def shortened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long is done once, in a test on one runtime; a self-test meets the bug that needs most words."""
    networks.shorten_timing(monkeypatch)
    monkeypatch.setattr(demonstrating, "SAMPLES", folder)
    monkeypatch.setattr(
        demonstrating, "deploy", lambda path, **said: pipeline.deploy(path, **said, backends=("ort-cpu",))
    )
    honest, bug = selftest.caught, "channels of the input reversed"
    wordy = once(lambda: honest(bug, selftest.BUGS[bug]))
    monkeypatch.setattr(selftest, "caught", lambda name, _plant: dataclasses.replace(wordy(), bug=name))
    for name in CASES:
        home: Any = {"doctor": doctor, "selftest": selftest}.get(name, pipeline)
        monkeypatch.setattr(home, name, once(getattr(home, name)))


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function the first time; then give what it gave."""
    kept: list[Any] = []

    def call(*args: Any, **named: Any) -> Any:
        if not kept:
            kept.append(function(*args, **named))
        return kept[0]

    return call


def typed(command: str, variables: dict[str, str], *, terminal: bool) -> Result:
    """Run a command on a terminal or in a pipe that knows these environment variables."""
    run = next(Path("replk-out").glob("*/manifest.json")).parent.as_posix()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "out", render.console(variables, terminal=terminal))
        patch.setattr(render, "err", render.console(variables, terminal=terminal, stderr=True))
        line = [command, *CASES[command].replace("RUN", run).split()]
        done = CliRunner().invoke(cli.app, line, prog_name="replk", catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def verdict(text: str) -> str:
    """Return the verdict with which a text ends, however its lines are broken."""
    found = VERDICT.search(text.rstrip("\n"))
    assert found, text
    return found[0]


def letters(text: str) -> Counter[str]:
    return Counter("".join(FRAME.sub(" ", text).split()))


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_verdict_comes_last_no_width_loses_a_word_and_colour_is_for_terminals(command: str) -> None:
    wide = typed(command, {"COLUMNS": "1000"}, terminal=False).stdout
    pipe = typed(command, XTERM, terminal=False)
    last = pipe.stdout.splitlines()[-1]
    assert verdict(pipe.stdout) == last
    assert re.match(rf"[A-Za-z ()]+ {command}\b", last)
    assert set(FRAME.sub(" ", wide).split()) == set(FRAME.sub(" ", pipe.stdout).split()), "a pipe folds no word"
    assert "\x1b" not in pipe.stdout + pipe.stderr
    for columns in (60, 100):
        done = typed(command, XTERM | {"COLUMNS": str(columns), "NO_COLOR": "1"}, terminal=True)
        assert max(map(len, (done.stdout + done.stderr).splitlines())) <= columns
        assert "".join(verdict(done.stdout).split()) == "".join(last.split())
        assert letters(done.stdout) == letters(wide)
        assert "\x1b" not in done.stdout + done.stderr
    assert "\x1b[" in typed(command, XTERM, terminal=True).stdout


@pytest.mark.usefixtures("folder")
def test_the_verdict_of_a_report_names_the_page() -> None:
    place = Path(typed("report", {}, terminal=False).stdout.split()[-1])
    assert place.name == "report.html"
    assert place.is_file()


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_real_terminal_is_asked_for_its_width(folder: Path, no_color: str, coloured: bool) -> None:  # noqa: FBT001
    above, below = pty.openpty()
    termios.tcsetwinsize(below, (24, 60))
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(
        [sys.executable, ROOT / "cli.py", "inspect", "digits.pth"],
        cwd=folder,
        env=kept | XTERM | {"NO_COLOR": no_color},
        stdin=below,
        stdout=below,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    os.close(below)
    text = ""
    with suppress(OSError), open(above, encoding="utf-8", newline="") as screen:  # noqa: PTH123  # a descriptor
        while line := screen.readline():
            text += line
    assert done.returncode == 0, done.stderr
    assert ("\x1b[" in text) == coloured
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= 60
    assert verdict("\n".join(lines)).startswith("PASS inspect RepLKNet-test")
