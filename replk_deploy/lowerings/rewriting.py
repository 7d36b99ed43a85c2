"""Where an ONNX graph convolves with large kernels, and how one such node is replaced.

Weights are written out while the file is saved, one after the other, so that a graph never holds all of
them in memory. Convolutions that share a weight on maps of one size share what it becomes.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from replk_deploy.lowerings import LOWERINGS, channel_major
from replk_deploy.lowerings.base import (
    Additions,
    Candidate,
    ChannelMajor,
    LargeConv,
    Lowering,
    Writer,
    constant_of,
    crop,
    lengths,
)
from replk_deploy.lowerings.channel_major import Place

OPSET = 13  # from which on the operators of all rewrites take every floating type
MAP = 2  # where height and width of [N, C, H, W] begin
BIAS = 2  # which input of a convolution


class Job(NamedTuple):
    """One convolution and what becomes of it; `choice` None crops it and leaves it."""

    node: ir.Node
    site: LargeConv
    choice: str | None


def candidates(graph: ir.Graph, *, least: int, opset: int) -> Iterator[tuple[ir.Node, Candidate]]:
    """Find the depthwise convolutions of stride 1 and "same" padding with a kernel of `least` or more."""
    for node in graph:
        if node.op_type == "Conv" and not node.domain:
            found = _candidate(node, opset)
            if found is not None and max(found.kernel) >= least:
                yield node, found


def rewrite(graph: ir.Graph, jobs: Sequence[Job], *, merge: bool) -> int:
    """Replace each convolution by what was chosen for it, under the same name of its result.

    Args:
        graph: changed in place.
        jobs: convolutions with constant weights.
        merge: let rewrites that follow each other keep one layout.

    Returns:
        How many chains of nodes share that layout now.
    """
    able = {job.node: form for job in jobs if (form := _form(job)) and issubclass(form, ChannelMajor)}
    chains = channel_major.chains(graph, able) if merge else []
    chained = {node for chain in chains for node in chain}
    changed = dict.fromkeys([*(job.node for job in jobs), *(node for chain in chains for node in chain)])
    replaced = [value for node in changed for value in node.inputs if constant_of(value) is not None]
    additions = Additions(graph)
    operands = {job.node: _operands(job, additions) for job in jobs}
    for job in jobs:
        if job.choice is None:
            _shrink(job, operands[job.node])
        elif job.node not in chained:
            write = Writer(job.site.name, additions)
            _replace(graph, job.node, write, _nodes(write, job, operands[job.node]))
    sites = {job.node: job.site for job in jobs}
    for chain in chains:
        places = {n: Place(able[n], sites[n], *operands[n]) for n in chain if n in able}
        channel_major.rewrite(graph, chain, places, additions)
    _forget(graph, replaced)
    return len(chains)


def _form(job: Job) -> type[Lowering] | None:
    return None if job.choice is None else LOWERINGS[job.choice]


def _candidate(node: ir.Node, opset: int) -> Candidate | None:
    weight, bias = node.inputs[1], node.inputs[BIAS] if len(node.inputs) > BIAS else None
    shape = lengths(weight)
    if weight is None or shape is None or None in shape or len(shape) != 2 * MAP:
        return None
    channels, inputs, high, wide = (int(n) for n in shape if n is not None)
    said = node.attributes
    plain = {*said.get_ints("strides", [1]), *said.get_ints("dilations", [1])} == {1}
    padded = list(said.get_ints("pads", [0] * 4)) == [high // 2, wide // 2] * 2
    same = padded or said.get_string("auto_pad", "NOTSET").startswith("SAME")
    if inputs != 1 or said.get_int("group", 1) != channels or not (plain and same and high % 2 and wide % 2):
        return None
    why = [
        f"its {what} {'may be replaced at run time' if value.is_graph_input() else 'is computed in the graph'}"
        for what, value in (("weight", weight), ("bias", bias))
        if value is not None and (value.is_graph_input() or constant_of(value) is None)
    ]
    if opset < OPSET:
        why.append(f"the file is of opset {opset}, and the rewrites need {OPSET}")
    sizes = lengths(node.inputs[0]) or []
    rows, columns = sizes[MAP:] if len(sizes) == 2 * MAP else (None, None)
    return Candidate(
        name=str(node.name),
        channels=channels,
        kernel=(high, wide),
        map=None if rows is None or columns is None else (rows, columns),
        itemsize=int(weight.dtype.itemsize) if weight.dtype is not None else 0,
        why="; ".join(why),
    )


def _operands(job: Job, additions: Additions) -> tuple[ir.Value, ir.Value | None]:
    """Return weight and bias as the job's rewrite wants them, registered in the graph."""
    node, site = job.node, job.site
    weight, bias = node.inputs[1], node.inputs[BIAS] if len(node.inputs) > BIAS else None
    assert weight is not None  # noqa: S101  # a candidate has one
    suffix = f".{job.choice or 'cropped'}.{site.map[0]}x{site.map[1]}"
    if job.choice is None:
        return additions.constant(weight, suffix, (site.channels, 1, *site.taps), partial(crop, site)), bias
    lowering = LOWERINGS[job.choice]
    placed = additions.constant(weight, suffix, lowering.shape(site), partial(lowering.weight, site))
    if bias is None:
        return placed, None
    shape = lowering.bias(site, np.zeros(site.channels)).shape
    return placed, additions.constant(bias, suffix, shape, partial(lowering.bias, site))


def _nodes(write: Writer, job: Job, operands: tuple[ir.Value, ir.Value | None]) -> ir.Value:
    x = job.node.inputs[0]
    assert x is not None  # noqa: S101
    assert job.choice is not None  # noqa: S101
    return LOWERINGS[job.choice].nodes(job.site, write, x, *operands)


def _shrink(job: Job, operands: tuple[ir.Value, ir.Value | None]) -> None:
    """Give a convolution a cropped kernel and the padding that belongs to it."""
    node, site = job.node, job.site
    node.replace_input_with(1, operands[0])
    node.attributes.pop("auto_pad", None)
    node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", list(site.taps))
    node.attributes["pads"] = ir.AttrInt64s("pads", [*site.padding] * 2)


def _replace(graph: ir.Graph, node: ir.Node, write: Writer, result: ir.Value) -> None:
    for constant in write.constants:
        graph.register_initializer(constant)
    ir.convenience.replace_nodes_and_values(graph, node, [node], write.nodes, node.outputs, [result])


def _forget(graph: ir.Graph, values: Iterable[ir.Value | None]) -> None:
    """Remove constants that nobody reads any more."""
    for value in dict.fromkeys(values):
        if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        producer = value.producer()
        if producer is not None:
            graph.remove(producer, safe=True)
        else:
            graph.initializers.pop(str(value.name), None)
