"""What every family of networks promises to the steps."""

import abc
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

Form = Literal["training", "merged", "folded"]
Shapes = Mapping[str, tuple[int, ...]]


class Fold(NamedTuple):
    """One BatchNorm, by name, and the map that takes it in; `into` is `norm` itself when it stands alone."""

    norm: str
    into: str
    side: Literal["after", "before", "alone"]


class Geometry(Protocol):
    """The shape of one network: enough to build it, small enough for a file header."""

    @property
    def label(self) -> str:
        """Name the variant, or describe the geometry in a few words."""

    @property
    def classes(self) -> int | None:
        """Count the classes; None for a backbone."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Name what the network returns, in order."""

    @property
    def stride(self) -> int:
        """Give the largest down-sampling factor: inputs are normally multiples of it."""


class Network(nn.Module, abc.ABC):
    """A network in one of three forms: training, merged (BatchNorm left), folded (none left).

    `exact_gelu` says that its GELU is the erf form, which no export may replace by the tanh form.
    """

    family: ClassVar[str]
    exact_gelu: ClassVar[bool] = True
    geometry: Any
    form: Form

    @classmethod
    @abc.abstractmethod
    def infer(cls, shapes: Shapes) -> tuple[Any, Form]:
        """Read geometry and form from tensor shapes; ValueError in words when they do not tell."""

    @classmethod
    @abc.abstractmethod
    def parse(cls, text: str) -> Any:
        """Read a geometry back from the text that `describe` gave."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Write the geometry as one line of JSON."""

    @abc.abstractmethod
    def folds(self) -> Iterator[Fold]:
        """Name each BatchNorm outside a Reparam and where it goes, in the order they must be folded."""

    @abc.abstractmethod
    def blocks(self) -> Iterator[str]:
        """Name the submodules that `forward` chains before the head, in order."""

    @abc.abstractmethod
    def head_of(self, features: Tensor) -> Tensor:
        """Map the last block's output to the last output of the network."""

    @abc.abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return one tensor per name in `geometry.outputs`, for images [N, 3, H, W]."""

    @classmethod
    @abc.abstractmethod
    def build(cls, geometry: Any, form: Form) -> Self:
        """Build the network in eval mode, randomly initialised."""

    @classmethod
    def empty(cls, geometry: Any, form: Form) -> Self:
        """Build the network without memory for its weights; fill it with load_state_dict(assign=True)."""
        with torch.device("meta"):
            return cls.build(geometry, form)
