"""Errors against float64 at every step, for the three published variants.

python benchmarks/errors.py [VARIANT ...] [--precision fp32 ...]

Writes docs/benchmarks/errors.json and docs/errors.md.

Variants that are not named keep their rows. Each variant is a checkpoint in the training layout with
random weights and BatchNorm statistics that fit the activations and are then disturbed; it goes
through `replk deploy` at its own size in float32, float16 and bfloat16
unless told otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from replk_deploy import machine
from replk_deploy.models.replknet import VARIANTS
from replk_deploy.precision import PRECISIONS, TOLERANCES

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "benchmarks" / "errors.json"
SHORT = ("--backend", "ort-cpu", "--max-seconds", "1", "--json", "run.json")
PAGE = ROOT / "docs" / "errors.md"


def deploy(variant: str, precisions: list[str]) -> list[dict[str, object]]:
    """Make a checkpoint, take it through the chain, and return one row per comparison."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path}
        subprocess.run(
            [sys.executable, "-m", "tests.networks", variant, str(folder / "ckpt.pth")], cwd=ROOT, check=True
        )
        options = [o for p in precisions for o in ("--precision", p)]
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), "deploy", "ckpt.pth", *options, *SHORT],
            cwd=folder,
            env=environment,
            check=False,
        )
        run = json.loads((folder / "run.json").read_text())
    print(variant, "exit", done.returncode, run["state"], flush=True)
    return [
        {
            "file": Path(step["file"]).name,
            "state": judged["name"],
            "precision": judged["precision"],
            "rel_l2": judged["rel_l2"],
            "eager": judged["bound"]["eager"].get("logits"),
            "limit": judged["bound"]["rel_l2"]["logits"],
            "worst": judged["worst"],
            "signal": judged["signal"],
            "verdict": judged["state"],
        }
        for step in (run["fuse"], *run["exports"])
        for judged in step["proof"]["agreements"]
    ]


def page(record: dict[str, Any]) -> str:
    """Write the table for readers."""
    head = "| file | state | rel. L2 | PyTorch's own | limit | share | verdict |\n|" + " --- |" * 7
    parts = [
        "# Measured errors",
        (
            "Relative L2 against the network as trained, in float64, worst image. Checkpoints have random weights and "
            "BatchNorm statistics that fit the activations and are then disturbed, which makes them harder for low "
            "precision than trained ones. `PyTorch's own` is eager PyTorch at the same precision on the same images; "
            "the limit is ten times that in fp32, three times in fp16 and bf16. A bfloat16 file is judged by its "
            "float32 twin, so its verdict is provisional."
        ),
        "Made by `python benchmarks/errors.py` from [errors.json](benchmarks/errors.json).",
    ]
    for variant in (v for v in VARIANTS if v in record["variants"]):
        lines = [head]
        for r in record["variants"][variant]["rows"]:
            eager = f"{r['eager']:.1e}" if r["eager"] else ""
            numbers = f"{r['rel_l2']:.1e} | {eager} | {r['limit']:.1e} | {r['worst']:.2f}"
            lines.append(f"| {r['file']} | {r['state']} | {numbers} | {r['verdict']} |")
        parts += [f"## {variant}", "\n".join(lines)]
        parts += [record["variants"][variant]["note"]] if "note" in record["variants"][variant] else []
    limits = ", ".join(f"{p} {TOLERANCES[p].limit:.0e}" for p in PRECISIONS)
    parts.append(f"A checkpoint on which PyTorch's own error is above these limits is refused: {limits}.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    options = parser.parse_args()
    variants, precisions = options.variants, options.precision or list(PRECISIONS)
    record: dict[str, Any] = {
        "schema": "replk.benchmark-errors/1",
        "command": "python benchmarks/errors.py",
        "variants": {},
    }
    if RECORD.exists():
        record = json.loads(RECORD.read_text())
    for variant in variants:
        record["variants"][variant] = {"rows": deploy(variant, precisions), "environment": machine.environment()}
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
