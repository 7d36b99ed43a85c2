"""native: RepLKNet with kernels of its own, channel by channel, replayed as one CUDA graph a batch.

    with Native(Path("model.fp16.native")) as network:
        logits = network(images)["logits"]

A file holds the weights and, for each batch it was built for, which kernel was the fastest on that GPU. Anything
else, another batch or another size, is measured when it is first asked for. The kernels are compiled at first use.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from replk_deploy import weights
from replk_deploy.backends import compiler, cuda, sidecar
from replk_deploy.backends.base import (
    DEFAULT,
    Array,
    Arrays,
    Engine,
    Launch,
    LayerTime,
    Made,
    Recipe,
    Settings,
    TensorSpec,
)
from replk_deploy.backends.leaves import leaf_times
from replk_deploy.errors import ContractError, IntegrityError, ReplkError
from replk_deploy.kernels import nvrtc, tuning
from replk_deploy.kernels.network import ChannelMajor
from replk_deploy.metadata import Metadata
from replk_deploy.models.replknet import RepLKNet
from replk_deploy.precision import TOLERANCES, Precision
from replk_deploy.progress import Progress

IMAGE_DIMS, CHANNELS = 4, 3
GRAPHS = 8  # captured at a time, each with its own memory
TUNED = "replk.tuned"  # key in the header of the file


@final
class Native(Engine):
    """A weights file of ours and the measured choice of its kernels, on one GPU from compute capability 8.0 on."""

    name: ClassVar[str] = "native"
    takes: ClassVar[Literal["weights", "onnx"]] = "weights"
    precisions: ClassVar[frozenset[Precision]] = frozenset({"fp16", "bf16"})
    honours: ClassVar[frozenset[str]] = frozenset({"cuda_graph"})
    families: ClassVar[frozenset[str] | None] = frozenset({RepLKNet.family})
    suffix: ClassVar[str] = ".native"
    ingredients: ClassVar[frozenset[str]] = frozenset({"batches"})

    @classmethod
    def probe(cls) -> Mapping[str, str]:
        """Return the versions of what compiles the kernels, and the GPU.

        Raises:
            UnavailableError: no GPU, one that is too old, or a missing package.
        """
        cuda.demand(cls.name)
        nvrtc.demand(torch.cuda.get_device_capability())
        return cuda.describe("cuda") | compiler.triton(cls.name) | nvrtc.versions()

    @classmethod
    def build(cls, source: Path, out: Path, recipe: Recipe, progress: Progress) -> Made:
        """Measure which kernels are the fastest on this GPU for each batch, and write them with the weights.

        Raises:
            UnavailableError: as for `probe`.
            ReplkError: not a weights file of ours in float16 or bfloat16, or no RepLKNet.
        """
        facts = dict(cls.probe())
        network, metadata = _channel_major(source)
        batches = sorted({batch.opt for batch in recipe.batches} or {1})
        size, start = metadata.preprocessing.size, time.perf_counter()
        weight = next(network.parameters())
        with tuning.asked() as answers, torch.inference_mode(), cuda.translated("measure the kernels"):
            for index, count in enumerate(batches):
                progress(f"build {cls.name}", index, len(batches))
                network(torch.randn(count, 3, *size, dtype=weight.dtype, device=weight.device))
            torch.cuda.synchronize()
        progress(f"build {cls.name}", len(batches), len(batches))
        weights.annotate(source, out, {TUNED: json.dumps(answers, sort_keys=True)})
        facts |= {"tuned_for": ", ".join(map(str, batches)), "tuned_s": f"{time.perf_counter() - start:.1f}"}
        dtype = str(weight.dtype).removeprefix("torch.")
        spec = TensorSpec(name="images", dtype=dtype, shape=(None, 3, None, None))
        return Made(
            input=spec, outputs=tuple(network.model.geometry.outputs), batches=(), made_with=_here(), facts=facts
        )

    def __init__(self, artefact: Path, settings: Settings = DEFAULT) -> None:
        """Open a file that its sidecar describes and that was built for a GPU like this one.

        Raises:
            ReplkError: there is no such file.
            IntegrityError: no sidecar, one of another file or backend, built for another GPU, or no choice of kernels.
            UnavailableError: as for `probe`.
        """
        said = sidecar.read(artefact)
        facts = self.probe()
        sidecar.demand(artefact, said, self.name, _here())
        self.device = "cuda"
        self.input, self.outputs, self.precision = said.input, said.outputs, said.precision
        self.facts = {**said.facts, **facts, "cuda_graph": "on" if settings.cuda_graph else "off"}
        self._graphs, self._stream = settings.cuda_graph, cuda.stream()
        torch.cuda.reset_peak_memory_stats()
        self._network: ChannelMajor | None = _channel_major(artefact)[0]
        tuning.know(_tuned(artefact))
        self._captured: OrderedDict[tuple[int | str, ...], _Captured] = OrderedDict()

    def __call__(self, images: Array) -> dict[str, Array]:
        """Answer one batch, by output name, float32 and complete.

        Args:
            images: [N, 3, H, W] float32, normalised, or [N, H, W, 3] uint8, which the first kernel normalises as the
                weights file says. The first batch of a shape captures its CUDA graph.

        Raises:
            ReplkError: shape or type is another.
        """
        if images.dtype != np.uint8:
            return self.run(images)
        if images.ndim != IMAGE_DIMS or images.shape[3] != CHANNELS or not len(images):
            raise ReplkError(f"uint8 images are {list(images.shape)}", "give [N, H, W, 3], or float32 [N, 3, H, W]")
        return {name: np.array(answer) for name, answer in self._run(images).items()}

    def _run(self, images: Array) -> Arrays:
        network, key = self._open(), (*images.shape, images.dtype.name)
        with _gpu_of(network):
            known = self._captured.pop(key, None) or _Captured(network, images, self._dtype, self._stream)
            self._captured[key] = known
            while len(self._captured) > GRAPHS:
                self._captured.popitem(last=False)
            return dict(zip(self.outputs, known.answers(images), strict=True))

    def prepare(self, images: Array) -> Launch:
        """Copy a batch to the GPU in the input's type; capture the graph if there is one."""
        network = self._open()
        self.check(images)
        with _gpu_of(network):
            batch = cuda.place(images, self._dtype)
            return cuda.CudaLaunch(_forward(network, batch), graph=self._graphs, on=self._stream)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = TOLERANCES[self.precision].torch_dtype
        return dtype

    @property
    def memory_mib(self) -> Mapping[str, float]:
        """Return the size of the weights, and the most that PyTorch held in this process since opening."""
        tensors = self._network.parameters() if self._network is not None else ()
        found = {"weights": sum(t.nbytes for t in tensors) / cuda.MIB}
        return found | {"peak": torch.cuda.max_memory_allocated() / cuda.MIB}

    def layer_times(self, images: Array, *, repeats: int) -> tuple[LayerTime, ...]:
        """Time each layer, one kernel each, in the order of execution; pooling is no layer of its own."""
        network = self._open()
        self.check(images)
        with _gpu_of(network), cuda.translated("time the layers"):
            run = _forward(network, cuda.place(images, self._dtype))
            run()  # measures what is not known yet
            return leaf_times(network.model, run, device="cuda", repeats=repeats, detail="channel-major")

    def close(self) -> None:
        """Drop network and graphs; safe to call twice."""
        self._network = None
        self._captured.clear()

    def _open(self) -> ChannelMajor:
        if self._network is None:
            raise ContractError(f"{self.name} was asked after it was closed")
        return self._network


