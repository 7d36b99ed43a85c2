"""Names under which RepLKNet weights travel, and how each becomes the published name.

Every map is literal. What is not named here stays as it is, so that the fit can list it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from replk_deploy.models.base import Shapes

Tensors = dict[str, Tensor]

FOREIGN: dict[str, str] = {
    "UniRepLKNet": r"dwconv\.(lk_origin|dil_conv)",
    "OverLoCK": r"(lepe\.0|proj\.1)\.lk_origin",
    "SLaK": r"LoRA1\.conv\.weight",
    "ShiftWiseConv": r"LoRAs\.\d+\.weight",
    "RepVGG": r"rbr_(dense|reparam|1x1)",
    "a re-parameterised timm network": r"conv_kxk|reparam_conv",
    "Swin Transformer": r"relative_position_bias_table",
    "a vision transformer": r"attn\.qkv\.weight",
    "ConvNeXt": r"pwconv1\.weight|mlp\.fc1\.weight|conv_dw",
    "ResNet": r"layer\d\.\d+\.conv1\.weight",
}
TASK_HEADS = (
    "decode_head.",
    "auxiliary_head.",
    "neck.",
    "rpn_head.",
    "roi_head.",
    "bbox_head.",
    "mask_head.",
    "data_preprocessor.",
)
MEGENGINE_STEM = {"0": "0", "2": "1", "4": "2", "6": "3"}
MEGENGINE_TRANSITION = {"0": "0", "2": "1"}
MEGENGINE_REPLK = {
    "pre_bn": "prelkb_bn",
    "pw1": "pw1",
    "pw2": "pw2",
    "dw.dw_large": "large_kernel.lkb_origin",
    "dw.dw_small_5": "large_kernel.small_conv",
}
MEGENGINE_FFN = {"premlp_bn": "preffn_bn", "mlp.fc1": "pw1", "mlp.fc2": "pw2"}


class Renamed(NamedTuple):
    """Tensors under published names; `heads` are the classifier heads there were to choose from."""

    tensors: Tensors
    layout: str
    ignored: tuple[str, ...]
    heads: tuple[str, ...]


def rename(tensors: Tensors, *, head: str | None = None) -> Renamed:
    """Give RepLKNet tensors their published names.

    Args:
        tensors: as found, wrappers and unanimous prefixes removed.
        head: which of several classifier heads to keep.

    Raises:
        ValueError: a layout that is known and cannot be taken, or a head that is not there.
    """
    layout, ignored = "reference", []
    if any(k.startswith("backbone.") for k in tensors):
        layout = "mm backbone"
        ignored = [k for k in tensors if k.startswith(TASK_HEADS)]
        tensors = _from_mm({k: v for k, v in tensors.items() if not k.startswith(TASK_HEADS)})
    elif any(re.match(r"blocks\.\d+\.dw\.", k) for k in tensors):
        layout = "MegEngine"
        tensors = _from_megengine(tensors)
    tensors, dropped, heads = _choose_head(tensors, head)
    return Renamed(tensors, layout, (*ignored, *dropped), heads)


def foreign(shapes: Shapes) -> str | None:
    """Name another network family that these tensors belong to, as far as their names tell."""
    return next((f for f, pattern in FOREIGN.items() if any(re.search(pattern, k) for k in shapes)), None)


def prefix_of(shapes: Shapes) -> str:
    """Return what stands before the names of RepLKNet's blocks where something does; else nothing."""
    block = r"(.+?\.)stages\.\d+\.blocks\.\d+\.(large_kernel|prelkb_bn|preffn_bn|pw1|pw2)\."
    return next((m[1] for k in shapes if (m := re.match(block, k))), "")


