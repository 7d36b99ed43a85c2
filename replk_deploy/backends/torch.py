"""Eager PyTorch, on the CPU the reference that every other runtime is compared with.

A depthwise convolution with a large kernel may differ several times in speed between the two memory
layouts, in either direction, depending on the processor and the precision. So the layout is
measured once, when a file is opened, and said in `facts`.

Its part for GPUs ran on an H100 (torch 2.11, CUDA 13.0); the tests use a false one.
"""

import abc
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, final

import numpy as np
import torch
from torch import Tensor, nn

from replk_deploy import onednn, weights
from replk_deploy.backends import cuda
from replk_deploy.backends.base import DEFAULT, Array, Arrays, Backend, Launch, LayerTime, Settings, TensorSpec
from replk_deploy.backends.cuda import Device
from replk_deploy.backends.leaves import leaf_times
from replk_deploy.errors import ContractError
from replk_deploy.lowerings import modules
from replk_deploy.lowerings.base import LARGE
from replk_deploy.models.base import Network
from replk_deploy.precision import PRECISIONS, TOLERANCES, Precision

Forward = Callable[[Tensor], tuple[Tensor, ...]]
T = TypeVar("T")
Surroundings = Callable[[], AbstractContextManager[None]]
LAYOUTS = {"channels_last": torch.channels_last, "channels_first": torch.contiguous_format}
ASKED = {"nhwc": "channels_last", "nchw": "channels_first"}
PROBES = 2  # timed answers per layout, after one to warm up; differences of interest are twofold and more
PATIENCE_S = 2.0  # the second layout may always take this long; beyond it, only twice the time of the first


class TorchRuntime(Backend):
    """What eager and compiled PyTorch share: the file, the device, the layout, the way in and out."""

    takes: ClassVar[Literal["weights", "onnx"]] = "weights"
    precisions: ClassVar[frozenset[Precision]] = frozenset(PRECISIONS)
    honours: ClassVar[frozenset[str]] = frozenset({"device", "cuda_graph", "layout", "forms"})

    @classmethod
    @final
    def probe(cls) -> Mapping[str, str]:
        """Return versions, device and number of threads.

        Raises:
            UnavailableError: this machine lacks what the runtime needs.
        """
        return cls._here(cuda.choose(DEFAULT, cls.name))

    @classmethod
    def _here(cls, device: Device) -> dict[str, str]:
        """Describe the runtime on a device."""
        return cuda.describe(device)

    def __init__(self, artefact: Path, settings: Settings = DEFAULT) -> None:
        """Open a weights file of ours in the memory layout that is asked for, or else in the faster one.

        Raises:
            CheckpointError: not a weights file of ours, or damaged.
            UnavailableError: this machine lacks what the runtime or the settings need.
        """
        self.device = cuda.choose(settings, self.name)
        self.facts = facts = self._here(self.device)
        model, metadata = weights.read(artefact)
        model = modules.rewritten(model, metadata.preprocessing.size, dict(settings.forms))
        self.precision = metadata.precision
        self.outputs = model.geometry.outputs
        self._dtype: torch.dtype = TOLERANCES[self.precision].torch_dtype
        self.input = TensorSpec(
            name="images", dtype=str(self._dtype).removeprefix("torch."), shape=(None, 3, None, None)
        )
        self._graphs = settings.cuda_graph
        self._stream: torch.cuda.Stream | None = None
        around = self._surroundings(model, facts)
        with cuda.translated("hold the network"):
            if self.device == "cuda":
                model = model.to(cuda.DEVICE)
            large = settings.layout == "auto" and self.device == "cuda" and has_large_kernels(model)
            self._asked = "nchw" if large else settings.layout
            why = "large depthwise kernels on a GPU" if large else "asked for"
            size = metadata.preprocessing.size
            facts["layout"], facts["layout_probe"] = self._layout_of(model, size, around, why)
        self._layout = LAYOUTS[facts["layout"]]
        self._model: Network | None = in_layout(model, self._layout)
        self._forward: Forward | None = _within(around, self._ready(self._model))

    def _surroundings(self, model: Network, facts: dict[str, str]) -> Surroundings | None:
        """Return what each answer must be wrapped in, None for nothing; note it in the facts."""
        if self.device == "cuda":
            self._stream = cuda.stream()
            torch.cuda.reset_peak_memory_stats()
            tf32 = self.precision == "tf32"
            facts |= {
                "tf32": "allowed" if tf32 else "forbidden",
                "cudnn_benchmark": "on",
                "cuda_graph": "on" if self._graphs else "off",
            }
            return functools.partial(cuda.arithmetic, tf32=tf32)
        stalls = onednn.stalls(model)
        facts["onednn"] = "off" if stalls else "on"
        return functools.partial(onednn.avoided, True) if stalls else None

    def _layout_of(
        self, model: Network, size: tuple[int, int], around: Surroundings | None, why: str
    ) -> tuple[str, str]:
        """Return the name of the layout and, in words, why it was taken; `why` where it is not measured."""
        if self._asked != "auto":
            return ASKED[self._asked], why
        measure = functools.partial(faster_layout, model, self._dtype, size)
        if self.device == "cuda":
            measure = functools.partial(measure, device=cuda.DEVICE, clock=cuda.clock, patience_s=None)
        return _within(around, measure)()

    @abc.abstractmethod
    def _ready(self, model: Network) -> Forward:
        """Return what answers a batch that lies on the device."""

    def _run(self, images: Array) -> Arrays:
        launch = self._launch(images)
        launch.enqueue()
        launch.wait()
        return dict(zip(self.outputs, launch.answers(), strict=True))

    def prepare(self, images: Array) -> Launch:
        """Copy a batch to the device in the input's type and the chosen layout; capture the graph if there is one."""
        self._open()
        self.check(images)
        return self._launch(images)

    @property
    def memory_mib(self) -> Mapping[str, float]:
        """Return the size of the weights and, on a GPU, the most that PyTorch held in this process since opening."""
        tensors = (*self._model.parameters(), *self._model.buffers()) if self._model is not None else ()
        found = {"weights": sum(t.nbytes for t in tensors) / cuda.MIB}
        return found | {"peak": torch.cuda.max_memory_allocated() / cuda.MIB} if self.device == "cuda" else found

    def close(self) -> None:
        """Drop the network; safe to call twice."""
        self._model = self._forward = None

    def _open(self) -> Forward:
        if self._forward is None:
            raise ContractError(f"{self.name} was asked after it was closed")
        return self._forward

    def _launch(self, images: Array) -> "CpuLaunch | cuda.CudaLaunch":
        forward, batch = self._open(), self._copy_in(images)

        def run() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return forward(batch)

        return cuda.CudaLaunch(run, graph=self._graphs, on=self._stream) if self.device == "cuda" else CpuLaunch(run)

    def _copy_in(self, images: Array) -> Tensor:
        # both copy: a launch must not see what the caller does to the array later
        if self.device == "cuda":
            return cuda.place(images, self._dtype, self._layout)
        return torch.tensor(np.ascontiguousarray(images)).to(self._dtype, memory_format=self._layout)