@final
class _Captured:
    """The way of one shape of images: pinned memory, network and pinned memory again, in one CUDA graph."""

    def __init__(self, network: ChannelMajor, images: Array, dtype: torch.dtype, stream: torch.cuda.Stream) -> None:
        with cuda.translated("hold the images"):
            self._in = cuda.pinned(torch.from_numpy(np.empty_like(images)))
            there = torch.empty_like(self._in, device=cuda.DEVICE)
            with torch.inference_mode():
                self._out = [cuda.pinned(out.float().cpu()) for out in network(there.zero_().to(_type(there, dtype)))]

        def run() -> None:
            with torch.inference_mode():
                there.copy_(self._in, non_blocking=True)
                for host, out in zip(self._out, network(there.to(_type(there, dtype))), strict=True):
                    host.copy_(out.float(), non_blocking=True)

        self._launch = cuda.CudaLaunch(run, graph=True, on=stream)

    def answers(self, images: Array) -> list[Array]:
        """Return the outputs for images of this shape; the next call overwrites them."""
        self._in.copy_(torch.from_numpy(np.ascontiguousarray(images)))
        self._launch.enqueue()
        self._launch.wait()
        return [out.numpy() for out in self._out]


def _gpu_of(network: ChannelMajor) -> torch.cuda.device:
    """Return what makes the GPU of the weights the current one: each thread has its own, and kernels start there."""
    return torch.cuda.device_of(next(network.parameters()))  # type: ignore[no-untyped-call]  # missing in torch's stubs


def _type(images: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the type in which the network reads images: pixels stay pixels."""
    return images.dtype if images.dtype == torch.uint8 else dtype


def _forward(network: ChannelMajor, images: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            answers: tuple[Tensor, ...] = network(images)
            return answers

    return run


def _channel_major(artefact: Path) -> tuple[ChannelMajor, Metadata]:
    """Read a weights file, and put its network on the GPU."""
    model, metadata = weights.read(artefact)
    if not isinstance(model, RepLKNet) or model.form != "folded":
        raise ReplkError(
            f"{artefact} holds a {model.form} {model.family}, and {Native.name} runs a folded RepLKNet",
            "fuse it first: replk fuse CKPT, or use torch-compile",
        )
    if metadata.precision not in Native.precisions:
        wanted = " or ".join(sorted(Native.precisions, reverse=True))
        raise ReplkError(
            f"{artefact} is {metadata.precision}, and {Native.name} runs {wanted}",
            f"export it in another precision: replk export --weights --precision {wanted.split()[0]}",
        )
    with cuda.translated("hold the network"):
        network = ChannelMajor(model, metadata.preprocessing).to(cuda.DEVICE)
    return network.requires_grad_(requires_grad=False).eval(), metadata


def _tuned(artefact: Path) -> dict[str, str]:
    """Return the choice of kernels that a file carries."""
    try:
        found = json.loads(weights.notes(artefact).get(TUNED, ""))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(way, str) for way in found.values()):
        raise IntegrityError(f"{artefact} does not say which kernels were chosen", "build it again: replk build")
    return found


def _here() -> dict[str, str]:
    """Return what must be the same to open a file: the kernels were chosen on that GPU."""
    return {name: cuda.facts()[name] for name in ("gpu", "compute_capability")}
