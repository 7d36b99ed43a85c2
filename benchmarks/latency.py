"""Latency of a published variant on every runtime of this machine, beside networks of its accuracy class.

python benchmarks/latency.py [--variant RepLKNet-31B] [--size N] [--precision fp32 ...] [--batch 1 ...]
                             [--backend torch ...] [--baseline timm:NAME ...] [--max-seconds 60]

Writes docs/benchmarks/latency-<device>.json, one entry per variant, size and precision; other entries stay.
The checkpoint has random weights and BatchNorm statistics that fit the activations and are then disturbed.
All rows of one entry ran in turns in one process, each judged by float64 just before. Samples are left out
of the committed record; `replk bench --json` keeps them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from replk_deploy import pipeline, records, sources
from replk_deploy.backends import BACKENDS
from replk_deploy.models.replknet import VARIANTS
from replk_deploy.precision import PRECISIONS, Precision

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "benchmarks"
BASELINES = ("timm:swin_base_patch4_window7_224", "timm:convnext_base")
LEFT_OUT = ("samples_ms", "blocks", "windows", "gpu_ms", "enqueue_ms", "flags", "pace")


def measure(options: argparse.Namespace, precision: Precision, folder: Path) -> dict[str, Any]:
    """Take a checkpoint through the chain and time it."""
    root, size = folder / "replk-out", (options.size, options.size)
    if not (root / "latest").exists():
        ckpt = folder / "ckpt.pth"
        subprocess.run([sys.executable, "-m", "tests.networks", options.variant, str(ckpt)], cwd=ROOT, check=True)
        pipeline.fuse(ckpt, size=size, root=root)
    for onnx in (True, False):
        if onnx or precision != "fp32":
            pipeline.export(onnx=onnx, precision=precision, size=size, root=root)
    backends = options.backend or sources.present(())[0]
    timed = pipeline.bench(
        backends=backends,
        batches=options.batch,
        baselines=options.baseline,
        precision=precision,
        max_seconds=options.max_seconds,
        allow_unverified=precision == "bf16",  # an ONNX file in bf16 is provisional until a runtime has judged it
        root=root,
    )
    record: dict[str, Any] = records.plain(timed)
    for row in record["bench"]["rows"]:
        for name in LEFT_OUT:
            row.pop(name)
        row["warmup"].pop("curve_ms")
    record["bench"].pop("gpu")
    record["agreements"] = {name: a["sentence"] for name, a in record["agreements"].items()}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=list(VARIANTS), default="RepLKNet-31B")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--backend", action="append", choices=list(BACKENDS))
    parser.add_argument("--baseline", action="append")
    parser.add_argument("--max-seconds", type=float, default=60.0)
    options = parser.parse_args()
    options.batch, options.baseline = options.batch or [1], options.baseline or BASELINES
    device = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    path = FOLDER / f"latency-{device.lower()}.json"
    whole: dict[str, Any] = {"schema": "replk.benchmark-latency/1", "entries": {}}
    if path.exists():
        whole = json.loads(path.read_text())
    whole["command"] = "python benchmarks/latency.py"
    with tempfile.TemporaryDirectory() as folder:
        for precision in options.precision or ["fp32"]:
            key = f"{options.variant} {options.size} {precision}"
            whole["entries"][key] = measure(options, precision, Path(folder))
            path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            for row in whole["entries"][key]["bench"]["rows"]:
                ratio = row["ratio"]["median"]["value"] if row["ratio"] else float("nan")
                print(f"{key:32} {row['name']:50} p50 {row['p50_ms']['value']:9.3f} ms  ratio {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
