"""Kernels meet the nodes that launched them, in recorded events; clocks that disagree are noticed."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from replk_deploy.backends import ort_kernels
from replk_deploy.backends.ort_kernels import Execution, Kernel, attributed, kernels_of
from replk_deploy.errors import UnavailableError

EPOCH, RUNS = 1_790_857_026_000_000_000, 5
LAYERS = {  # name → operator and kernels with their ms
    "shape": ("Shape", {}),
    "stem/Conv": ("Conv", {"pad": 0.01, "implicit": 0.3}),
    "big/Conv": ("FusedConv", {"nchwToNhwc": 0.02, "depthwise": 4.0}),
    "gelu": ("Gelu", {"gelu": 0.1}),
    "small/Conv": ("Conv", {"implicit": 0.2}),
    "head/Gemm": ("Gemm", {"gemm": 0.15}),
}


@dataclass
class Recording:
    nodes: list[list[Execution]]
    kernels: list[Kernel]

    def shifted(self, ns: int) -> "Recording":
        moved = [k._replace(launch_ns=k.launch_ns + ns, launched_ns=k.launched_ns + ns) for k in self.kernels]
        return dataclasses.replace(self, kernels=moved)


def record(seed: int = 0) -> Recording:
    """Record runs whose host works on nodes of 15 to 40 µs, launches of 4 to 8 µs in them, in odd nanoseconds."""
    rng = np.random.default_rng(seed)
    nodes: dict[str, list[Execution]] = {name: [] for name in LAYERS}
    kernels, now = [], EPOCH + 123

    def pass_us(low: float, high: float) -> int:
        nonlocal now
        now += int(1000 * rng.uniform(low, high))
        return now

    for run in range(RUNS):
        pass_us(100, 200)
        for name, (kind, work) in LAYERS.items():
            start = pass_us(0.5, 1.5)
            pass_us(3, 12)
            for kernel, ms in work.items():
                launch, launched = now, pass_us(4, 8)
                kernels.append(Kernel(kernel, launch, launched, ms * (1 + run / 10)))
                pass_us(1, 3)
            end = pass_us(3, 8)
            cut = start // 1000 * 1000  # as ONNX Runtime writes them
            nodes[name].append(Execution(name, kind, cut, cut + (end - start) // 1000 * 1000))
    return Recording(list(nodes.values()), kernels)


def times(found: Recording) -> dict[str, Sequence[float]]:
    return {layer.name: layer.samples_ms for layer in attributed(found.nodes, found.kernels)}


TRUTH = {
    name: tuple(pytest.approx(sum(work.values()) * (1 + run / 10)) for run in range(RUNS))
    for name, (_, work) in LAYERS.items()
    if work
}


@pytest.mark.parametrize("seed", range(5))
def test_each_kernel_counts_for_the_node_that_launched_it(seed: int) -> None:
    found = record(seed)
    assert times(found) == TRUTH
    layers = attributed(found.nodes, found.kernels[::-1])
    assert [layer.name for layer in layers] == list(TRUTH)
    assert {layer.name: layer.detail for layer in layers}["gelu"] == "gelu"


@pytest.mark.parametrize(
    "shift_us", [sign * us for sign, us in itertools.product((-1, 1), (15, 40, 300, 10**3, 10**9))]
)
@pytest.mark.parametrize("seed", range(3))
def test_clocks_that_disagree_are_refused_with_a_number(shift_us: int, seed: int) -> None:
    with pytest.raises(UnavailableError, match=r"do not fit the nodes: \d+\.\d% of their time"):
        times(record(seed).shifted(1000 * shift_us))


def test_nodes_that_change_places_in_a_run_are_refused_and_in_all_runs_seen() -> None:
    found = record()
    big, small = 2, 4

    def swap(turn: int) -> None:
        one, other = found.nodes[big][turn], found.nodes[small][turn]
        found.nodes[big][turn], found.nodes[small][turn] = (
            one._replace(start_ns=other.start_ns, end_ns=other.end_ns),
            other._replace(start_ns=one.start_ns, end_ns=one.end_ns),
        )

    swap(0)
    with pytest.raises(UnavailableError, match=r"0\.0% of their time was launched in no node, [1-9]\d*\.\d% by nodes"):
        times(found)
    for turn in range(1, RUNS):
        swap(turn)
    assert times(found) != TRUTH


@pytest.mark.parametrize(("ms", "refused"), [(0.02, False), (4.0, True)])
@pytest.mark.parametrize("launch", [0, EPOCH + 10_000, EPOCH + 10**12])
def test_a_hundredth_may_be_launched_by_nobody(ms: float, launch: int, *, refused: bool) -> None:
    found = record()
    found.kernels.append(Kernel("stranger", launch, launch + 5000, ms))
    if refused:
        with pytest.raises(UnavailableError, match=r"launched in no node.*1% may"):
            times(found)
    else:
        assert times(found) == TRUTH


def test_a_convolution_without_a_kernel_is_refused_by_name() -> None:
    found = record()
    found.kernels = [kernel for kernel in found.kernels if kernel.name != "gemm"]
    with pytest.raises(UnavailableError, match="head/Gemm, launched nothing"):
        times(found)
    found.kernels = []
    with pytest.raises(UnavailableError, match="saw no kernel"):
        times(found)


def test_a_trace_joins_kernels_copies_and_fills_with_their_launches() -> None:
    events = [
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 10.5, "dur": 4.25, "args": {"correlation": 7}},
        {"cat": "kernel", "name": "depthwise", "ts": 900.0, "dur": 250.5, "args": {"correlation": 7}},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 20.0, "dur": 3.0, "args": {"correlation": 8}},
        {"cat": "gpu_memset", "name": "Memset", "ts": 1200.0, "dur": 1.5, "args": {"correlation": 8}},
        {"cat": "gpu_memcpy", "name": "Memcpy", "ts": 1300.0, "dur": 2.0, "args": {"correlation": 9}},
        {"cat": "cpu_op", "name": "aten::add", "ts": 1.0, "dur": 2.0, "args": {"External id": 7}},
        {"ph": "M", "name": "process_name"},
    ]
    assert kernels_of({"baseTimeNanoseconds": EPOCH, "traceEvents": events}) == [
        Kernel("depthwise", EPOCH + 10_500, EPOCH + 14_750, 0.2505),
        Kernel("Memset", EPOCH + 20_000, EPOCH + 23_000, 0.0015),
        Kernel("Memcpy", 0, 0, 0.002),
    ]


def test_a_pytorch_without_kernels_to_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_kernels.torch.profiler, "supported_activities", lambda: {ort_kernels.ProfilerActivity.CPU})
    with pytest.raises(UnavailableError, match="this build of PyTorch cannot see kernels"):
        ort_kernels.demand("ort-cuda")
    monkeypatch.setattr(
        ort_kernels.torch.profiler,
        "supported_activities",
        lambda: set(ort_kernels.ProfilerActivity.__members__.values()),
    )
    ort_kernels.demand("ort-cuda")


def test_a_trace_of_pytorchs_profiler_is_read_on_the_epochs_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_kernels, "ProfilerActivity", SimpleNamespace(CUDA=ort_kernels.ProfilerActivity.CPU))
    read = []
    monkeypatch.setattr(ort_kernels, "kernels_of", lambda trace: read.append(trace) or [])
    begun = time.time_ns()
    with ort_kernels.recorded(tmp_path) as found:
        torch.ones(3) + 1
    assert found == []
    (trace,) = read
    events = [event for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]
    assert events
    for event in events:
        start = trace["baseTimeNanoseconds"] + round(1e3 * event["ts"])
        assert begun - 10**7 < start < time.time_ns() + 10**7, "the same clock, to 10 ms"
