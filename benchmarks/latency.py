"""Latency of a published variant on every runtime of this machine, beside networks of its accuracy class.

python benchmarks/latency.py [--variant RepLKNet-31B] [--size N] [--precision fp32 ...] [--batch 1 ...]
                             [--backend torch ...] [--baseline timm:NAME ...] [--lower none ...]
                             [--cuda-graph on] [--max-seconds 60] [--keep FOLDER]

Writes docs/benchmarks/latency-<device>.json, one entry per variant, size, precision, backends, batches, use of
CUDA graphs and forms, with the command that made it; others stay.
The checkpoint has random weights and BatchNorm statistics that fit the activations and are then disturbed.
All rows of one entry ran in turns in one process, each judged by float64 just before. Samples are left out
of the committed record; `replk bench --json` keeps them.
"""

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from replk_deploy import pipeline, records, sources
from replk_deploy.backends import BACKENDS, find
from replk_deploy.forms import AUTO, FORMS
from replk_deploy.models.replknet import VARIANTS
from replk_deploy.pipeline.benching import GRAPHS
from replk_deploy.precision import PRECISIONS, Precision

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "benchmarks"
BASELINES = ("timm:swin_base_patch4_window7_224", "timm:convnext_base")
COMMAND = shlex.join(["python", "benchmarks/latency.py", *sys.argv[1:]])
LEFT_OUT = ("samples_ms", "blocks", "windows", "gpu_ms", "enqueue_ms", "flags", "pace")


def told(step: str, done: int, total: int | None) -> None:
    """Say on stderr how far it is, as the whole takes minutes."""
    if done in {0, total}:
        print(f"{time.strftime('%H:%M:%S')} {step} {done}/{total or '?'}", file=sys.stderr, flush=True)


def measure(options: argparse.Namespace, precision: Precision, folder: Path) -> dict[str, Any]:
    """Take a checkpoint through the chain and time it."""
    ckpt, size = folder / f"{options.variant}.pth", (options.size, options.size)
    root = folder / f"{options.variant}-{options.size}"
    if not (root / "latest").exists():
        subprocess.run([sys.executable, "-m", "tests.networks", options.variant, str(ckpt)], cwd=ROOT, check=True)
        pipeline.fuse(ckpt, size=size, root=root, progress=told)
    backends = options.backend or sources.present(())[0]
    for ending in sorted({sources.starts_from(find(name)) for name in backends}):
        onnx = ending == ".onnx"
        if (onnx or precision != "fp32") and not list(root.glob(f"*/model.{precision}{ending}")):
            pipeline.export(onnx=onnx, precision=precision, size=size, root=root, progress=told)
    timed = pipeline.bench(
        backends=backends,
        batches=options.batch,
        baselines=options.baseline,
        precision=precision,
        cuda_graph=options.cuda_graph,
        forms=options.lower or [AUTO],
        max_seconds=options.max_seconds,
        allow_unverified=precision == "bf16",  # an ONNX file in bf16 is provisional until a runtime has judged it
        root=root,
        progress=told,
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
    parser.add_argument("--baseline", nargs="*", default=BASELINES, help="timm:NAME ...; none when empty")
    parser.add_argument("--lower", action="append", choices=FORMS)
    parser.add_argument("--cuda-graph", choices=list(GRAPHS), default="auto")
    parser.add_argument("--max-seconds", type=float, default=60.0)
    parser.add_argument("--keep", type=Path, help="folder for checkpoints and exports, so that a later call finds them")
    options = parser.parse_args()
    options.batch = options.batch or [1]
    device = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    path = FOLDER / f"latency-{device.lower()}.json"
    whole: dict[str, Any] = {"schema": "replk.benchmark-latency/1", "entries": {}}
    if path.exists():
        whole = json.loads(path.read_text())
    whole["command"] = "python benchmarks/latency.py"
    with contextlib.ExitStack() as held:
        folder = options.keep or Path(held.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for precision in options.precision or ["fp32"]:
            lower = f"lower {','.join(options.lower)}" if options.lower else ""
            asked = (*(options.backend or ["all"]), f"b{','.join(map(str, options.batch))}", options.cuda_graph, lower)
            key = " ".join((options.variant, str(options.size), precision, *filter(None, asked)))
            whole["entries"][key] = {"command": COMMAND, **measure(options, precision, folder)}
            path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            for row in whole["entries"][key]["bench"]["rows"]:
                ratio = row["ratio"]["median"]["value"] if row["ratio"] else float("nan")
                print(f"{key:36} {row['name']:50} p50 {row['p50_ms']['value']:9.3f} ms  ratio {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
