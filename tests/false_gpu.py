"""A false NVIDIA GPU: torch.cuda's own words, and a device that lies in the processor's memory.

Work is done at once, on the CPU. What is kept is the order in which streams, events and graphs were
used, in `log`, because that order is what our code decides.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from replk_deploy import optional
from replk_deploy.backends import cuda

NAME, CAPABILITY, PEAK_MIB, L2_BYTES = "False GPU", (9, 0), 96, 1000
TICK_MS = 0.25  # between two events


def without(patch: pytest.MonkeyPatch, package: str) -> None:
    """Let a package, and all inside it, be one that is not installed."""
    real = optional.import_module

    def absent(module: str) -> object:
        if f"{module}.".startswith(f"{package}."):
            raise ModuleNotFoundError(name=package)
        return real(module)

    patch.setattr(optional, "import_module", absent)


class FalseGpu:
    """What happened, and the switches of PyTorch at each piece of work."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 0
        self.streams = 0
        self.failure: Exception | None = None
        self.current = _Stream(self, "default")

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(cuda, "DEVICE", "cpu")
        patch.setattr(cuda, "available", lambda: True)  # not torch's own: its compiler asks, too
        patch.setattr(cuda, "l2_bytes", lambda: L2_BYTES)  # nor the properties of its device
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.backends.cudnn.m, "version", lambda: 92000)
        for name, value in {
            "get_device_name": lambda: NAME,
            "get_device_capability": lambda: CAPABILITY,
            "Stream": self.stream,
            "Event": self.event,
            "current_stream": lambda: self.current,
            "stream": self.on,
            "synchronize": lambda: self.log.append("device idle"),
            "CUDAGraph": lambda: _Graph(self),
            "graph": self.capture,
            "reset_peak_memory_stats": lambda: None,
            "max_memory_allocated": lambda: PEAK_MIB * 2**20,
            "_sleep": lambda cycles: self.log.append(f"sleep {cycles}"),
        }.items():
            patch.setattr(torch.cuda, name, value)

    def stream(self) -> "_Stream":
        self.streams += 1
        return _Stream(self, f"stream {self.streams}")

    def event(self, *, enable_timing: bool) -> "_Event":
        assert enable_timing, "an event without timing has no time"
        return _Event(self)

    @contextmanager
    def on(self, stream: "_Stream") -> Iterator[None]:
        self.log.append(f"on {stream.name}")
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before
        self.log.append("off")

    @contextmanager
    def capture(self, _graph: "_Graph", *, stream: "_Stream") -> Iterator[None]:
        self.log.append(f"capture on {stream.name}")
        before, self.current = self.current, stream
        yield
        self.current = before  # not after a failure: torch.cuda.graph leaves its stream behind then
        self.log.append("captured")


class _Stream:
    def __init__(self, gpu: FalseGpu, name: str) -> None:
        self._gpu, self.name, self.cuda_stream = gpu, name, 4096 + gpu.streams

    def synchronize(self) -> None:
        self._gpu.log.append(f"{self.name} idle")
        if self._gpu.failure is not None:
            raise self._gpu.failure


class _Event:
    def __init__(self, gpu: FalseGpu) -> None:
        self._gpu, self.at = gpu, 0

    def record(self) -> None:
        self._gpu.now += 1
        self.at = self._gpu.now
        self._gpu.log.append("event")

    def elapsed_time(self, end: "_Event") -> float:
        return TICK_MS * (end.at - self.at)


class _Graph:
    def __init__(self, gpu: FalseGpu) -> None:
        self._gpu = gpu

    def replay(self) -> None:
        self._gpu.log.append("replay")
