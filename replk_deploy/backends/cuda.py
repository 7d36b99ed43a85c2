"""What the runtimes on a GPU share, on torch.cuda: which device, one stream, two events, one captured graph.

It ran on an H100 (torch 2.11, CUDA 13.0); the tests use a false GPU that lies in the processor's memory.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from replk_deploy.backends.base import Array, Settings
from replk_deploy.errors import ContractError, UnavailableError, first_line

Device = Literal["cpu", "cuda"]
DEVICE = "cuda"
WARM_UPS = 3  # uncaptured runs before a capture, in which libraries choose algorithms and allocate; PyTorch's advice
FAILURES = (
    *("CUDA error", "CUDA driver error", "CUDA failure", "cuDNN error", "CUDA kernel errors"),
    *("Triton Error [CUDA]", "GET was unable to find an engine"),
)
HEAD_START_CYCLES = 100_000_000  # 50 ms at 2 GHz, in which the host launches a whole network
MIB = 2**20


def available() -> bool:
    """Tell whether PyTorch can use a GPU here."""
    return torch.cuda.is_available()


def choose(settings: Settings, name: str) -> Device:
    """Return where a runtime of PyTorch runs with these settings.

    Raises:
        UnavailableError: a GPU or a CUDA graph is asked for, and there is no GPU.
    """
    if settings.device == "cuda":
        demand(name)
    gpu = settings.device == "cuda" or (settings.device == "auto" and available())
    if settings.cuda_graph and not gpu:
        raise UnavailableError(
            f"{name} runs on the CPU, which has no CUDA graphs", "leave --cuda-graph out, or ask for --device cuda"
        )
    return "cuda" if gpu else "cpu"


def demand(name: str) -> None:
    """Raise UnavailableError, in PyTorch's words, unless there is a GPU that PyTorch can use."""
    if available():
        return
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # missing in torch's stubs
        why = "PyTorch sees none"
    except (AssertionError, RuntimeError) as exc:
        why = first_line(exc)
    raise UnavailableError(
        f"{name} needs an NVIDIA GPU, and there is none: {why}",
        "check that nvidia-smi lists one and that torch is built for CUDA: python -m torch.utils.collect_env",
    )


def capability() -> str:
    """Return the compute capability of the GPU, as 9.0."""
    return "{}.{}".format(*torch.cuda.get_device_capability())


def l2_bytes() -> int:
    """Return the size of the L2 cache of the GPU."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def facts() -> dict[str, str]:
    """Return name and compute capability of the GPU and the versions of the libraries under PyTorch."""
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]  # missing in torch's stubs
    return {
        "device": "cuda",
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": capability(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(cudnn),
    }


def describe(device: Device) -> dict[str, str]:
    """Describe PyTorch on a device."""
    said = {"torch": torch.__version__, "device": "cpu", "threads": str(torch.get_num_threads())}
    return said | facts() if device == "cuda" else said


def place(
    images: Array, dtype: torch.dtype | None = None, layout: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Copy an array to the GPU, in another type and layout if need be; on return work on any stream may read it."""
    with translated("hold the images"):
        there = torch.tensor(np.ascontiguousarray(images)).to(DEVICE).to(dtype, memory_format=layout)
        torch.cuda.current_stream().synchronize()
    return there


def pinned(values: Tensor) -> Tensor:
    """Return a copy in memory of the host that the GPU reads and writes by itself."""
    return values.pin_memory()


def clock() -> int:
    """Return host nanoseconds once the GPU is idle."""
    torch.cuda.synchronize()
    return time.perf_counter_ns()


def stream() -> torch.cuda.Stream:
    """Return a new stream."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]  # missing in torch's stubs


def timer() -> torch.cuda.Event:
    """Return an event that notes the time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # missing in torch's stubs


def event() -> torch.cuda.Event:
    """Mark a moment on the current stream."""
    found = timer()
    found.record()
    return found


def between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Return the milliseconds between two moments, once the GPU has passed both."""
    return float(start.elapsed_time(end))


@final
class Eraser:
    """Empties the L2 cache when called: reads and writes a buffer twice its size, and waits until that is done."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None  # until the first call, so that no peak of memory holds it

    def __call__(self) -> None:
        """Return once nothing of what was read before is left."""
        with translated("empty the L2 cache"):
            if self._buffer is None:
                self._buffer = torch.zeros(2 * l2_bytes(), dtype=torch.uint8, device=DEVICE)
            self._buffer.add_(1)
            torch.cuda.current_stream().synchronize()


