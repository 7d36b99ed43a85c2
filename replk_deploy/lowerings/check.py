"""Every rewritten place of a graph, evaluated alone in float64 against the convolution that it replaces.

Both are read from the files, weights included, and widened. A whole graph compared in float32 hides a
misplaced tap in round-off; here it stands alone.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ShapeInferencePass
from torch import Tensor
from torch.nn import functional

from replk_deploy import graph
from replk_deploy.errors import MismatchError
from replk_deploy.lowerings.base import LAYOUTS, Layout, constant_of, lengths, name_apart

IMAGES = 2
DOUBT = "the lowered file is not one of the original: lower it again"


def check_sites(before: Path, after: Path, *, seed: int = 0) -> dict[str, float]:
    """Return the error of each convolution that reads otherwise in the second file, by the name of its node.

    The error is the largest, over images and channels, of |difference| / |answer|, both L2 over the map, for
    normal random input. An exact rewrite stays near 1e-15; one tap out of place shows from 1e-4 on.

    Raises:
        ReplkError: not a whole ONNX file.
        MismatchError: a convolution has gone without a trace.
    """
    first, second = (ir.from_proto(graph.load(path)) for path in (before, after))
    ShapeInferencePass(check_type=False, strict_mode=False)(first)
    name_apart(first.graph)
    made = {str(value.name): value for node in second.graph for value in node.outputs}
    places = _places(second.graph, {str(node.name) for node in first.graph})
    errors = {}
    for node in first.graph:
        if node.op_type == "Conv" and not node.domain and constant_of(node.inputs[1]) is not None:
            name, output = str(node.name), str(node.outputs[0].name)
            turned = re.compile(rf"{re.escape(output)}(_\d+)?({'|'.join(re.escape(of.suffix) for of in LAYOUTS)})")
            result = next((v for v in reversed(places[name]) if turned.fullmatch(str(v.name))), made.get(output))
            if result is None:
                raise MismatchError(f"{name} is not in {after}", DOUBT)
            if not _same(node, result.producer()):
                errors[name] = _error(node, result, places[name], torch.Generator().manual_seed(seed))
    return errors


def _places(graph: ir.Graph, known: Collection[str]) -> Mapping[str, list[ir.Value]]:
    """Return what is computed in the place of each node, by its name, in order; nodes that are known are in none."""
    found: dict[str, list[ir.Value]] = defaultdict(list)
    for node in graph:
        if node.name not in known:
            found[str(node.name).rpartition("/")[0]] += node.outputs
    return found


def _same(node: ir.Node, other: ir.Node | None) -> bool:
    """Tell whether another node is the same convolution."""
    if other is None or other.op_type != node.op_type or len(other.inputs) != len(node.inputs):
        return False
    if {k: a.value for k, a in node.attributes.items()} != {k: a.value for k, a in other.attributes.items()}:
        return False
    constants = [(constant_of(a), constant_of(b)) for a, b in zip(node.inputs[1:], other.inputs[1:], strict=True)]
    return all(a is b or (a and b and a.shape == b.shape and a.tobytes() == b.tobytes()) for a, b in constants)


def _error(node: ir.Node, result: ir.Value, place: Collection[ir.Value], generator: torch.Generator) -> float:
    name = str(node.name)
    match lengths(node.inputs[0]):
        case [_, int(channels), int(high), int(wide)]:
            x = torch.randn(IMAGES, channels, high, wide, dtype=torch.float64, generator=generator)
        case shape:
            raise MismatchError(f"{name} was rewritten for a map of unknown size, {shape}", DOUBT)
    entry = _entry(name, result, place)
    wanted = _operator(node, [x, *map(_constant, node.inputs[1:])])
    layout = _layout(entry)
    got = _value(result, {entry: x.permute(layout.axes).flatten(1) if layout else x})
    layout = _layout(result)
    if layout:
        got = got.reshape([wanted.shape[axis] for axis in layout.axes]).permute(layout.back)
    if got.shape != wanted.shape:
        raise MismatchError(f"{name} gives {tuple(got.shape)} instead of {tuple(wanted.shape)}", DOUBT)
    off, size = (of.flatten(2).norm(dim=2) for of in (got - wanted, wanted))
    return float(torch.where(off == 0, 0, off / size).max())


def _layout(value: ir.Value) -> Layout | None:
    """Return the layout that the name of a value states."""
    return next((layout for layout in LAYOUTS if str(value.name).endswith(layout.suffix)), None)


def _entry(name: str, result: ir.Value, place: Collection[ir.Value]) -> ir.Value:
    """Return the one value that a place of the graph works on."""
    entries: dict[ir.Value, None] = {}
    todo = [result]
    while todo:
        value = todo.pop()
        producer = value.producer()
        if constant_of(value) is not None:
            continue
        if producer is not None and (value is result or value in place):
            todo += [v for v in producer.inputs if v is not None]
        else:
            entries[value] = None
    if len(entries) != 1:
        raise MismatchError(f"{name} works on {len(entries)} values in the lowered file", DOUBT)
    return next(iter(entries))


def _value(value: ir.Value, known: dict[ir.Value, Tensor]) -> Tensor:
    """Evaluate a value from what is known, without recursion into anything but the place itself."""
    if value not in known:
        producer = value.producer()
        if constant_of(value) is not None:
            known[value] = _constant(value)
        elif producer is None:
            raise MismatchError(f"{value.name} comes from outside of what was rewritten", DOUBT)
        else:
            known[value] = _operator(producer, [_value(v, known) for v in producer.inputs if v is not None])
    return known[value]


def _constant(value: ir.Value | None) -> Tensor:
    tensor = constant_of(value)
    if tensor is None:
        raise MismatchError(f"{'' if value is None else value.name} is no constant", DOUBT)
    array = tensor.numpy()
    return torch.from_numpy(array.astype("int64" if array.dtype.kind in "iu" else "float64"))


def _operator(node: ir.Node, inputs: list[Tensor]) -> Tensor:
    if node.op_type not in OPERATORS:
        raise MismatchError(f"{node.name} is a {node.op_type}, which no rewrite writes", DOUBT)
    return OPERATORS[node.op_type](node.attributes, *inputs)


def _conv(said: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    same = [size // 2 for size in weight.shape[2:]]
    default = same * 2 if said.get_string("auto_pad", "NOTSET").startswith("SAME") else [0] * 4
    top, left, bottom, right = said.get_ints("pads", default)
    x = functional.pad(x, (left, right, top, bottom))
    stride = tuple(said.get_ints("strides", [1, 1]))
    return functional.conv2d(x, weight, bias, stride=stride, groups=said.get_int("group", 1))


def _reshape(_said: Any, x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape.tolist())])


def _slice(_said: Any, x: Tensor, *at: Tensor) -> Tensor:
    start, end, axis = (int(n) for n in at)
    return x.narrow(axis, start, end - start)


def _gemm(_said: Any, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    return a @ b if c is None else a @ b + c


OPERATORS: Mapping[str, Callable[..., Tensor]] = {
    "Conv": _conv,
    "Reshape": _reshape,
    "Slice": _slice,
    "Gemm": _gemm,
    "Transpose": lambda said, x: x.permute(*said.get_ints("perm")),
    "MatMul": lambda _said, a, b: a @ b,
    "Add": lambda _said, a, b: a + b,
}
