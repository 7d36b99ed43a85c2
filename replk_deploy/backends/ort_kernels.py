"""Which kernels of the GPU each node of ONNX Runtime launched, by the time of their launch.

ONNX Runtime knows when the host worked on a node, PyTorch's profiler when anybody in the process launched
a kernel and how long it took. Both count from the Unix epoch, in clocks of their own, so what is found
is held to what must be true of it before any of it is believed.

It ran on no GPU yet; the tests use recorded events.
"""

import bisect
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from replk_deploy.backends.base import LayerTime
from replk_deploy.errors import UnavailableError

WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})
COMPUTES = ("Conv", "Gemm", "MatMul")  # endings of operators that cannot do without a kernel
SLACK_NS = 2000  # ONNX Runtime cuts start and duration down to microseconds
ASTRAY = 0.01  # share of the kernels' time that may belong to no node
RECURS = "profile once more; if it recurs, the backend torch or trt, or the whole process: nsys profile replk bench"


class Execution(NamedTuple):
    """One execution of a node, on the host's clock."""

    name: str
    kind: str
    start_ns: int
    end_ns: int


class Kernel(NamedTuple):
    """One kernel, copy or fill of the GPU: how long it took, and when the host launched it."""

    name: str
    launch_ns: int
    launched_ns: int
    ms: float


def demand(name: str) -> None:
    """Raise UnavailableError unless PyTorch's profiler can see kernels."""
    if ProfilerActivity.CUDA not in torch.profiler.supported_activities():  # type: ignore[no-untyped-call]  # missing in torch's stubs
        raise UnavailableError(
            f"this build of PyTorch cannot see kernels, and {name} does not time them by itself",
            "install a build of PyTorch for CUDA, or profile the backend ort-cpu",
        )


@contextmanager
def recorded(folder: Path) -> Iterator[list[Kernel]]:
    """Give a list that holds, once the block has ended, every kernel that was launched in it."""
    found: list[Kernel] = []
    path = folder / "kernels.json"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as watching:
        yield found
    watching.export_chrome_trace(str(path))
    found += kernels_of(json.loads(path.read_text(encoding="utf-8")))


def kernels_of(trace: Mapping[str, Any]) -> list[Kernel]:
    """Read the kernels of a trace of PyTorch's profiler; one without a launch is launched at no time, 0."""
    origin = int(trace.get("baseTimeNanoseconds", 0))
    events = [event for event in trace["traceEvents"] if "correlation" in event.get("args", {})]
    launches = {event["args"]["correlation"]: event for event in events if event.get("cat") in LAUNCHES}

    def of(event: Mapping[str, Any]) -> Kernel:
        launch = launches.get(event["args"]["correlation"])
        start = origin + round(launch["ts"] * 1e3) if launch else 0
        return Kernel(event["name"], start, start + round(launch["dur"] * 1e3) if launch else 0, event["dur"] / 1e3)

    return [of(event) for event in events if event.get("cat") in WORK]


def attributed(nodes: Sequence[Sequence[Execution]], kernels: Sequence[Kernel]) -> tuple[LayerTime, ...]:
    """Give each kernel to the node that was executed while it was launched.

    Args:
        nodes: the executions of each node, one a run.
        kernels: of these runs and of nothing else.

    Returns:
        The nodes that launched anything, in order; a sample is the sum of the kernels of one execution.

    Raises:
        UnavailableError: more than a hundredth of the kernels' time was launched outside any node, or by a node
            that launched something else in another run; a convolution or a product launched nothing; or
            there is no kernel.
    """
    places = sorted(
        (execution.start_ns, execution.end_ns, node, turn)
        for node, executions in enumerate(nodes)
        for turn, execution in enumerate(executions)
    )
    whole = sum(kernel.ms for kernel in kernels)
    if not whole > 0:
        raise UnavailableError("PyTorch's profiler saw no kernel", "end other profilers, and profile once more")
    launched: dict[int, list[list[Kernel]]] = {n: [[] for _ in executions] for n, executions in enumerate(nodes)}
    outside = unlike = 0.0
    for kernel in kernels:
        middle = (kernel.launch_ns + kernel.launched_ns) // 2
        place = bisect.bisect_right(places, middle, key=lambda p: p[0]) - 1
        start, end, node, turn = places[max(place, 0)]
        if start - SLACK_NS <= kernel.launch_ns and kernel.launched_ns <= end + SLACK_NS:
            launched[node][turn].append(kernel)
        else:
            outside += kernel.ms
    for turns in launched.values():
        if len({tuple(sorted(kernel.name for kernel in turn)) for turn in turns}) != 1:
            unlike += sum(kernel.ms for kernel in itertools.chain(*turns))
    idle = [nodes[n][0].name for n, turns in launched.items() if nodes[n][0].kind.endswith(COMPUTES) and not all(turns)]
    if outside + unlike > ASTRAY * whole or idle:
        also = f"; {len(idle)} convolutions or products, as {idle[0]}, launched nothing" if idle else ""
        raise UnavailableError(
            f"the kernels do not fit the nodes: {outside / whole:.1%} of their time was launched in no node,"
            f" {unlike / whole:.1%} by nodes that launched something else in another run, {ASTRAY:.0%} may{also}",
            RECURS,
        )
    return tuple(
        LayerTime(
            name=nodes[n][0].name,
            kind=nodes[n][0].kind,
            samples_ms=tuple(sum(kernel.ms for kernel in turn) for turn in turns),
            detail="; ".join(dict.fromkeys(kernel.name for turn in turns for kernel in turn)),
        )
        for n, turns in sorted(launched.items(), key=lambda item: nodes[item[0]][0].start_ns)
        if any(turns)
    )
