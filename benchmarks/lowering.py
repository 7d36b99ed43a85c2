"""A whole network with its large convolutions in chosen forms, each form timed alone in one process.

python benchmarks/lowering.py VARIANT SIZE --batch N ... --backend B ... --precision P
                              --forms none --forms grouped,grouped,dense,dense [--channel-major]

Writes docs/benchmarks/lowering-<device>.json; other entries stay. FORMS is one name for all stages, or one a
stage. SIZE is N or HxW; one that is not square takes the backbone with its four maps. Weights are random. On
a GPU each row replays a CUDA graph, inferences queued. Rows follow each other and are not interleaved, so
differences below a few percent mean nothing; `benchmarks/latency.py` races them.
"""

import argparse
import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from replk_deploy import calibrate, export, lower, machine, options, proof, weights
from replk_deploy.backends import BACKENDS, find
from replk_deploy.backends.base import Settings
from replk_deploy.batch import DYNAMIC
from replk_deploy.errors import ReplkError
from replk_deploy.lowerings.base import LargeConv
from replk_deploy.metadata import Metadata
from replk_deploy.models.base import Network
from replk_deploy.models.replknet import VARIANTS, RepLKNet
from replk_deploy.poison import randomise
from replk_deploy.precision import PRECISIONS
from replk_deploy.preprocess import Preprocessing

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
HALF = (0.5, 0.5, 0.5)


def chooser(forms: str) -> Callable[[LargeConv], str]:
    """Return the form of each convolution, by the stage in its name."""
    names = forms.split(",")
    return lambda site: names[int(site.name.split(".")[1])] if len(names) > 1 else names[0]


def artefact(network: Network, options: argparse.Namespace, forms: str, folder: Path) -> tuple[Path, Settings]:
    """Write what a backend opens, and say how."""
    graphed, choose = torch.cuda.is_available(), chooser(forms)
    if options.kind.takes == "onnx":
        portable, lowered = folder / "portable.onnx", folder / f"{forms}.onnx"
        if not portable.exists():
            export.export(network, portable, precision=options.precision, size=options.sides, batch=DYNAMIC, embed=None)
        lower.lower_graph(portable, lowered, choose, channel_major=options.channel_major)
        return lowered, Settings(cuda_graph=graphed)
    path = folder / "weights.safetensors"
    metadata = Metadata(
        family="replknet",
        form="folded",
        geometry=network.describe(),
        label=options.variant,
        precision=options.precision,
        preprocessing=Preprocessing(
            size=options.sides, mean=HALF, std=HALF, resize="warp", crop_pct=1.0, said_by="user"
        ),
        source_sha256=weights.content_hash(network),
        source_name="random",
    )
    weights.write(path, proof.cast(network, options.precision), metadata)
    chosen = tuple((site.name, choose(site)) for site in lower.find_network(network, options.sides))
    return path, Settings(cuda_graph=graphed, forms=() if forms == "none" else chosen)


def measure(network: Network, options: argparse.Namespace, forms: str, batch: int, folder: Path) -> dict[str, Any]:
    """Return one row."""
    images = np.random.default_rng(0).standard_normal((batch, 3, *options.sides), np.float32)
    row: dict[str, Any] = {"variant": options.variant, "size": options.size, "precision": options.precision}
    row |= {"backend": options.kind.name, "batch": batch, "forms": forms, "channel_major": options.channel_major}
    try:
        path, settings = artefact(network, options, forms, folder)
        with options.kind(path, settings) as backend:
            launch = backend.prepare(images)
            row["ms"] = calibrate.stretch_ms(launch, queue=backend.device == "cuda")
            row["layout"] = backend.facts.get("layout")
    except ReplkError as exc:
        row["failed"] = exc.problem
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("size")
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--backend", action="append", choices=list(BACKENDS), required=True)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument("--forms", action="append")
    parser.add_argument("--channel-major", action="store_true")
    asked = parser.parse_args()
    asked.sides = options.size_of(asked.size)
    geometry = VARIANTS[asked.variant]
    if asked.sides[0] != asked.sides[1]:
        geometry = dataclasses.replace(geometry, classes=None, out_indices=(0, 1, 2, 3))
    network = randomise(RepLKNet.build(geometry, "folded"))
    device = torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"
    path = FOLDER / f"lowering-{device}.json"
    whole: dict[str, Any] = {"schema": "replk.benchmark-lowering/1", "command": "python benchmarks/lowering.py"}
    whole |= json.loads(path.read_text()) if path.exists() else {"rows": []}
    whole["environment"] = machine.environment()
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        for name in asked.backend:
            asked.kind = find(name)
            for batch in asked.batch or [1]:
                for forms in asked.forms or ["none"]:
                    row = measure(network, asked, forms, batch, folder)
                    alike = {k: v for k, v in row.items() if k not in {"ms", "layout", "failed"}}
                    whole["rows"] = [r for r in whole["rows"] if alike.items() - r.items()] + [row]
                    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
                    print(*(f"{k}={v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
