"""The one contract of all runtimes: build a file if need be, open it, answer, be timed, close."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, final

import numpy as np
import numpy.typing as npt

from replk_deploy.batch import Batch
from replk_deploy.errors import MismatchError, ReplkError, UnavailableError
from replk_deploy.precision import Precision
from replk_deploy.progress import Progress

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]


class Launch(Protocol):
    """One prepared inference: input already on the device, output left there."""

    def enqueue(self) -> None:
        """Start one inference; may return early."""

    def wait(self) -> None:
        """Return when all that was started has finished."""

    def device_ms(self) -> float | None:
        """Return the time of the last finished inference between two events of the device; None on a CPU."""

    def answers(self) -> Sequence[Array]:
        """Return the outputs of the last finished inference, copied to the host, in the backend's order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, type and shape of an input or output; None where a dimension may vary."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class _Choices:
    """Named choices of which one backend honours some."""

    __slots__ = ()

    def made(self) -> frozenset[str]:
        """Name the choices that differ from the default."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # its subclasses are dataclasses
        return frozenset(f.name for f in fields if getattr(self, f.name) != f.default)

    def only(self, honoured: frozenset[str]) -> Self:
        """Return the same choices with those that are not honoured back at their defaults."""
        return type(self)(**{name: getattr(self, name) for name in self.made() & honoured})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(_Choices):
    """How a file is opened.

    Attributes:
        device: where it runs; `auto` is the GPU where the runtime has one.
        cuda_graph: whether a launch replays a captured CUDA graph.
        layout: memory layout of the activations; `auto` is the backend's own choice.
        conv_search: how ONNX Runtime's CUDA provider picks an algorithm for a convolution.
        forms: by name, the form that each large convolution of a weights file takes, as in LOWERINGS.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    cuda_graph: bool = False
    layout: Literal["auto", "nchw", "nhwc"] = "auto"
    conv_search: Literal["exhaustive", "heuristic", "default"] = "exhaustive"
    forms: tuple[tuple[str, str], ...] = ()


DEFAULT = Settings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(_Choices):
    """How an engine is built.

    Attributes:
        batches: one optimisation profile each; none takes the range that the source file states.
        level: builder optimisation level, 0 to 5.
        workspace_mib: most memory that one layer may use for scratch.
        timing_cache: folder in which timings are kept between builds.
        compute_capabilities: of the GPUs to build for, as 8.9; none is what the runtime builds for by itself.
        hardware: other GPUs that may open the engine.
        version_compatible: whether later versions of the runtime may open it.
        refittable: whether its weights may be replaced.
        forms: by name, the form that each large convolution of a weights file takes, as in LOWERINGS.
    """

    batches: tuple[Batch, ...] = ()
    level: int | None = None
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    compute_capabilities: tuple[str, ...] = ()
    hardware: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    version_compatible: bool = False
    refittable: bool = False
    forms: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """Time of one layer, one value a repetition; `name` is what the runtime calls it.

    Attributes:
        name: of the layer or node; a node of ours carries the name of its module.
        kind: operator or layer type.
        samples_ms: in the order taken.
        detail: kernel, tactic, layout, as far as the runtime tells.
    """

    name: str
    kind: str
    samples_ms: tuple[float, ...]
    detail: str = ""


