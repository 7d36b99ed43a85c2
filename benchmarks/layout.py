"""Memory layout of CPU references: planes (NCHW) or channels last, whole 31B and its large layers alone.

python benchmarks/layout.py [--rounds 5]      writes docs/benchmarks/layout.json

The two layouts take turns within each round; the ratio is the median over rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from replk_deploy import machine
from replk_deploy.fuse import fuse
from replk_deploy.models.replknet import VARIANTS, RepLKNet
from replk_deploy.poison import poison, randomise
from replk_deploy.proof import cast

LAYERS = ((128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13))
LAYOUTS = {"planes": torch.contiguous_format, "channels_last": torch.channels_last}


def race(model: Callable[[Tensor], object], image: Tensor, rounds: int) -> dict[str, object]:
    """Time both layouts in turns; return the seconds of each round and the ratio of the medians' rounds."""
    times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, layout in LAYOUTS.items():
                x = image.to(memory_format=layout, copy=True)
                start = time.perf_counter()
                model(x)
                if turn:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
    ratios = [p / c for p, c in zip(times["planes"], times["channels_last"], strict=True)]
    return {"planes_over_channels_last": round(statistics.median(ratios), 3), "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    trained = poison(randomise(RepLKNet.build(VARIANTS["RepLKNet-31B"], "training")))
    rows = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(dtype)
        for form, network in (("training", trained), ("folded", fuse(trained).model)):
            rows[f"31B {form} {kind}"] = race(cast(network, dtype), image, rounds)
        for channels, side, kernel in LAYERS:
            layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels).to(dtype)
            x = torch.randn(1, channels, side, side).to(dtype)
            rows[f"layer {channels}x{side}x{side} K{kernel} {kind}"] = race(layer, x, rounds)
    for name, row in rows.items():
        print(f"{name:34} planes / channels last {row['planes_over_channels_last']:8.2f}")
    record = {
        "schema": "replk.benchmark-layout/1",
        "command": f"python benchmarks/layout.py --rounds {rounds}",
        "environment": machine.environment(),
        "rows": rows,
    }
    out = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "layout.json"
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
