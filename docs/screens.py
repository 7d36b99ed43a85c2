"""Run every command on the demo checkpoint and keep what a terminal shows: docs/figures/screens/NAME.svg.

    python docs/screens.py

Real runs, in this order, in an empty folder; nothing is edited but the machine's own time. Wants a quiet machine.
"""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "figures" / "screens"
COLUMNS = 96
RUN = "replk-out/replknet-digits-cd3cf957"
TIMED = "--backend ort-cpu --backend openvino --batch 1 --batch 8 --max-seconds 15"
SCREENS = {
    "inspect": "digits.pth",
    "fuse": "digits.pth",
    "export": "--onnx",
    "verify": f"digits.pth {RUN}/model.fp32.onnx",
    "lower": "--lower grouped",
    "build": "--backend aoti",
    "bench": TIMED,
    "compare": f"before.json {RUN}/results/bench.json",
    "profile": "--backend ort-cpu",
    "erf": "digits.pth --data digits-test.npz",
    "deploy": "digits.pth --data digits-test.npz --backend ort-cpu --max-seconds 15",
    "report": "",
    "demo": "--max-seconds 15",
    "selftest": "",
    "doctor": "",
}
STYLE = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: {char_height}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
.{unique_id}-title {{ font: 18px sans-serif; }}
{styles}
</style>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def run(line: str, folder: Path) -> str:
    """Return what a command prints on a terminal, colours and all; its bars are left out."""
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    terminal = {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "FORCE_COLOR": "1"}
    command = [sys.executable, str(ROOT / "cli.py"), *shlex.split(line)]
    done = subprocess.run(command, cwd=folder, env=kept | terminal, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"replk {line}: {done.stderr}")
    return done.stdout


def draw(name: str, line: str, said: str) -> str:
    """Return the picture of a command and of what it said."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, _environ={})
    console.print(Text.assemble(("$ ", "dim"), (f"replk {line}".rstrip(), "bold")), soft_wrap=True)
    console.print(Text.from_ansi(said), soft_wrap=True)
    svg = console.export_svg(title=f"replk {name}", code_format=STYLE, unique_id=name)
    return re.sub(rf' clip-path="url\(#{name}-line-\d+\)"', "", svg)


def begin(folder: Path) -> None:
    """Put into a folder what the commands begin with."""
    for name in ("digits.pth", "digits-test.npz"):
        shutil.copy(ROOT / "models" / name, folder)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin(folder)
        for command, choices in SCREENS.items():
            line = f"{command} {choices}".rstrip()
            if command == "compare":
                shutil.copy(folder / RUN / "results" / "bench.json", folder / "before.json")
                run(f"bench {TIMED}", folder)
            print(line)
            (FOLDER / f"{command}.svg").write_text(draw(command, line, run(line, folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
