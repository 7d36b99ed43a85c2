"""Large depthwise convolutions → the same arithmetic in operators that stock runtimes run fast.

The rewrites are in `lowerings/`; whoever calls chooses one for each convolution, or none. What can be
rewritten are depthwise convolutions with an odd kernel of 7 or more in one direction, stride 1, dilation 1
and "same" padding, on a map of known height and width. Taps that never touch the map are cropped from
every one of them, rewritten or not.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from replk_deploy import graph
from replk_deploy.errors import ReplkError, first_line
from replk_deploy.export import LIMIT_BYTES
from replk_deploy.lowerings import LOWERINGS, NONE, modules
from replk_deploy.lowerings.base import LARGE, Candidate, LargeConv, constant_of, name_apart
from replk_deploy.lowerings.rewriting import Job, candidates, rewrite
from replk_deploy.models.base import Network

UNKNOWN = "its height or width is not fixed"
Choose = Callable[[LargeConv], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoweredSite:
    """What became of one large convolution.

    Attributes:
        kernel: as it was.
        taps: what cropping left of it.
        map: height and width; None where they vary.
        choice: a name in LOWERINGS, or none.
        reason: why it was left where it could not be had otherwise; else empty.
        bytes_before: of its weight, wherever else that is used.
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("changed",)

    name: str
    channels: int
    kernel: tuple[int, int]
    taps: tuple[int, int]
    map: tuple[int, int] | None
    choice: str
    reason: str
    bytes_before: int
    bytes_after: int

    @property
    def changed(self) -> bool:
        """Tell whether it was rewritten or cropped."""
        return self.choice != NONE or self.taps != self.kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """What became of the large convolutions of a network.

    Attributes:
        chains: how many stretches of the graph lie channel by channel now.
        bytes_before: of all weights; one that several layers share counts once.
    """

    KIND: ClassVar[str] = "lowered"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ("changed", "growth")

    sites: tuple[LoweredSite, ...]
    chains: int
    bytes_before: int
    bytes_after: int

    @property
    def changed(self) -> bool:
        """Tell whether anything was rewritten or cropped."""
        return any(site.changed for site in self.sites)

    @property
    def growth(self) -> float:
        """Return how many times as large the weights are now."""
        return self.bytes_after / self.bytes_before if self.bytes_before else 1.0


def find(path: Path, *, lenient: bool = False) -> tuple[LargeConv, ...]:
    """Name the convolutions of an ONNX file that can be lowered, in the order of the graph.

    Args:
        path: the file.
        lenient: name none where one has a map of unknown height or width.

    Raises:
        ReplkError: not a whole ONNX file, or a map of unknown height or width.
    """
    able = [c for _, c in _candidates(_open(path)) if not c.why]
    return () if lenient and any(c.map is None for c in able) else tuple(map(_sized, able))


def kept(path: Path) -> Lowered:
    """Say why the convolutions of an ONNX file in which nothing can be lowered stay as they are.

    Raises:
        ReplkError: not a whole ONNX file.
    """
    model = _open(path)
    sites, size = tuple(_decide(candidate, None) for _, candidate in _candidates(model)), _weights(model.graph)
    return Lowered(sites=sites, chains=0, bytes_before=size, bytes_after=size)


def weight_bytes(path: Path) -> int:
    """Count the bytes of all weights of an ONNX file.

    Raises:
        ReplkError: not a whole ONNX file.
    """
    return _weights(ir.from_proto(graph.load(path)).graph)


def find_network(network: Network, size: tuple[int, int]) -> tuple[LargeConv, ...]:
    """Name the convolutions of a network that can be lowered, for images of a size."""
    return tuple(_sized(c) for c in modules.candidates(network, size) if not c.why)


