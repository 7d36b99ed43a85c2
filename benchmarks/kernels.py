"""The kernels of this package against PyTorch's own, on one GPU.

python benchmarks/kernels.py [--part rates --part layers --part stack --part backbone]

Writes docs/benchmarks/kernels-<device>.json; parts that are not asked for stay as they were. `rates`: what
mma.sync reaches. `layers`: the 24 large depthwise layers of RepLKNet-31B at 224 in float16, one by one and
together. `stack`: 24 layers of 384 channels and a 31x31 filter, batch 64, as in Table 1 of the RepLKNet paper.
`backbone`: RepLKNet-31B with its four feature maps, batch 1.

All that is compared runs in turns, each in CUDA graphs over rotating inputs; times are the median of the rounds,
ratios the median of the ratios of each round. Errors are relative L2 against float64 on two fresh images.
"""

import argparse
import ctypes
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from replk_deploy import machine, optional, roofline
from replk_deploy.backends import cuda
from replk_deploy.kernels import nvrtc, op
from replk_deploy.kernels.launch import Activation
from replk_deploy.kernels.network import ChannelMajor
from replk_deploy.kernels.tuning import captured, replayed_ms
from replk_deploy.models.replknet import VARIANTS, RepLKNet
from replk_deploy.poison import randomise
from replk_deploy.preprocess import Preprocessing

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
ROUNDS, ROTATE, STRETCH_MS = 11, 4, 20.0
STAGES = ((128, 56, 31, 2), (256, 28, 29, 2), (512, 14, 27, 18), (1024, 7, 13, 2))  # channels, map, kernel, layers
CHANNELS, KERNEL, DEPTH, BATCH = 384, 31, 24, 64  # of the paper's Table 1
HALF = (0.5, 0.5, 0.5)
PRODUCT_FLOP = {1: 16 * 8 * 16 * 2, 0: 16 * 8 * 8 * 2}
Run = Callable[[], object]
WAYS = {"torch": "theirs", "ours": "ours", "ours_in_network": "inside"}


def race(runs: Mapping[str, Run], calls: int = 1) -> dict[str, Any]:
    """Time runs in turns; a run does its work `calls` times. The first is what the others' ratios are of."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, run in runs.items():
        with torch.inference_mode():
            once = captured(run, 1)
            replayed_ms(once)
            repeats = max(1, min(200, round(STRETCH_MS / replayed_ms(once))))
            graphs[name] = (captured(run, repeats), repeats * calls)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS):
        for name in list(graphs)[:: 1 if turn % 2 else -1]:
            graph, count = graphs[name]
            replayed_ms(graph)
            times[name].append(replayed_ms(graph) / count)
    first = next(iter(runs))
    return {
        name: {
            "ms": statistics.median(found),
            "spread": (max(found) - min(found)) / statistics.median(found),
            "ratio": statistics.median(a / b for a, b in zip(times[first], found, strict=True)),
        }
        for name, found in times.items()
    }


class Layer:
    """One large depthwise convolution with bias and ReLU, on rotating channel-major inputs."""

    def __init__(self, channels: int, side: int, kernel: int, batch: int, dtype: torch.dtype) -> None:
        rng = torch.Generator("cuda").manual_seed(channels + side + batch)
        self.weight = torch.randn(channels, 1, kernel, kernel, generator=rng, device="cuda").div_(kernel).to(dtype)
        self.bias = torch.randn(channels, generator=rng, device="cuda").to(dtype)
        shape = (channels, batch, side, side)
        self.planes = [torch.randn(*shape, generator=rng, device="cuda").to(dtype) for _ in range(ROTATE)]
        self.answer = torch.empty_like(self.planes[0]).transpose(0, 1)
        self.images = [x.transpose(0, 1).contiguous() for x in self.planes]
        self.moved_bytes = 2 * self.planes[0].nbytes + self.weight.nbytes
        reach = [min(i, kernel // 2) + min(side - 1 - i, kernel // 2) + 1 for i in range(side)]
        self.macs = batch * channels * sum(reach) ** 2

    def ours(self, turn: int) -> Tensor:
        """Run our kernel on one of the inputs."""
        return op.large_depthwise_conv2d(self.planes[turn % ROTATE].transpose(0, 1), self.weight, self.bias, "relu")

    def inside(self, turn: int) -> None:
        """Run our kernel as a network does: what it writes is planned, the weights are fetched ahead."""
        x = self.planes[turn % ROTATE].transpose(0, 1)
        op.convolve(x, self.weight, self.bias, "relu", self.answer, ahead=True)

    def theirs(self, turn: int) -> Tensor:
        """Run PyTorch's kernels on one of the inputs."""
        x = self.images[turn % ROTATE]
        return functional.relu(functional.conv2d(x, self.weight, self.bias, padding="same", groups=x.shape[1]))

    def errors(self) -> dict[str, float]:
        """Compare both with float64."""
        two = self.images[0][:2]
        exact = functional.relu(
            functional.conv2d(
                two.double(), self.weight.double(), self.bias.double(), padding="same", groups=two.shape[1]
            )
        )
        own: Activation = "relu"
        answers = {
            "ours": op.large_depthwise_conv2d(two, self.weight, self.bias, own),
            "torch": functional.relu(
                functional.conv2d(two, self.weight, self.bias, padding="same", groups=two.shape[1])
            ),
        }
        return {name: float((y.double() - exact).norm() / exact.norm()) for name, y in answers.items()}


def in_turn(layers: Sequence[Layer], name: str) -> Run:
    """Run all layers, each on all its inputs in turn."""
    return lambda: [getattr(layer, name)(turn) for turn in range(ROTATE) for layer in layers]


