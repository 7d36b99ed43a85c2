"""Where a network convolves and multiplies matrices, what that costs there, and which layer of a runtime it is."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from replk_deploy import graph
from replk_deploy.lowerings.base import LARGE
from replk_deploy.models.base import Network

SEPARATORS = re.compile(r"[\s+,()\[\]{}]+")  # between the names in that of a fused layer
SUFFIXES = re.compile(r"(_nchwc|_token_\d+|_kernel_time)+$")  # what ONNX Runtime appends to a node's name
RANGE = "..."  # stands in a name for layers that are not named


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One convolution or matrix product of a network, and what a whole batch costs there.

    Attributes:
        name: of the module, or of the node in a foreign file.
        channels: of the output.
        kernel: height and width; empty for a matrix product.
        map: what the output has besides batch and channels.
        depthwise: whether each channel has a filter of its own.
        macs: multiply-adds, padding counted.
        inside_macs: of those the ones that touch the map.
        elements: of input, weights and output together.
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("large",)

    name: str
    channels: int
    kernel: tuple[int, ...]
    map: tuple[int, ...]
    depthwise: bool
    macs: int
    inside_macs: int
    elements: int

    @property
    def large(self) -> bool:
        """Tell whether this is a large depthwise kernel."""
        return self.depthwise and max(self.kernel) >= LARGE


def of_network(network: Network, *, batch: int, size: tuple[int, int]) -> dict[str, Site]:
    """Count what each convolution and linear layer of a network costs for a batch, without computing anything."""
    twin = type(network).empty(network.geometry, network.form)
    found: dict[str, Site] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            site = _of_module(name, module, args[0], out)
            found[name] = _again(found[name], site) if name in found else site

        return hook

    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count(name))
    with torch.no_grad():
        twin(torch.empty(batch, 3, *size, device="meta"))
    return found


def of_file(path: Path, shape: tuple[int, ...]) -> dict[str, Site]:
    """Count what each convolution and matrix product of an ONNX file costs for a batch of a shape.

    Nodes whose shapes are not known beforehand are left out.

    Raises:
        ReplkError: not a whole ONNX file.
    """
    model = graph.load(path)
    constants = {tensor.name for tensor in model.graph.initializer}
    port = next(port for port in model.graph.input if port.name not in constants)
    for dim, length in zip(port.type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = length
    del model.graph.value_info[:]  # they may know the batch by a name only
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    sites = (
        _of_node(node, shapes)
        for node in model.graph.node
        if node.op_type in {"Conv", "Gemm", "MatMul"} and {*node.input, *node.output} - {""} <= shapes.keys()
    )
    return {site.name: site for site in sites}


def owners(layer: str, names: Collection[str]) -> tuple[str, ...]:
    """Name the modules, or nodes of a file, that a runtime's layer belongs to, in the order of its name.

    A layer is called after its module (PyTorch), or its node: the module, a slash and the operator. A
    runtime may put more before or behind, or join several; one that stands for a range belongs to none.
    """
    if RANGE in layer:
        return ()
    found: dict[str, None] = {}
    for word in SEPARATORS.split(layer):
        name = SUFFIXES.sub("", word)
        while name and name not in names:
            name = name.rpartition("/")[0]
        if name:
            found[name] = None
    return tuple(found)


def _of_module(name: str, module: nn.Module, x: Tensor, out: Tensor) -> Site:
    if isinstance(module, nn.Linear):
        return _product(name, tuple(x.shape), tuple(module.weight.shape), tuple(out.shape))
    assert isinstance(module, nn.Conv2d)  # noqa: S101  # hooked on nothing else
    said = [] if isinstance(module.padding, str) else [int(p) for p in module.padding]
    return _convolution(
        name,
        tuple(x.shape),
        tuple(module.weight.shape),
        tuple(out.shape),
        groups=module.groups,
        strides=module.stride,
        dilations=module.dilation,
        before=said if any(said) else None,
    )


def _again(first: Site, second: Site) -> Site:
    """Add up two calls of one module."""
    sums = {name: getattr(first, name) + getattr(second, name) for name in ("macs", "inside_macs", "elements")}
    return dataclasses.replace(first, **sums)


def _of_node(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> Site:
    said: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    x, weight, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    name = node.name or node.output[0]
    if node.op_type != "Conv":
        return _product(name, x[::-1] if said.get("transA") else x, weight, out)
    axes = len(weight) - 2
    return _convolution(
        name,
        x,
        weight,
        out,
        groups=said.get("group", 1),
        strides=said.get("strides", [1] * axes),
        dilations=said.get("dilations", [1] * axes),
        before=said["pads"][:axes] if "pads" in said else None,
    )


def _product(name: str, x: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...]) -> Site:
    macs = int(np.prod(out)) * x[-1]
    return Site(
        name=name,
        channels=out[-1],
        kernel=(),
        map=out[1:-1],
        depthwise=False,
        macs=macs,
        inside_macs=macs,
        elements=sum(int(np.prod(shape)) for shape in (x, weight, out)),
    )


def _convolution(
    name: str,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    out: tuple[int, ...],
    *,
    groups: int,
    strides: Sequence[int],
    dilations: Sequence[int],
    before: Sequence[int] | None,
) -> Site:
    """Count a convolution; `before` is the padding before the map, None puts half of what there must be there."""
    axes = tuple(zip(x[2:], out[2:], weight[2:], strides, dilations, strict=True))
    starts = before if before is not None else [_half(*axis) for axis in axes]
    inside = [_inside(*axis, start) for axis, start in zip(axes, starts, strict=True)]
    return Site(
        name=name,
        channels=out[1],
        kernel=weight[2:],
        map=out[2:],
        depthwise=groups == x[1] > 1,
        macs=int(np.prod(out)) * int(np.prod(weight[1:])),
        inside_macs=out[0] * weight[0] * weight[1] * int(np.prod(inside)),
        elements=sum(int(np.prod(shape)) for shape in (x, weight, out)),
    )


def _half(length: int, outputs: int, kernel: int, stride: int, dilation: int) -> int:
    """Return half of the padding that so many outputs need."""
    return max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - length, 0) // 2


def _inside(length: int, outputs: int, kernel: int, stride: int, dilation: int, before: int) -> int:
    """Count, over all outputs of one axis, the taps that fall on the map."""
    places = np.arange(outputs)[:, None] * stride - before + np.arange(kernel)[None] * dilation
    return int(((places >= 0) & (places < length)).sum())
