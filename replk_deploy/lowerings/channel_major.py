"""Stretches of a graph that stay channel by channel: [C, rest] instead of [N, C, H, W].

Dense rewrites work on [C, N, H·W], grouped ones on [C, H, N, W]. Between two of them a network does what does
not care about layout (ReLU, GELU, sums) and 1x1 convolutions, which are one matrix product
W[Co, Ci] · X[Ci, N·H·W] in either order, for any batch. So a whole stretch keeps the one that most of its
rewrites want: only its borders transpose, and rewrites that want the other.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir

from replk_deploy.lowerings.base import Additions, ChannelMajor, LargeConv, Layout, Writer, constant_of, lengths

SUFFIX = ".channel_major"  # of the name of a constant in the shape that it has there
FEWEST = 2  # rewrites that make a stretch worth its borders
POINTWISE = {
    *("Relu", "Gelu", "Erf", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Softplus"),
    *("Clip", "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Identity"),
}


class Place(NamedTuple):
    """A large convolution in a stretch, and what it becomes."""

    form: type[ChannelMajor]
    site: LargeConv
    weight: ir.Value
    bias: ir.Value | None

    @property
    def volume(self) -> tuple[int, int, int]:
        """Return channels, height and width."""
        return self.site.channels, *self.site.map


def chains(graph: ir.Graph, large: Collection[ir.Node]) -> list[list[ir.Node]]:
    """Find the stretches of nodes that can share a layout and hang together, each in the order of the graph.

    Args:
        graph: with the shapes of its values.
        large: the convolutions whose rewrites work in one.

    Returns:
        Those with two of these or more; no node and no value is in two.
    """
    leader: dict[object, object] = {}

    def root(of: object) -> object:
        while leader.setdefault(of, of) is not of:
            of = leader[of]
        return of

    fit = [node for node in graph if node in large or _is_1x1(node) or _is_pointwise(node)]
    for node in fit:
        for value in (*_activations(node), node.outputs[0]):
            leader[root(value)] = root(node)
    found: dict[object, list[ir.Node]] = {}
    for node in fit:
        found.setdefault(root(node), []).append(node)
    return [nodes for nodes in found.values() if sum(node in large for node in nodes) >= FEWEST]


def rewrite(graph: ir.Graph, chain: Sequence[ir.Node], large: Mapping[ir.Node, Place], additions: Additions) -> None:
    """Put one stretch into the layout that suits it, and transpose where values come in and go out.

    Args:
        graph: changed in place.
        chain: as `chains` found it.
        large: what each large convolution in it becomes.
        additions: to the graph.
    """
    layout = _layout(large.values())
    inside, turned = set(chain), dict[ir.Value, ir.Value]()
    for node in chain:
        write, old = Writer(str(node.name), additions), node.outputs[0]
        for value in _activations(node):
            if value not in turned:
                turned[value] = write.reshape(write.op("Transpose", value, perm=layout.axes), 0, -1)
                turned[value].name = additions.name(str(value.name), layout.suffix)
        if node in large:
            turned[old] = _large(write, turned[_activations(node)[0]], layout, large[node])
        elif node.op_type == "Conv":
            turned[old] = _product(additions, write, node, turned)
        else:
            turned[old] = _pointwise(additions, write, node, turned)
        turned[old].name = additions.name(str(old.name), layout.suffix)
        readers = [(user, index) for user, index in old.uses() if user not in inside]
        if readers or old.is_graph_output():
            left = _leave(write, turned[old], old, layout)
            for user, index in readers:
                user.replace_input_with(index, left)
            for index, output in enumerate(graph.outputs):
                if output is old:
                    graph.outputs[index] = left
        for constant in write.constants:
            graph.register_initializer(constant)
        graph.insert_before(node, write.nodes)
    graph.remove(chain, safe=True)


def _layout(places: Iterable[Place]) -> Layout:
    """Return the layout in which the fewest channels are transposed."""
    wanted: Counter[Layout] = Counter()
    for place in places:
        wanted[place.form.layout] += place.site.channels
    return wanted.most_common(1)[0][0]


def _volume(value: ir.Value | None) -> tuple[int, int, int] | None:
    """Return channels, height and width of [N, C, H, W], or None."""
    match lengths(value):
        case [_, int(channels), int(high), int(wide)]:
            return channels, high, wide
        case _:
            return None


def _activations(node: ir.Node) -> list[ir.Value]:
    """Return what a node computes with, apart from its weights and other constants."""
    values = node.inputs[:1] if node.op_type == "Conv" else node.inputs
    return list(dict.fromkeys(v for v in values if v is not None and constant_of(v) is None))


def _is_1x1(node: ir.Node) -> bool:
    if node.op_type != "Conv" or node.domain or _volume(node.inputs[0]) is None:
        return False
    said, constants = node.attributes, [value for value in node.inputs[1:] if value is not None]
    weight = lengths(constants[0])
    return (
        weight is not None
        and weight[2:] == [1, 1]
        and said.get_int("group", 1) == 1
        and set(said.get_ints("strides", [1])) == {1}
        and set(said.get_ints("pads", [0])) == {0}
        and all(constant_of(value) is not None and not value.is_graph_input() for value in constants)
    )


def _is_pointwise(node: ir.Node) -> bool:
    volume, activations = _volume(node.outputs[0]), _activations(node)
    if node.op_type not in POINTWISE or node.domain or volume is None or not activations:
        return False
    constants = (value for value in node.inputs if constant_of(value) is not None)
    batches = {value.shape[0] for value in (*activations, node.outputs[0]) if value.shape is not None}
    return (
        all(_volume(value) == volume for value in activations)
        and (len(activations) == 1 or (len(batches) == 1 and batches != {ir.SymbolicDim(None)}))
        and all(_per_channel(value, volume[0]) is not None for value in constants)
    )


def _per_channel(value: ir.Value | None, channels: int) -> tuple[int, ...] | None:
    """Return the shape that a constant takes in the layout, () where it fits as it is; None where it cannot."""
    match lengths(value):
        case [] | [1]:
            return ()
        case [1, 1, 1] | [1, 1] | [1, 1, 1, 1]:
            return (1,)
        case [int(length), 1, 1] | [1, int(length), 1, 1] if length == channels:
            return channels, 1
        case _:
            return None


def _constant(additions: Additions, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """Return a constant in another shape."""
    return additions.constant(value, SUFFIX, shape, lambda array: array.reshape(shape))


def _leave(write: Writer, value: ir.Value, old: ir.Value, layout: Layout) -> ir.Value:
    volume = _volume(old)
    assert volume is not None  # noqa: S101  # or its maker would not be in a chain
    left = write.op("Transpose", write.reshape(value, *layout.shape(volume)), perm=layout.back)
    left.name, left.shape, left.type = old.name, old.shape, old.type
    return left


def _large(write: Writer, x: ir.Value, layout: Layout, place: Place) -> ir.Value:
    own = place.form.layout
    y = place.form.flat(place.site, write, _turn(write, x, layout, own, place), place.weight, place.bias)
    return _turn(write, y, own, layout, place)


def _turn(write: Writer, x: ir.Value, was: Layout, wanted: Layout, place: Place) -> ir.Value:
    if was == wanted:
        return x
    perm = [was.axes.index(axis) for axis in wanted.axes]
    return write.reshape(write.op("Transpose", write.reshape(x, *was.shape(place.volume)), perm=perm), 0, -1)


def _product(additions: Additions, write: Writer, node: ir.Node, turned: Mapping[ir.Value, ir.Value]) -> ir.Value:
    x, weight, *bias = (value for value in node.inputs if value is not None)
    tensor = constant_of(weight)
    assert tensor is not None  # noqa: S101  # see _is_1x1
    rows, columns, *_ = tensor.numpy().shape
    matrix = _constant(additions, weight, (rows, columns))
    return write.op("Gemm", matrix, turned[x], *(_constant(additions, value, (rows, 1)) for value in bias))


def _pointwise(additions: Additions, write: Writer, node: ir.Node, turned: Mapping[ir.Value, ir.Value]) -> ir.Value:
    volume = _volume(node.outputs[0])
    assert volume is not None  # noqa: S101  # or it would not be in a chain

    def fitted(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        if value in turned:
            return turned[value]
        shape = _per_channel(value, volume[0])
        return _constant(additions, value, shape) if shape else value

    made = write.op(node.op_type, *map(fitted, node.inputs))
    write.nodes[-1].name = node.name
    write.nodes[-1].attributes.update(node.attributes)
    made.type = node.outputs[0].type
    return made
