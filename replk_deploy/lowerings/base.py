"""What every exact rewrite of a large depthwise convolution promises.

With stride 1, P = K // 2 and zeros beyond the map, such a convolution is

    y[n,c,o,q] = Σ_{i,j} w[c, i−o+P, j−q+P] · x[n,c,i,j]     (w is 0 outside 0..K−1)

so its output is linear in the rows and columns of the map, with a weight that depends on distances
only. A rewrite writes that weight out as the operand of an operator that runtimes are good at: every
element of it is an element of w or an exact zero, and nothing is rounded. What may differ is the
order of a sum.

A tap further from the centre than the map is wide meets nothing but padding: `crop` takes it away first.
"""

import abc
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import Tensor, nn

from replk_deploy.errors import ReplkError

Array = npt.NDArray[Any]
LARGE = 7  # from here on a kernel is large, in one direction at least
MOST_ELEMENTS = 2**30  # of one weight: 2 GiB in half precision, which no ONNX file holds


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeConv:
    """One depthwise convolution, stride 1 and "same" padding, on a map of known size.

    Attributes:
        name: of the module, or of the node in a file.
        kernel: height and width, both odd, as stored.
        map: height and width.
    """

    name: str
    channels: int
    kernel: tuple[int, int]
    map: tuple[int, int]

    @property
    def taps(self) -> tuple[int, int]:
        """Return height and width of what can touch the map: what `crop` leaves of the kernel."""
        return min(self.kernel[0], 2 * self.map[0] - 1), min(self.kernel[1], 2 * self.map[1] - 1)

    @property
    def padding(self) -> tuple[int, int]:
        """Return the zeros that the cropped kernel needs above and below, left and right."""
        return self.taps[0] // 2, self.taps[1] // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A large depthwise convolution, before anything is known of whether it can be rewritten.

    Attributes:
        map: None where height or width vary.
        itemsize: bytes of one number of its weight.
        why: what keeps it as it is; empty when nothing does.
    """

    name: str
    channels: int
    kernel: tuple[int, int]
    map: tuple[int, int] | None
    itemsize: int
    why: str


def crop(site: LargeConv, kernel: Array) -> Array:
    """Return the taps of a kernel [C, 1, K, k] that can touch the map, as [C, 1, *site.taps]."""
    rows, columns = ((size - taps) // 2 for size, taps in zip(site.kernel, site.taps, strict=True))
    return kernel[:, :, rows : rows + site.taps[0], columns : columns + site.taps[1]]


def centre(kernel: Array, size: tuple[int, int]) -> Array:
    """Return a kernel [C, 1, K, k] in the middle of zeros, [C, *size]; margins must be even."""
    channels, _, high, wide = kernel.shape
    top, left = (size[0] - high) // 2, (size[1] - wide) // 2
    out = np.zeros((channels, *size), kernel.dtype)
    out[:, top : top + high, left : left + wide] = kernel[:, 0]
    return out


class Lowering(abc.ABC):
    """One exact rewrite of a large depthwise convolution; classes without state, so never made."""

    name: ClassVar[str]

    @classmethod
    def refusal(cls, site: LargeConv) -> str | None:
        """Say why it does not apply here; None when it does. It does not say whether it is faster."""
        elements = cls.elements(site)
        return f"its weight would have {elements:.1e} elements" if elements > MOST_ELEMENTS else None

    @classmethod
    @final
    def weight(cls, site: LargeConv, kernel: Array) -> Array:
        """Write out a kernel [C, 1, K, k] as the weight of the rewrite: moved values and zeros, same type."""
        return cls.placed(site, crop(site, kernel)).copy().reshape(cls.shape(site))

    @classmethod
    @final
    def elements(cls, site: LargeConv) -> int:
        """Count the elements of the weight."""
        return math.prod(cls.shape(site))

    @classmethod
    @final
    def module(cls, site: LargeConv, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Return the rewrite as a module, [N, C, H, W] to the same; weight and bias as written out here."""
        return Rewritten(cls, site, weight, bias)

    @classmethod
    @abc.abstractmethod
    def shape(cls, site: LargeConv) -> tuple[int, ...]:
        """Return the shape of the weight."""

    @classmethod
    @abc.abstractmethod
    def placed(cls, site: LargeConv, kernel: Array) -> Array:
        """Place a cropped kernel; the result has as many elements as the weight, in its order."""

    @classmethod
    @abc.abstractmethod
    def bias(cls, site: LargeConv, bias: Array) -> Array:
        """Write out a bias [C] for the rewrite."""

    @classmethod
    @abc.abstractmethod
    def macs(cls, site: LargeConv) -> int:
        """Count the multiply-adds that the rewrite executes for one image, padding and zeros counted."""

    @classmethod
    @abc.abstractmethod
    def apply(cls, site: LargeConv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the convolution of [N, C, H, W] with what `weight` and `bias` gave."""

    @classmethod
    @abc.abstractmethod
    def nodes(cls, site: LargeConv, write: "Writer", x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Write the same as standard ONNX operators, for any batch, and return the last value."""


class Layout(NamedTuple):
    """An order of activations with the channels outermost, flattened to [C, rest].

    Attributes:
        suffix: of the name of a value that lies so.
        axes: of [N, C, H, W], in the order in which they lie.
    """

    suffix: str
    axes: tuple[int, int, int, int]

    @property
    def back(self) -> list[int]:
        """Return the axes of this order in that of [N, C, H, W]."""
        return [self.axes.index(axis) for axis in range(4)]

    def shape(self, volume: tuple[int, int, int]) -> list[int]:
        """Return channels, height and width in this order, and -1 for the images."""
        return [(-1, *volume)[axis] for axis in self.axes]


BY_IMAGE = Layout(".cnhw", (1, 0, 2, 3))
BY_ROW = Layout(".chnw", (1, 2, 0, 3))
LAYOUTS = (BY_IMAGE, BY_ROW)


class ChannelMajor(Lowering):
    """A rewrite that needs no transposition where activations lie channel by channel."""

    layout: ClassVar[Layout]

    @classmethod
    @abc.abstractmethod
    def flat(cls, site: LargeConv, write: "Writer", x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Write it on [C, rest] in its layout, for any batch, and return the last value, which lies alike."""


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return what a value always is: an initializer or the result of a Constant node; None for every other."""
    return None if value is None else ir.convenience.get_const_tensor(value)


def name_apart(graph: ir.Graph) -> None:
    """Give each node without a name, or with that of another, the name of its first result, in place."""
    counts = Counter(node.name for node in graph)
    alone = {name for name, count in counts.items() if name and count == 1}
    taken = set(alone)
    for node in graph:
        if node.name not in alone:
            name = str(node.outputs[0].name) if node.outputs and node.outputs[0].name else node.op_type
            while name in taken:
                name = f"{name}'"
            taken.add(name)
            node.name = name


def lengths(value: ir.Value | None) -> list[int | None] | None:
    """Return the shape of a value, None where a length varies; None when nothing is known of it."""
    constant = constant_of(value)
    shape = constant.shape if constant is not None else None if value is None else value.shape
    return None if shape is None else [length if isinstance(length, int) else None for length in shape]


@final
class Rewritten(nn.Module):
    """A large depthwise convolution in another form."""

    def __init__(self, lowering: type[Lowering], site: LargeConv, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.lowering, self.site = lowering, site
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape.

        Raises:
            ReplkError: another map than the one it was written for.
        """
        if tuple(x.shape[1:]) != (self.site.channels, *self.site.map):
            high, wide = self.site.map
            raise ReplkError(
                f"{self.site.name} is lowered for maps of {high}x{wide} and meets {tuple(x.shape[1:])}",
                "lower the network for the size of these images",
            )
        return self.lowering.apply(self.site, x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Say which rewrite of what this is."""
        return f"{self.lowering.name}, {self.site}"


class Additions:
    """What a rewrite adds to a graph: no name that is taken, and no constant twice."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        nodes = list(ir.traversal.RecursiveGraphIterator(graph))
        values = [*graph.inputs, *graph.initializers.values(), *(v for n in nodes for v in (*n.inputs, *n.outputs))]
        self._names = {node.name for node in nodes} | {value.name for value in values if value is not None}
        self._made: dict[tuple[ir.Value, str, tuple[int, ...]], ir.Value] = {}

    def name(self, stem: str, suffix: str = "") -> str:
        """Take a free name for a node or a value."""
        found, count = f"{stem}{suffix}", 1
        while found in self._names:
            count += 1
            found = f"{stem}_{count}{suffix}"
        self._names.add(found)
        return found

    def constant(
        self, value: ir.Value, suffix: str, shape: tuple[int, ...], place: Callable[[Array], Array]
    ) -> ir.Value:
        """Return what becomes of a constant, registered in the graph and written out when the file is saved."""
        key = value, suffix, shape
        if key not in self._made:
            tensor, name = constant_of(value), self.name(f"{value.name}{suffix}")
            assert tensor is not None  # noqa: S101  # asked for constants only

            def write_out() -> ir.TensorProtocol:
                return ir.tensor(place(tensor.numpy()), dtype=tensor.dtype, name=name)

            lazy = ir.LazyTensor(write_out, dtype=tensor.dtype, shape=ir.Shape(shape), name=name)
            self._made[key] = ir.val(name, dtype=tensor.dtype, shape=shape, const_value=lazy)
            self._graph.register_initializer(self._made[key])
        return self._made[key]


class Writer:
    """Writes operators one after the other, each named after the place that it stands for.

    Attributes:
        nodes: in order.
        constants: values to register as initializers.
    """

    def __init__(self, place: str, additions: Additions) -> None:
        self._place, self._additions = place, additions
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append an operator with one output, which is of the type of the first input."""
        made = ir.node(kind, inputs, attributes)
        made.name = made.outputs[0].name = self._name(kind)
        if inputs[0] is not None:
            made.outputs[0].type = inputs[0].type
        self.nodes.append(made)
        return made.outputs[0]

    def integers(self, name: str, numbers: Sequence[int]) -> ir.Value:
        """Return a constant list of integers."""
        return self.constant(self._name(name), np.asarray(numbers, np.int64))

    def constant(self, name: str, array: Array) -> ir.Value:
        """Return a constant."""
        tensor = ir.tensor(array, name=name)
        value = ir.val(name, dtype=tensor.dtype, shape=array.shape, const_value=tensor)
        self.constants.append(value)
        return value

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Append a Reshape, in which 0 stands for the length that is there and -1 for what is left."""
        return self.op("Reshape", x, self.integers("shape", shape))

    def _name(self, kind: str) -> str:
        return self._additions.name(f"{self._place}/{kind}")
