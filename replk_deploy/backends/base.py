"""The one contract of all runtimes: open a file, answer, be timed, close."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Protocol, Self, final

import numpy as np
import numpy.typing as npt

from replk_deploy.errors import ContractError, ReplkError
from replk_deploy.precision import Precision

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]


class Launch(Protocol):
    """One prepared inference: input already on the device, output left there."""

    def enqueue(self) -> None:
        """Start one inference; may return early."""

    def wait(self) -> None:
        """Return when all that was started has finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, type and shape of an input or output; None where a dimension may vary."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Backend(abc.ABC):
    """One artefact, open on one runtime, ready to answer. A context manager.

    Attributes:
        name: key in BACKENDS.
        takes: which file of a run it starts from.
        precisions: what it can execute.
        input: one image batch, [N, 3, H, W] floating or [N, H, W, 3] uint8.
        outputs: names, in order.
        precision: that of the open artefact.
        facts: versions, threads, layout, as used.
    """

    name: ClassVar[str]
    takes: ClassVar[Literal["weights", "onnx"]]
    precisions: ClassVar[frozenset[Precision]]
    input: TensorSpec
    outputs: tuple[str, ...]
    precision: Precision
    facts: Mapping[str, str]

    @classmethod
    @abc.abstractmethod
    def probe(cls) -> Mapping[str, str]:
        """Return versions and device, or raise UnavailableError with the install line."""

    @abc.abstractmethod
    def __init__(self, artefact: Path) -> None:
        """Open a file; ReplkError when it is not one that this runtime can take."""

    @final
    def run(self, images: Array) -> dict[str, Array]:
        """Answer one batch; the result is the caller's to keep, float32 and complete.

        Raises:
            ReplkError: shape or type is not what the artefact takes.
            ContractError: the runtime answered something else than it promised.
        """
        self.check(images)
        answer = {name: np.array(out, dtype=np.float32) for name, out in self._run(images).items()}
        if tuple(answer) != self.outputs or any(len(out) != len(images) for out in answer.values()):
            shapes = {name: out.shape for name, out in answer.items()}
            raise ContractError(f"{self.name} answered {shapes} to {images.shape}, promised {self.outputs}")
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

    @abc.abstractmethod
    def _run(self, images: Array) -> Arrays:
        """Answer by output name, in order, on the host; float32 images are cast to the input's type."""

    @abc.abstractmethod
    def prepare(self, images: Array) -> Launch:
        """Put a batch where the runtime wants it; what bench times, with bench's own clock."""

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