def rates() -> list[dict[str, Any]]:
    """Measure what mma.sync reaches, in 10^12 operations a second."""
    core: Any = optional.load("cuda.core", package="cuda-core", install=nvrtc.EXTRA)
    device = core.Device(0)
    device.set_current()
    blocks, threads, rounds, chains = 2 * nvrtc.limits()[0], 256, 4096, 16
    out, rows = torch.empty(blocks * threads, device="cuda"), []
    for wide in (1, 0):
        for feed in (0, 1):
            options = core.ProgramOptions(
                arch="sm_{}{}".format(*torch.cuda.get_device_capability()),
                std="c++17",
                define_macro=[("WIDE", str(wide)), ("FEED", str(feed)), ("CHAINS", str(chains))],
            )
            source = Path(__file__).with_name("rates.cu").read_text()
            kernel = core.Program(source, "c++", options).compile("cubin").get_kernel("rates")
            found = []
            for _ in range(ROUNDS):
                stream = core.Stream.from_handle(torch.cuda.current_stream().cuda_stream)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start.record()
                config = core.LaunchConfig(grid=blocks, block=threads)
                core.launch(stream, config, kernel, out.data_ptr(), ctypes.c_longlong(rounds))
                end.record()
                end.synchronize()
                found.append(start.elapsed_time(end))
            flop = blocks * threads // 32 * rounds * chains * PRODUCT_FLOP[wide]
            rows.append(
                {
                    "instruction": "m16n8k16" if wide else "m16n8k8",
                    "ldmatrix": "one for four products" if feed else "none",
                    "tflops": flop / statistics.median(found) / 1e9,
                }
            )
    return rows


def layers() -> list[dict[str, Any]]:
    """Race the large layers of RepLKNet-31B, one by one and together."""
    limits, rows = roofline.measure("fp16", device="cuda"), []
    for batch in (1, 8, 64):
        whole = []
        for channels, side, kernel, count in STAGES:
            layer = Layer(channels, side, kernel, batch, torch.float16)
            whole += [layer] * count
            raced = race({name: in_turn([layer], way) for name, way in WAYS.items()}, ROTATE)
            floor = layer.moved_bytes / limits.copy_gbps / 1e6
            rows.append(
                {
                    "layer": f"{channels} channels, {side}x{side}, {kernel}x{kernel}",
                    "batch": batch,
                    "layers": count,
                    "moved_bytes": layer.moved_bytes,
                    "macs_in_bounds": layer.macs,
                    "bandwidth_floor_ms": floor,
                    "copy_gbps": limits.copy_gbps,
                    "matrix_gflops": limits.matrix_gflops,
                    "in_bounds_tflops": 2 * layer.macs / raced["ours"]["ms"] / 1e9,
                    "errors": layer.errors(),
                    **raced,
                }
            )
        raced = race({name: in_turn(whole, way) for name, way in WAYS.items()}, ROTATE)
        floor = sum(row["bandwidth_floor_ms"] * row["layers"] for row in rows if row["batch"] == batch)
        rows.append({"layer": "all 24", "batch": batch, "bandwidth_floor_ms": floor, **raced})
    return rows


def stack() -> list[dict[str, Any]]:
    """Race the stack of the paper's Table 1; in float32 also where TF32 is allowed, which PyTorch has no use for."""
    rows = []
    for dtype, tf32 in ((torch.float16, False), (torch.float32, False), (torch.float32, True)):
        for side in (16, 32, 64):
            with cuda.arithmetic(tf32=tf32):
                layer = Layer(CHANNELS, side, KERNEL, BATCH, dtype)
                raced = race({"torch": in_turn([layer], "theirs"), "ours": in_turn([layer], "ours")}, ROTATE)
                errors = layer.errors()
            for found in raced.values():
                found["ms"] *= DEPTH
            name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
            rows.append({"precision": name, "map": side, "layers": DEPTH, "errors": errors, **raced})
            del layer
            torch.cuda.empty_cache()
    return rows


def backbone() -> list[dict[str, Any]]:
    """Race the network with its four feature maps, at the sizes of segmentation and detection."""
    rows: list[dict[str, Any]] = []
    geometry = dataclasses.replace(VARIANTS["RepLKNet-31B"], classes=None, out_indices=(0, 1, 2, 3))

    def network() -> RepLKNet:
        built = randomise(RepLKNet.build(geometry, "folded"))
        assert isinstance(built, RepLKNet)
        return built.half().cuda().eval()

    rules = Preprocessing(size=(512, 2048), mean=HALF, std=HALF, resize="warp", crop_pct=1.0, said_by="user")
    stock, own = network(), ChannelMajor(network(), rules).cuda().eval()
    compiled = torch.compile(stock, dynamic=False)
    for size in ((512, 2048), (800, 1280)):
        images = [torch.randn(1, 3, *size, device="cuda").half() for _ in range(ROTATE)]

        def runner(model: Callable[[Tensor], Any], images: list[Tensor] = images) -> Run:
            return lambda: [model(x) for x in images]

        raced = race({"torch": runner(stock), "torch-compile": runner(compiled), "ours": runner(own)}, ROTATE)
        rows.append({"size": list(size), "batch": 1, "dtype": "float16", **raced})
    return rows


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "rates": rates,
    "layers": layers,
    "stack": stack,
    "backbone": backbone,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS)
    options = parser.parse_args()
    device = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = FOLDER / f"kernels-{device}.json"
    whole: dict[str, Any] = {"schema": "replk.benchmark-kernels/1", "command": "python benchmarks/kernels.py"}
    whole |= json.loads(path.read_text()) if path.exists() else {"parts": {}}
    whole["environment"] = machine.environment()
    for name in options.part or PARTS:
        start = time.perf_counter()
        whole["parts"][name] = PARTS[name]()
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for row in whole["parts"][name]:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
