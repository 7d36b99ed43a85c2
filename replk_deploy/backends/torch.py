"""Eager PyTorch on the CPU: the reference that every other runtime is compared with.

A depthwise convolution with a large kernel may differ several times in speed between the two memory
layouts, in either direction, depending on the processor and the precision. So the layout is
measured once, when a file is opened, and said in `facts`.
"""

import abc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from replk_deploy import onednn, weights
from replk_deploy.backends.base import DEFAULT, Array, Arrays, Backend, Launch, Settings, TensorSpec
from replk_deploy.errors import ContractError
from replk_deploy.models.base import Network
from replk_deploy.precision import PRECISIONS, TOLERANCES, Precision

Forward = Callable[[Tensor], tuple[Tensor, ...]]
LAYOUTS = {"channels_last": torch.channels_last, "channels_first": torch.contiguous_format}
PROBES = 2  # timed answers per layout, after one to warm up; differences of interest are twofold and more
PATIENCE_S = 2.0  # the second layout may always take this long; beyond it, only twice the time of the first


class TorchRuntime(Backend):
    """What eager and compiled PyTorch share: the file, the layout, the way in and out."""

    takes: ClassVar[Literal["weights", "onnx"]] = "weights"
    precisions: ClassVar[frozenset[Precision]] = frozenset(PRECISIONS)

    @classmethod
    def probe(cls) -> Mapping[str, str]:
        """Return the version, the device and the number of threads."""
        return {"torch": torch.__version__, "device": "cpu", "threads": str(torch.get_num_threads())}

    def __init__(self, artefact: Path, settings: Settings = DEFAULT) -> None:
        """Open a weights file of ours and keep the faster memory layout.

        Raises:
            CheckpointError: not a weights file of ours, or damaged.
            UnavailableError: this machine lacks what the runtime needs.
        """
        del settings
        self.facts = facts = dict(self.probe())
        model, metadata = weights.read(artefact)
        self.precision = metadata.precision
        self.outputs = model.geometry.outputs
        self._dtype: torch.dtype = TOLERANCES[self.precision].torch_dtype
        self.input = TensorSpec(
            name="images", dtype=str(self._dtype).removeprefix("torch."), shape=(None, 3, None, None)
        )
        self._stalls = onednn.stalls(model)
        facts["onednn"] = "off" if self._stalls else "on"
        with onednn.avoided(self._stalls):
            facts["layout"], facts["layout_probe"] = faster_layout(model, self._dtype, metadata.preprocessing.size)
        self._layout = LAYOUTS[facts["layout"]]
        self._model: Network | None = in_layout(model, self._layout)
        self._forward: Forward | None = self._guarded(self._ready(self._model))

    @abc.abstractmethod
    def _ready(self, model: Network) -> Forward:
        """Return what answers a batch that lies on the device."""

    def _guarded(self, forward: Forward) -> Forward:
        if not self._stalls:
            return forward

        def answer(images: Tensor) -> tuple[Tensor, ...]:
            with onednn.avoided(when=True):
                return forward(images)

        return answer

    def _run(self, images: Array) -> Arrays:
        with torch.inference_mode():
            answer = self._open()(self._copy_in(images))
            return {name: out.float().numpy() for name, out in zip(self.outputs, answer, strict=True)}

    def prepare(self, images: Array) -> Launch:
        """Copy a batch into the input's type and the chosen layout."""
        forward = self._open()
        self.check(images)
        return _Launch(forward, self._copy_in(images))

    def close(self) -> None:
        """Drop the network; safe to call twice."""
        self._model = self._forward = None

    def _open(self) -> Forward:
        if self._forward is None:
            raise ContractError(f"{self.name} was asked after it was closed")
        return self._forward

    def _copy_in(self, images: Array) -> Tensor:
        # torch.tensor copies: a launch must not see what the caller does to the array later
        return torch.tensor(np.ascontiguousarray(images)).to(self._dtype, memory_format=self._layout)


@final
class Torch(TorchRuntime):
    """A weights file on eager PyTorch."""

    name: ClassVar[str] = "torch"

    def _ready(self, model: Network) -> Forward:
        return model


@final
class _Launch:
    def __init__(self, forward: Forward, images: Tensor) -> None:
        self._forward, self._images = forward, images

    def enqueue(self) -> None:
        with torch.inference_mode():
            self._forward(self._images)

    def wait(self) -> None:
        """Return at once: on the CPU, enqueue comes back when the answer is there."""

    def device_ms(self) -> None:
        """Return None: a CPU has one clock."""


class _TooSlow(Exception):  # noqa: N818  # a signal between two functions of this file
    pass


def in_layout(model: Network, layout: torch.memory_format) -> Network:
    """Move a network's weights to a memory layout, in place; returns the network."""
    return model.to(memory_format=layout)  # type: ignore[call-overload, no-any-return]  # missing in torch's stubs


def faster_layout(
    model: Network, dtype: torch.dtype, size: tuple[int, int], *, clock: Callable[[], int] = time.perf_counter_ns
) -> tuple[str, str]:
    """Time one image in both memory layouts; return the faster one's name and the times in words.

    The second layout is given up once it is clearly slower: at some shapes a CPU falls back to
    reference code that takes minutes.
    """
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    best: dict[str, int] = {}
    words = []
    for name, layout in LAYOUTS.items():
        limit = max(2 * min(best.values()), int(PATIENCE_S * 1e9)) if best else None
        try:
            best[name] = _fastest(in_layout(model, layout), images.to(memory_format=layout), limit, clock)
            words.append(f"{name} {best[name] / 1e6:.1f} ms")
        except _TooSlow:
            words.append(f"{name} given up")
    return min(best, key=lambda name: best[name]), f"batch 1, {size[0]}x{size[1]}: {', '.join(words)}"


def _fastest(model: nn.Module, images: Tensor, limit_ns: int | None, clock: Callable[[], int]) -> int:
    times, start = [], clock()

    def watch(_module: nn.Module, _args: Any) -> None:
        if limit_ns is not None and clock() - start > limit_ns:
            raise _TooSlow

    hooks = [m.register_forward_pre_hook(watch) for m in model.modules()]
    try:
        with torch.inference_mode():
            for _ in range(1 + PROBES):
                start = clock()
                model(images)
                times.append(clock() - start)
    finally:
        for hook in hooks:
            hook.remove()
    return min(times[1:])