class Backend(abc.ABC):
    """One artefact, open on one runtime, ready to answer. A context manager.

    Attributes:
        name: key in BACKENDS.
        takes: which file of a run it starts from.
        precisions: what it can execute.
        honours: the settings that mean something to it.
        cpu_only: whether it leaves a GPU alone, where there is one.
        families: of the networks that it runs; None where it runs any.
        input: one image batch, [N, C, H, W] floating or [N, H, W, C] uint8; C is 3 for networks of ours.
        outputs: names, in order.
        precision: that of the open artefact.
        batches: the ranges that it was built for; none where any number fits `input`.
        device: where it runs.
        facts: versions, threads, layout, as used.
    """

    name: ClassVar[str]
    takes: ClassVar[Literal["weights", "onnx"]]
    precisions: ClassVar[frozenset[Precision]]
    honours: ClassVar[frozenset[str]] = frozenset()
    cpu_only: ClassVar[bool] = False
    families: ClassVar[frozenset[str] | None] = None
    input: TensorSpec
    outputs: tuple[str, ...]
    precision: Precision
    batches: tuple[Batch, ...] = ()
    device: Literal["cpu", "cuda"] = "cpu"
    facts: Mapping[str, str]

    @classmethod
    @abc.abstractmethod
    def probe(cls) -> Mapping[str, str]:
        """Return versions and device, or raise UnavailableError with the install line."""

    @abc.abstractmethod
    def __init__(self, artefact: Path, settings: Settings = DEFAULT) -> None:
        """Open a file; ReplkError when it is not one that this runtime can take."""

    @final
    def run(self, images: Array) -> dict[str, Array]:
        """Answer one batch; the result is the caller's to keep, float32 and complete.

        Raises:
            ReplkError: shape or type is not what the artefact takes.
            MismatchError: the artefact answers something else than it promises.
        """
        self.check(images)
        answer = {name: np.array(out, dtype=np.float32) for name, out in self._run(images).items()}
        if tuple(answer) != self.outputs or any(out.shape[:1] != images.shape[:1] for out in answer.values()):
            shapes = {name: out.shape for name, out in answer.items()}
            raise MismatchError(
                f"{self.name} answers {shapes} to {images.shape}, and promised one row an image of {self.outputs}",
                "a batch dimension became constant, or an output is missing: export it again",
            )
        return answer

    @final
    def check(self, images: Array) -> None:
        """Raise ReplkError unless the artefact takes this batch."""
        wanted = self.input
        fits = len(images.shape) == len(wanted.shape) and all(
            w is None or w == s for w, s in zip(wanted.shape, images.shape, strict=True)
        )
        kind = "uint8" if wanted.dtype == "uint8" else "float32"
        if not fits or images.dtype.name != kind or len(images) == 0:
            shape = "x".join("?" if d is None else str(d) for d in wanted.shape)
            given = "x".join(map(str, images.shape))
            raise ReplkError(
                f"{self.name} takes {kind} images {shape}, not {images.dtype} {given}",
                "export for that shape: replk export --onnx --size HxW --batch MIN:MAX",
            )
        if self.batches and not any(batch.holds(len(images)) for batch in self.batches):
            ranges = ", ".join(map(str, self.batches))
            raise ReplkError(
                f"{self.name} was built for {ranges} images at a time, not {len(images)}",
                "build it for that batch: replk build --batch MIN:OPT:MAX",
            )

    @abc.abstractmethod
    def _run(self, images: Array) -> Arrays:
        """Answer by output name, in order, on the host; float32 images are cast to the input's type."""

    @abc.abstractmethod
    def prepare(self, images: Array) -> Launch:
        """Put a batch where the runtime wants it; what bench times, with bench's own clock."""

    @property
    def memory_mib(self) -> Mapping[str, float]:
        """Return the memory held, as far as the runtime tells."""
        return {}

    def layer_times(self, images: Array, *, repeats: int) -> tuple[LayerTime, ...]:
        """Time each layer of an inference, `repeats` times, in the order of execution.

        Raises:
            UnavailableError: the runtime does not tell its layers apart.
        """
        del images, repeats
        raise UnavailableError(
            f"{self.name} does not tell its layers apart", "profile another backend: torch, ort-cpu, openvino"
        )

    @abc.abstractmethod
    def close(self) -> None:
        """Free what is held; safe to call twice."""

    def __enter__(self) -> Self:
        """Return the open backend."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


class Made(NamedTuple):
    """What an engine turned out to be: its ports, its profiles, and what it was built with.

    Attributes:
        input: as Backend.input.
        outputs: as Backend.outputs.
        batches: one per optimisation profile.
        made_with: what must be the same to open it: version of the runtime, compute capability, GPU.
        facts: what else is worth keeping: seconds, memory, flags in force.
        absent: what this machine lacks to open it, empty when it can.
    """

    input: TensorSpec
    outputs: tuple[str, ...]
    batches: tuple[Batch, ...]
    made_with: Mapping[str, str]
    facts: Mapping[str, str]
    absent: str = ""


class Engine(Backend):
    """A backend that opens a file built for it, which has a sidecar beside it.

    Attributes:
        suffix: of the file it opens.
        ingredients: the choices of a recipe that mean something to it.
    """

    suffix: ClassVar[str]
    ingredients: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    @abc.abstractmethod
    def build(cls, source: Path, out: Path, recipe: Recipe, progress: Progress) -> Made:
        """Write an engine for a file of the kind that `takes` names.

        Raises:
            UnavailableError: the runtime, or what it needs to build, is missing or unable; a layer that it
                cannot build is named.
            ReplkError: the source or the recipe cannot be taken.
        """

    @classmethod
    def refit(cls, engine: Path, source: Path, out: Path, progress: Progress) -> Made:
        """Write an engine like `engine` with the weights of `source`, without building anew.

        Raises:
            UnavailableError: the runtime cannot, or the engine was not built for it.
        """
        del source, out, progress
        raise UnavailableError(f"{cls.name} cannot replace the weights of {engine}", "build it anew: replk build")