def lower_graph(path: Path, out: Path, choose: Choose | None = None, *, channel_major: bool = False) -> Lowered:
    """Write an ONNX file whose large convolutions are what `choose` says of each.

    Inputs, outputs, metadata and the names of what is computed stay, but for values inside a chain. Nodes that
    share a name or have none take that of their result. A graph in which nothing changes is written as it was.

    Args:
        path: the graph; its weights are initializers or Constant nodes, of any floating type.
        out: where to write; the caller owns the name.
        choose: a name in LOWERINGS or "none" for each; None only crops, and leaves maps of unknown size alone.
        channel_major: keep what lies between dense or grouped rewrites in their layout.

    Raises:
        ReplkError: not a whole ONNX file, a map of unknown size, or a file that would pass 2 GiB.
    """
    model = _open(path)
    before = _weights(model.graph)
    found = [(node, candidate, _decide(candidate, choose)) for node, candidate in _candidates(model)]
    jobs = [Job(n, _sized(c), None if site.choice == NONE else site.choice) for n, c, site in found if site.changed]
    merged = rewrite(model.graph, jobs, merge=channel_major)
    after = _weights(model.graph)
    if after > LIMIT_BYTES:
        raise ReplkError(
            f"the file would hold {after / 2**30:.1f} GiB of weights, and ONNX holds less than 2 GiB in one file",
            "lower fewer layers, or export with --precision fp16",
        )
    if jobs:
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
        ir.save(model, out)
        _check(path, out)
    else:
        onnx.save(graph.load(path), out)
    return Lowered(sites=tuple(s for _, _, s in found), chains=merged, bytes_before=before, bytes_after=after)


def lower_network(network: Network, size: tuple[int, int], choose: Choose | None = None) -> tuple[Network, Lowered]:
    """Return a network whose large convolutions are what `choose` says of each, for images of a size.

    The network given stays as it was; the new one shares with it what is not rewritten.

    Args:
        network: in any form and type, on any device.
        size: height and width of the images.
        choose: a name in LOWERINGS or "none" for each; None only crops.
    """
    found = modules.candidates(network, size)
    sites = tuple(_decide(candidate, choose) for candidate in found)
    twin = modules.replaced(network, found, {site.name: site.choice for site in sites if site.changed})
    before, after = (sum(p.nbytes for p in net.parameters()) for net in (network, twin))
    return twin, Lowered(sites=sites, chains=0, bytes_before=before, bytes_after=after)


def _decide(candidate: Candidate, choose: Choose | None) -> LoweredSite:
    """Say what becomes of a convolution; one that nothing keeps as it is has a known map, or nothing is asked of it."""
    site, choice, reason = None, NONE, candidate.why
    if not candidate.why and candidate.map is None and choose is None:
        reason = UNKNOWN
    elif not candidate.why:
        site = _sized(candidate)
        choice, reason = _ask(site, choose)
    taps = candidate.kernel if site is None else site.taps
    elements = candidate.channels * math.prod(taps)
    if site is not None and choice != NONE:
        elements = LOWERINGS[choice].elements(site)
    return LoweredSite(
        name=candidate.name,
        channels=candidate.channels,
        kernel=candidate.kernel,
        taps=taps,
        map=candidate.map,
        choice=choice,
        reason=reason,
        bytes_before=candidate.channels * math.prod(candidate.kernel) * candidate.itemsize,
        bytes_after=elements * candidate.itemsize,
    )


def _sized(candidate: Candidate) -> LargeConv:
    if candidate.map is None:
        raise ReplkError(
            f"{candidate.name} cannot be lowered: {UNKNOWN}",
            "write the file for one size of image, for example replk export --onnx --size 224x224",
        )
    return LargeConv(name=candidate.name, channels=candidate.channels, kernel=candidate.kernel, map=candidate.map)


def _ask(site: LargeConv, choose: Choose | None) -> tuple[str, str]:
    """Return what a convolution becomes, and why not what was asked for."""
    choice = NONE if choose is None else choose(site)
    if choice == NONE:
        return NONE, ""
    if choice not in LOWERINGS:
        raise ReplkError(f"there is no lowering named {choice}", f"choose among {', '.join((NONE, *LOWERINGS))}")
    refused = LOWERINGS[choice].refusal(site)
    return (NONE, f"{choice} does not apply: {refused}") if refused else (choice, "")


def _open(path: Path) -> ir.Model:
    model = ir.from_proto(graph.load(path))
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    name_apart(model.graph)
    return model


def _check(path: Path, out: Path) -> None:
    """Raise ReplkError for what the ONNX checker finds in a lowered file."""
    try:
        onnx.checker.check_model(out, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise ReplkError(
            f"{path} makes no valid ONNX file when it is lowered: {first_line(exc)}",
            "see what onnx.checker.check_model(path, full_check=True) says of it; bfloat16 convolutions need opset 22",
        ) from exc


def _candidates(model: ir.Model) -> Iterator[tuple[ir.Node, Candidate]]:
    return candidates(model.graph, least=LARGE, opset=model.opset_imports.get("", 0))


def _weights(of: ir.Graph) -> int:
    """Count the bytes of all constants."""
    tensors = [value.const_value for value in of.initializers.values()]
    tensors += [constant_of(node.outputs[0]) for node in of if node.op_type == "Constant"]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
