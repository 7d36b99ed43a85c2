"""Time and memory of the commands on a full-size checkpoint, each as a process of its own.

python benchmarks/commands.py [--runs 3]      writes docs/benchmarks/commands.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from replk_deploy import machine

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {
    "replk --help": {"seconds": 0.4},
    "replk fuse --no-verify": {"seconds": 25, "peak_gb": 2.5},
    "replk fuse": {"seconds": 120},
    "replk export --onnx --no-verify": {"seconds": 60},
}
COMMANDS = {
    "replk --help": ("--help",),
    "replk fuse --no-verify": ("fuse", "31b.pth", "--no-verify", "-o", "unverified.safetensors"),
    "replk fuse": ("fuse", "31b.pth"),
    "replk export --onnx --no-verify": ("export", "--onnx", "--no-verify", "-o", "unverified.onnx"),
    "replk export --onnx": ("export", "--onnx"),
}


def run(arguments: tuple[str, ...], folder: Path) -> tuple[float, float]:
    """Run one command; return its seconds and peak memory in GB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [sys.executable, "-m", "tests.networks", "RepLKNet-31B", str(folder / "31b.pth")], cwd=ROOT, check=True
        )
        for command, arguments in COMMANDS.items():
            taken = [run(arguments, folder) for _ in range(runs)]
            seconds, peaks = zip(*taken, strict=True)
            rows[command] = {
                "seconds": [round(s, 3) for s in seconds],
                "median_s": round(statistics.median(seconds), 3),
                "peak_gb": round(max(peaks), 3),
                "limits": LIMITS.get(command, {}),
            }
            print(f"{command:34} {rows[command]['median_s']:8.2f} s {rows[command]['peak_gb']:6.2f} GB", flush=True)
    record = {
        "schema": "replk.benchmark-commands/1",
        "command": f"python benchmarks/commands.py --runs {runs}",
        "subject": "RepLKNet-31B, 224x224, training form, about 320 MB",
        "environment": machine.environment(),
        "rows": rows,
    }
    out = ROOT / "docs" / "benchmarks" / "commands.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