def head_start() -> None:
    """Let the GPU wait a moment, so that launches run ahead of it and no kernel waits for the host."""
    torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]  # missing in torch's stubs


@contextmanager
def translated(task: str) -> Iterator[None]:
    """Turn a GPU's failure inside the block into an UnavailableError that says what to do; others pass."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise UnavailableError(
            f"the GPU has too little memory to {task}: {first_line(exc)}",
            "use a smaller --batch, or close what else holds its memory: nvidia-smi",
        ) from exc
    except RuntimeError as exc:  # torch.AcceleratorError is one, and older versions raise it plainly
        if not isinstance(exc, torch.AcceleratorError) and not str(exc).startswith(FAILURES):
            raise
        if "captur" in str(exc):
            remedy = "leave --cuda-graph out: something in this network cannot be captured"
        else:
            remedy = "this process can no longer use the GPU: start again, and when it recurs see nvidia-smi and dmesg"
        raise UnavailableError(f"the GPU failed to {task}: {first_line(exc)}", remedy) from exc


@contextmanager
def arithmetic(*, tf32: bool) -> Iterator[None]:
    """Allow TF32 or forbid it, for convolutions and matrix products alike, and let cuDNN search for its algorithms.

    These are PyTorch's older switches. torch 2.10 fails to compile after the newer ones were used, and
    2.13 keeps the two in step as long as only the older ones are written.
    """
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark)
    _switch(tf32, tf32, True)
    try:
        yield
    finally:
        _switch(*before)


def _switch(conv: bool, matmul: bool, search: bool) -> None:  # noqa: FBT001  # one tuple, three switches
    torch.backends.cudnn.allow_tf32 = conv
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.benchmark = search


@final
class CudaLaunch:
    """One inference on one stream between two events; with `graph`, captured once and replayed.

    Args:
        run: enqueues one inference on torch.cuda.current_stream() and returns its outputs, on the GPU. What it
            reads must stay where it is.
        graph: whether to capture. `run` is then called WARM_UPS times, once more for the capture, and never again.
        on: where to run; a new stream by default.
    """

    def __init__(self, run: Callable[[], Any], *, graph: bool, on: torch.cuda.Stream | None = None) -> None:
        self._run = run
        self._stream = on if on is not None else stream()
        self._start, self._end = timer(), timer()
        self._answer: Any = None
        self._ran = False
        self._graph = self._captured() if graph else None

    def enqueue(self) -> None:
        """Start one inference; returns while it runs."""
        with translated("run the network"), torch.cuda.stream(self._stream):
            self._start.record()
            if self._graph is None:
                self._answer = self._run()
            else:
                self._graph.replay()
            self._end.record()
        self._ran = True

    def wait(self) -> None:
        """Return when all that was enqueued has finished."""
        with translated("run the network"):
            self._stream.synchronize()

    def device_ms(self) -> float:
        """Return the time of the last finished inference on the GPU."""
        self._demand_one()
        return between(self._start, self._end)

    @property
    def answer(self) -> Any:
        """Return the outputs of the last inference, once it has finished; with a graph, the next overwrites them."""
        self._demand_one()
        return self._answer

    def answers(self) -> list[npt.NDArray[Any]]:
        """Return the outputs of the last inference, copied to the host."""
        outputs = self.answer.values() if isinstance(self.answer, Mapping) else self.answer
        with translated("copy the answer"):
            return [out.float().cpu().numpy() for out in outputs]

    def _demand_one(self) -> None:
        if not self._ran:
            raise ContractError("a launch was asked what it gave before it ran")

    def _captured(self) -> torch.cuda.CUDAGraph:
        with translated("capture a CUDA graph"):
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    self._run()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # the outer one puts the current stream back, which a capture that fails leaves where it was
            with torch.cuda.stream(self._stream), torch.cuda.graph(graph, stream=self._stream):
                self._answer = self._run()
            return graph
