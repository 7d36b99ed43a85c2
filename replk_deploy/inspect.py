"""An open checkpoint → what it is, what it costs and whether its BatchNorms have lived."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from replk_deploy.checkpoint import Loaded
from replk_deploy.errors import ReplkError
from replk_deploy.fuse import batch_norms
from replk_deploy.lowerings.base import LARGE
from replk_deploy.models.reparam import Reparam


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeLayer:
    """One large depthwise kernel; MACs of one image, and of those the ones that touch the map."""

    name: str
    channels: int
    kernel: int
    map: tuple[int, int]
    macs: int
    inside_macs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a checkpoint is and what it costs.

    Attributes:
        macs: multiply-adds of one image in convolutions and linear layers, padding counted; of the
            network as stored, branches included.
        inside_macs: the same without taps that fall into the padding.
        fused_macs: padding counted, as one kernel per block.
        batch_norms: how many there are.
    """

    KIND: ClassVar[str] = "inspection"
    FORMAT: ClassVar[int] = 1

    checkpoint: Loaded
    size: tuple[int, int]
    classes: int | None
    outputs: tuple[str, ...]
    parameters: int
    macs: int
    inside_macs: int
    fused_macs: int
    batch_norms: int
    convolutions: int
    branched_blocks: int
    large: tuple[LargeLayer, ...]


def inspect(loaded: Loaded, *, size: tuple[int, int] | None = None) -> Inspection:
    """Count what a network costs for one image of a size; the default is the size it was trained for.

    Raises:
        ReplkError: the size is too small.
    """
    model, size = loaded.model, size or loaded.preprocessing.size
    if min(size) < model.geometry.stride // 2:
        raise ReplkError(
            f"{size[0]}x{size[1]} is too small for this network",
            f"use at least --size {model.geometry.stride // 2}, better {model.geometry.stride}",
        )
    folded = type(model).empty(model.geometry, "folded")
    counted, fused = _count(type(model).empty(model.geometry, model.form), size), _count(folded, size)
    return Inspection(
        checkpoint=loaded,
        size=size,
        classes=model.geometry.classes,
        outputs=model.geometry.outputs,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=sum(c.macs for c in counted.values()),
        inside_macs=sum(c.inside for c in counted.values()),
        fused_macs=sum(c.macs for c in fused.values()),
        batch_norms=len(batch_norms(model)),
        convolutions=sum(isinstance(m, nn.Conv2d) for m in model.modules()),
        branched_blocks=sum(isinstance(m, Reparam) for m in model.modules()),
        large=_large(folded, fused),
    )


def taps_inside(length: int, kernel: int, stride: int, padding: int) -> int:
    """Count, over all outputs of one axis, the kernel taps that fall on the map of `length`."""
    starts = range(-padding, length + padding - kernel + 1, stride)
    return sum(max(0, min(s + kernel, length) - max(s, 0)) for s in starts)


class _Cost(NamedTuple):
    macs: int
    inside: int
    map: tuple[int, int]


def _count(model: nn.Module, size: tuple[int, int]) -> dict[str, _Cost]:
    """Return what each convolution and linear layer costs, without computing anything."""
    found: dict[str, _Cost] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            if isinstance(module, nn.Linear):
                found[name] = _Cost(module.weight.numel(), module.weight.numel(), (1, 1))
            elif isinstance(module, nn.Conv2d):
                high, wide = (
                    taps_inside(args[0].shape[2 + a], module.kernel_size[a], module.stride[a], int(module.padding[a]))
                    for a in (0, 1)
                )
                channels, height, width = out.shape[1:]
                inputs = module.weight.shape[1]
                nominal = channels * module.weight[0].numel() * height * width
                found[name] = _Cost(nominal, channels * inputs * high * wide, (height, width))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count(name))
    with torch.no_grad():
        model(torch.empty(1, 3, *size, device="meta"))
    return found


def _large(model: nn.Module, costs: dict[str, _Cost]) -> tuple[LargeLayer, ...]:
    modules = {name: model.get_submodule(name) for name in costs}
    return tuple(
        LargeLayer(
            name=name,
            channels=module.in_channels,
            kernel=module.kernel_size[0],
            map=costs[name].map,
            macs=costs[name].macs,
            inside_macs=costs[name].inside,
        )
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels and module.kernel_size[0] >= LARGE
    )
