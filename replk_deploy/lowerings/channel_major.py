"""Stretches of a graph that stay channel by channel: [C, N·H·W] instead of [N, C, H, W].

Dense rewrites work on [C, N, H·W]. Between two of them a network does what does not care about layout
(ReLU, GELU, sums) and 1x1 convolutions, which are one matrix product W[Co, Ci] · X[Ci, N·H·W] there, for
any batch. So a whole stretch keeps it, and only its borders transpose.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from replk_deploy.lowerings.base import LargeConv, Writer, constant_of, lengths
from replk_deploy.lowerings.dense import Dense

SUFFIX = ".channel_major"  # of the name of a value in that layout
FEWEST = 2  # dense rewrites that make a stretch worth its borders
POINTWISE = {
    *("Relu", "Gelu", "Erf", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Softplus"),
    *("Clip", "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Identity"),
}

Operands = tuple[LargeConv, ir.Value, ir.Value | None]


def chains(graph: ir.Graph, dense: Collection[ir.Node]) -> list[list[ir.Node]]:
    """Find the stretches of nodes that can share the layout and hang together, each in the order of the graph.

    Args:
        graph: with the shapes of its values.
        dense: the convolutions that become dense rewrites.

    Returns:
        Those with two dense rewrites or more; no node and no value is in two.
    """
    leader: dict[object, object] = {}

    def root(of: object) -> object:
        while leader.setdefault(of, of) is not of:
            of = leader[of]
        return of

    fit = [node for node in graph if node in dense or _is_1x1(node) or _is_pointwise(node)]
    for node in fit:
        for value in (*_activations(node), node.outputs[0]):
            leader[root(value)] = root(node)
    found: dict[object, list[ir.Node]] = {}
    for node in fit:
        found.setdefault(root(node), []).append(node)
    return [nodes for nodes in found.values() if sum(node in dense for node in nodes) >= FEWEST]


def rewrite(graph: ir.Graph, chain: Sequence[ir.Node], dense: Mapping[ir.Node, Operands]) -> None:
    """Put one stretch into the layout, and transpose where values come in and go out.

    Args:
        graph: changed in place.
        chain: as `chains` found it.
        dense: site, weight and bias of each dense rewrite in it.
    """
    inside, turned = set(chain), dict[ir.Value, ir.Value]()
    for node in chain:
        write, old = Writer(node.name or str(node.outputs[0].name)), node.outputs[0]
        for value in _activations(node):
            if value not in turned:
                turned[value] = _enter(write, value)
        if node in dense:
            turned[old] = _dense(write, turned[_activations(node)[0]], *dense[node])
        elif node.op_type == "Conv":
            turned[old] = _product(graph, write, node, turned)
        else:
            turned[old] = _pointwise(graph, write, node, turned)
        turned[old].name = f"{old.name}{SUFFIX}"
        readers = [(user, index) for user, index in old.uses() if user not in inside]
        if readers or old.is_graph_output():
            left = _leave(write, turned[old], old)
            for user, index in readers:
                user.replace_input_with(index, left)
            for index, output in enumerate(graph.outputs):
                if output is old:
                    graph.outputs[index] = left
        for constant in write.constants:
            graph.register_initializer(constant)
        graph.insert_before(node, write.nodes)
    graph.remove(chain, safe=True)


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


def _constant(graph: ir.Graph, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """Return a constant in another shape; equal ones are stored once."""
    name, tensor = f"{value.name}{SUFFIX}", constant_of(value)
    if name not in graph.initializers:
        assert tensor is not None  # noqa: S101  # asked for constants only
        made = ir.tensor(tensor.numpy().reshape(shape), dtype=tensor.dtype, name=name)
        graph.register_initializer(ir.val(name, dtype=made.dtype, shape=shape, const_value=made))
    return graph.initializers[name]


def _enter(write: Writer, value: ir.Value) -> ir.Value:
    volume = _volume(value)
    assert volume is not None  # noqa: S101  # or its reader would not be in a chain
    planes = write.reshape(value, 0, volume[0], volume[1] * volume[2])
    made = write.reshape(write.op("Transpose", planes, perm=[1, 0, 2]), 0, -1)
    made.name = f"{value.name}{SUFFIX}"
    return made


def _leave(write: Writer, value: ir.Value, old: ir.Value) -> ir.Value:
    volume = _volume(old)
    assert volume is not None  # noqa: S101  # or its maker would not be in a chain
    planes = write.reshape(value, volume[0], -1, volume[1] * volume[2])
    left = write.reshape(write.op("Transpose", planes, perm=[1, 0, 2]), 0, *volume)
    left.name, left.shape, left.type = old.name, old.shape, old.type
    return left


def _dense(write: Writer, x: ir.Value, site: LargeConv, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    planes = write.reshape(x, site.channels, -1, math.prod(site.map))
    return write.reshape(Dense.product(write, planes, weight, bias), 0, -1)


def _product(graph: ir.Graph, write: Writer, node: ir.Node, turned: Mapping[ir.Value, ir.Value]) -> ir.Value:
    x, weight, *bias = (value for value in node.inputs if value is not None)
    tensor = constant_of(weight)
    assert tensor is not None  # noqa: S101  # see _is_1x1
    rows, columns, *_ = tensor.numpy().shape
    matrix = _constant(graph, weight, (rows, columns))
    return write.op("Gemm", matrix, turned[x], *(_constant(graph, value, (rows, 1)) for value in bias))


def _pointwise(graph: ir.Graph, write: Writer, node: ir.Node, turned: Mapping[ir.Value, ir.Value]) -> ir.Value:
    volume = _volume(node.outputs[0])
    assert volume is not None  # noqa: S101  # or it would not be in a chain

    def fitted(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        if value in turned:
            return turned[value]
        shape = _per_channel(value, volume[0])
        return _constant(graph, value, shape) if shape else value

    made = write.op(node.op_type, *map(fitted, node.inputs))
    write.nodes[-1].name = node.name
    write.nodes[-1].attributes.update(node.attributes)
    made.type = node.outputs[0].type
    return made
