"""What this device can do at best: how fast it copies, how fast it multiplies matrices.

No layer of a network can be faster than its data can be read and written once, nor than its
multiplications at the rate of a large matrix product. Both limits are measured, in the run that uses
them, since neither a data sheet nor another day knows this machine's clocks and neighbours. A layer
whose data stay in a cache may beat the first limit, and one with a cheaper algorithm the second.

Its part for GPUs ran on an H100 (torch 2.11, CUDA 13.0); the tests use a false one.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from replk_deploy.backends import cuda
from replk_deploy.precision import TOLERANCES, Precision

Clock = Callable[[], int]  # nanoseconds, never backwards
Device = Literal["cpu", "cuda"]

COPY_MIB = 256  # larger than the caches of the processors and GPUs in question
SIDES: dict[Device, int] = {"cpu": 1024, "cuda": 8192}  # of the square matrices: 2 and 1100 GFLOP a product
TRIES, BUDGET_S = 7, 2.0  # a processor without arithmetic for float16 takes seconds for one product
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The two limits of a device at a precision; the best of the tries counts.

    Attributes:
        computes: type of the fastest product; a processor may be faster in float32 than in float16.
        threads: of PyTorch, which measured; None on a GPU.
        copied_bytes: read and written by one copy.
        flop: of one matrix product, two a multiply-add.
    """

    KIND: ClassVar[str] = "roofline"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ("copy_gbps", "matrix_gflops")

    device: Device
    precision: Precision
    computes: str
    threads: int | None
    copied_bytes: int
    copy_s: tuple[float, ...]
    flop: int
    product_s: tuple[float, ...]

    @property
    def copy_gbps(self) -> float:
        """Give the bandwidth of a copy in 10^9 bytes a second, reading and writing counted."""
        return self.copied_bytes / min(self.copy_s) / 1e9

    @property
    def matrix_gflops(self) -> float:
        """Give the rate of a matrix product in 10^9 operations a second."""
        return self.flop / min(self.product_s) / 1e9

    def attainable_ms(self, *, moved_bytes: int, macs: int) -> float:
        """Return the time below which nothing with these bytes and multiply-adds can be expected."""
        return max(moved_bytes / self.copy_gbps, 2 * macs / self.matrix_gflops) / 1e6


def measure(precision: Precision, *, device: Device = "cpu", clock: Clock = time.perf_counter_ns) -> Roofline:
    """Measure copy bandwidth and matrix rate with PyTorch.

    Args:
        precision: of the products; on a processor, float32 is tried too.
        device: which one to measure.
        clock: host clock in nanoseconds.

    Raises:
        UnavailableError: no such GPU, or it has too little memory.
    """
    dtype: torch.dtype = TOLERANCES[precision].torch_dtype
    on_gpu = device == "cuda"
    with contextlib.ExitStack() as stack:
        if on_gpu:
            cuda.demand("the roofline")
            stack.enter_context(cuda.translated("measure the roofline"))
            stack.enter_context(cuda.arithmetic(tf32=precision == "tf32"))
        source = torch.ones(COPY_MIB * MIB, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy_s = _tries(lambda: target.copy_(source), clock, on_gpu=on_gpu)
        side = SIDES[device]
        kinds = (dtype,) if on_gpu else (dtype, torch.float32)
        products = {kind: _products(kind, side, device, clock) for kind in dict.fromkeys(kinds)}
    fastest = min(products, key=lambda kind: min(products[kind]))
    return Roofline(
        device=device,
        precision=precision,
        computes=str(fastest).removeprefix("torch."),
        threads=None if on_gpu else torch.get_num_threads(),
        copied_bytes=2 * source.numel(),
        copy_s=copy_s,
        flop=2 * side**3,
        product_s=products[fastest],
    )


def _products(dtype: torch.dtype, side: int, device: Device, clock: Clock) -> tuple[float, ...]:
    rng = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=rng, device=device).to(dtype) for _ in range(2))
    return _tries(lambda: torch.mm(a, b), clock, on_gpu=device == "cuda")


def _tries(work: Callable[[], Tensor], clock: Clock, *, on_gpu: bool) -> tuple[float, ...]:
    """Return the seconds of each try; the first ones warm up, and cost nothing since the best counts."""
    found: list[float] = []
    while len(found) < TRIES and sum(found) < BUDGET_S:
        start = clock()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        found.append((clock() - start) / 1e9)
    return tuple(found)