@final
class Torch(TorchRuntime):
    """A weights file on eager PyTorch."""

    name: ClassVar[str] = "torch"

    def _ready(self, model: Network) -> Forward:
        return model

    def layer_times(self, images: Array, *, repeats: int) -> tuple[LayerTime, ...]:
        """Time each module that has no parts, in the order of execution; additions and the like are not modules.

        On a GPU the launches get a head start, so that a time is the kernels' and not the host's.
        """
        forward = self._open()
        self.check(images)
        if self._model is None:
            raise ContractError(f"{self.name} has no network")
        batch, layout = self._copy_in(images), self.facts["layout"]
        with torch.inference_mode():
            return leaf_times(self._model, lambda: forward(batch), device=self.device, repeats=repeats, detail=layout)


@final
class CpuLaunch:
    """One inference on the CPU; `answer` holds the outputs of the last."""

    def __init__(self, run: Callable[[], Sequence[Tensor]]) -> None:
        self._run = run
        self.answer: Sequence[Tensor] = ()

    def enqueue(self) -> None:
        """Compute one answer."""
        self.answer = self._run()

    def wait(self) -> None:
        """Return at once: on the CPU, enqueue comes back when the answer is there."""

    def device_ms(self) -> None:
        """Return None: a CPU has one clock."""

    def answers(self) -> list[Array]:
        """Return the outputs of the last inference."""
        return [out.float().numpy() for out in self.answer]


class _TooSlow(Exception):  # noqa: N818  # a signal between two functions of this file
    pass


def _within(around: Surroundings | None, function: Callable[..., T]) -> Callable[..., T]:
    """Return a function that runs another one in its surroundings."""
    if around is None:
        return function

    def inside(*args: Any) -> T:
        with around():
            return function(*args)

    return inside


def has_large_kernels(model: nn.Module) -> bool:
    """Tell whether a depthwise convolution with a large kernel is left that was not lowered.

    cuDNN runs it an order of magnitude slower in channels last than PyTorch's own kernel does in planes.
    """
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return any(conv.groups == conv.in_channels > 1 and max(conv.kernel_size) >= LARGE for conv in convs)


def in_layout(model: Network, layout: torch.memory_format) -> Network:
    """Move a network's weights to a memory layout, in place; returns the network."""
    return model.to(memory_format=layout)  # type: ignore[call-overload, no-any-return]  # missing in torch's stubs


def faster_layout(
    model: Network,
    dtype: torch.dtype,
    size: tuple[int, int],
    *,
    device: str = "cpu",
    clock: Callable[[], int] = time.perf_counter_ns,
    patience_s: float | None = PATIENCE_S,
) -> tuple[str, str]:
    """Time one image in both memory layouts; return the faster one's name and the times in words.

    The second layout is given up once it is clearly slower, unless `patience_s` is None: at some shapes
    a CPU falls back to reference code that takes minutes. A GPU does not, and looking at its clock
    between layers would cost more than the layers.
    """
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    best: dict[str, int] = {}
    words = []
    for name, layout in LAYOUTS.items():
        limit = max(2 * min(best.values()), int(patience_s * 1e9)) if best and patience_s is not None else None
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