def _from_mm(tensors: Tensors) -> Tensors:
    renamed = _unique((k.removeprefix("backbone."), v) for k, v in tensors.items())
    if not any(k.startswith("head.fc.") for k in renamed):
        return renamed
    last = max((int(m[1]) for k in renamed if (m := re.match(r"stages\.(\d+)\.", k))), default=0)
    swaps = {f"stages.{last}.norm.": "norm.", "head.fc.": "head."}
    return _unique((_swap_prefix(k, swaps), v) for k, v in renamed.items())


def _unique(pairs: Iterable[tuple[str, Tensor]]) -> Tensors:
    named: Tensors = {}
    for name, tensor in pairs:
        if name in named:
            raise ValueError(f"two of its tensors are {name}, so one would be lost")
        named[name] = tensor
    return named


def _swap_prefix(key: str, swaps: Mapping[str, str]) -> str:
    return next((new + key.removeprefix(old) for old, new in swaps.items() if key.startswith(old)), key)


def _from_megengine(tensors: Tensors) -> Tensors:
    if any(re.fullmatch(r"blocks\.\d+\.dw\.(weight|bias)", k) for k in tensors):
        raise ValueError("it is a MegEngine file that was already converted for deployment; fuse the training file")
    samplers = sorted({int(m[1]) for k in tensors if (m := re.match(r"blocks\.(\d+)\.[02]\.", k))})
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        name = _megengine_name(key, samplers)
        if tensor.dim() == 5:  # noqa: PLR2004  # grouped convolution: (groups, out/groups, in/groups, K, K)
            tensor = tensor.flatten(0, 1)  # noqa: PLW2901
        elif tensor.dim() == 4 and tensor.shape[0] == tensor.shape[2] == tensor.shape[3] == 1:  # noqa: PLR2004
            tensor = tensor.flatten()  # noqa: PLW2901
        if name == "stem.0.conv.weight":
            tensor = tensor.flip(1)  # noqa: PLW2901  # trained on BGR
        renamed[name] = tensor
    return renamed


def _megengine_name(key: str, samplers: list[int]) -> str:
    if m := re.match(r"stem\.([0246])\.(.*)", key):
        return f"stem.{MEGENGINE_STEM[m[1]]}.{m[2]}"
    if not (m := re.match(r"blocks\.(\d+)\.(.*)", key)):
        return key
    number, rest = int(m[1]), m[2]
    if number in samplers:
        which, _, leaf = rest.partition(".")
        return f"transitions.{samplers.index(number)}.{MEGENGINE_TRANSITION[which]}.{leaf}"
    stage = sum(s < number for s in samplers)
    first = samplers[stage - 1] + 1 if stage else 0
    for offset, names in enumerate((MEGENGINE_REPLK, MEGENGINE_FFN)):
        for old, new in names.items():
            if rest.startswith(f"{old}."):
                return f"stages.{stage}.blocks.{2 * (number - first) + offset}.{new}{rest.removeprefix(old)}"
    return key


def _choose_head(tensors: Tensors, wanted: str | None) -> tuple[Tensors, tuple[str, ...], tuple[str, ...]]:
    heads = tuple(sorted({m[1] for k in tensors if (m := re.fullmatch(r"head\.(\w+)\.(weight|bias)", k))}))
    if wanted is not None and wanted not in heads:
        raise ValueError(f"it has no head named {wanted!r}; named heads: {', '.join(heads) or 'none'}")
    if not heads:
        return tensors, (), ()
    if wanted is None and len(heads) > 1:
        raise ValueError(
            f"it has {len(heads)} classifier heads; choose one with --head {heads[0]} (or {', '.join(heads[1:])})"
        )
    chosen = wanted or heads[0]
    kept = _unique(
        (_swap_prefix(k, {f"head.{chosen}.": "head."}), v)
        for k, v in tensors.items()
        if not _other_head(k, heads, chosen)
    )
    return kept, tuple(k for k in tensors if _other_head(k, heads, chosen)), heads


def _other_head(key: str, heads: tuple[str, ...], chosen: str) -> bool:
    return any(key.startswith(f"head.{h}.") for h in heads if h != chosen)
