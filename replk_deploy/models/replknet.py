"""RepLKNet (Ding et al., CVPR 2022, arXiv 2203.06717), in training, merged and folded form.

Submodules carry the names of the published weights, so a checkpoint loads without a map. What only
training needs (stochastic depth, recomputation, synchronised statistics) is not here.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self, cast, final

from torch import Tensor, nn
from torch.nn import functional

from replk_deploy.models import reparam
from replk_deploy.models.base import Fold, Form, Network, Shapes

CONV_DIMS = 4
MOST_BLOCKS = 10_000  # a header that asks for more is damaged


@dataclass(frozen=True, slots=True, kw_only=True)
class RepLKGeometry:
    """The shape of a RepLKNet; per-stage values run from the first stage to the last."""

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    kernels: tuple[int, ...]
    small: int | None
    dw_channels: tuple[int, ...]
    ffn_channels: tuple[int, ...]
    classes: int | None
    out_indices: tuple[int, ...] = ()
    norms: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """Name the variant, or describe the geometry in a few words."""
        for name, variant in VARIANTS.items():
            if self.body == variant.body:
                return name
        widths, kernels = ("-".join(map(str, v)) for v in (self.channels, self.kernels))
        return f"RepLKNet {widths}, kernels {kernels}"

    @property
    def body(self) -> "RepLKGeometry":
        """Return the geometry without what hangs on the end of the network."""
        return dataclasses.replace(self, classes=None, out_indices=(), norms=())

    @property
    def outputs(self) -> tuple[str, ...]:
        """Name what the network returns, in order."""
        return ("logits",) if self.classes is not None else tuple(f"stage{i}" for i in self.out_indices)

    @property
    def stride(self) -> int:
        """Give the down-sampling factor of the last stage."""
        return int(4 * 2 ** (len(self.channels) - 1))


def _variant(width: int, kernels: tuple[int, ...], small: int | None, dw_ratio: float) -> RepLKGeometry:
    channels = tuple(width * 2**i for i in range(4))
    return RepLKGeometry(
        channels=channels,
        depths=(2, 2, 18, 2),
        kernels=kernels,
        small=small,
        dw_channels=tuple(int(c * dw_ratio) for c in channels),
        ffn_channels=tuple(4 * c for c in channels),
        classes=1000,
    )


VARIANTS = {
    "RepLKNet-31B": _variant(128, (31, 29, 27, 13), 5, 1),
    "RepLKNet-31L": _variant(192, (31, 29, 27, 13), 5, 1),
    "RepLKNet-XL": _variant(256, (27, 27, 27, 13), None, 1.5),
}


class ConvBN(nn.Module):
    """A "same"-padded convolution and its BatchNorm; folded, a convolution with a bias."""

    def __init__(self, c_in: int, c_out: int, kernel: int, *, form: Form, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        folded = form == "folded"
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=folded)
        self.bn = nn.Identity() if folded else nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c_in, H, W] to [N, c_out, H', W']."""
        out: Tensor = self.bn(self.conv(x))
        return out


class ConvBNReLU(ConvBN):
    """A convolution, its BatchNorm and a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c_in, H, W] to [N, c_out, H', W'], nowhere negative."""
        return functional.relu(super().forward(x))


@final
class LargeKernel(reparam.Reparam):
    """A large depthwise convolution with a small one beside it, each with its BatchNorm."""

    def __init__(self, channels: int, kernel: int, small: int | None) -> None:
        super().__init__()
        self.lkb_origin = ConvBN(channels, channels, kernel, groups=channels, form="training")
        self.small_conv = None if small is None else ConvBN(channels, channels, small, groups=channels, form="training")

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        out: Tensor = self.lkb_origin(x)
        return out if self.small_conv is None else out + self.small_conv(x)

    def merged(self) -> nn.Conv2d:
        """Return one float64 convolution with the same answer in eval mode; the block stays as it was."""
        kernel = _fold_own(self.lkb_origin)
        if self.small_conv is not None:
            kernel = reparam.add_branches(kernel, _fold_own(self.small_conv))
        channels, _, size, _ = kernel.weight.shape
        conv = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, device="meta")
        conv.load_state_dict(kernel._asdict(), assign=True)
        return conv


@final
class MergedKernel(nn.Module):
    """What a LargeKernel becomes: one depthwise convolution with a bias."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.lkb_reparam = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        out: Tensor = self.lkb_reparam(x)
        return out


def _fold_own(branch: ConvBN) -> reparam.Kernel:
    assert isinstance(branch.bn, nn.BatchNorm2d)  # noqa: S101  # branches exist in training form only
    return reparam.fold_after(reparam.kernel_of(branch.conv), branch.bn)


def _norm(channels: int, form: Form) -> nn.Module:
    return nn.Identity() if form == "folded" else nn.BatchNorm2d(channels)


@final
class RepLKBlock(nn.Module):
    """x + pw2(relu(large(relu(pw1(norm(x))))))."""

    def __init__(self, channels: int, dw_channels: int, kernel: int, small: int | None, form: Form) -> None:
        super().__init__()
        self.prelkb_bn = _norm(channels, form)
        self.pw1 = ConvBNReLU(channels, dw_channels, 1, form=form)
        self.large_kernel = (
            LargeKernel(dw_channels, kernel, small) if form == "training" else MergedKernel(dw_channels, kernel)
        )
        self.pw2 = ConvBN(dw_channels, channels, 1, form=form)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        out: Tensor = self.large_kernel(self.pw1(self.prelkb_bn(x)))
        out = self.pw2(functional.relu(out))
        return x + out


@final
class ConvFFN(nn.Module):
    """x + pw2(gelu(pw1(norm(x)))), with the exact (erf) GELU."""

    def __init__(self, channels: int, hidden: int, form: Form) -> None:
        super().__init__()
        self.preffn_bn = _norm(channels, form)
        self.pw1 = ConvBN(channels, hidden, 1, form=form)
        self.pw2 = ConvBN(hidden, channels, 1, form=form)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        out: Tensor = self.pw2(functional.gelu(self.pw1(self.preffn_bn(x))))
        return x + out


@final
class Stage(nn.Module):
    """RepLK blocks and feed-forward blocks in turn; `norm` is for features that leave the network here."""

    def __init__(self, geometry: RepLKGeometry, index: int, form: Form) -> None:
        super().__init__()
        g, c = geometry, geometry.channels[index]
        self.blocks = nn.Sequential()
        for _ in range(g.depths[index]):
            self.blocks.append(RepLKBlock(c, g.dw_channels[index], g.kernels[index], g.small, form))
            self.blocks.append(ConvFFN(c, g.ffn_channels[index], form))
        self.norm: nn.Module = nn.Identity()
        if index in g.norms:
            self.norm = nn.Conv2d(c, c, 1, groups=c) if form == "folded" else nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape, before the norm."""
        out: Tensor = self.blocks(x)
        return out


@final
class RepLKNet(Network):
    """The network; `geometry.classes` None makes it a backbone that returns feature maps."""

    family: ClassVar[str] = "replknet"

    def __init__(self, geometry: RepLKGeometry, form: Form) -> None:
        super().__init__()
        self.geometry, self.form = geometry, form
        g, c0 = geometry, geometry.channels[0]
        self.stem = nn.Sequential(
            ConvBNReLU(3, c0, 3, stride=2, form=form),
            ConvBNReLU(c0, c0, 3, groups=c0, form=form),
            ConvBNReLU(c0, c0, 1, form=form),
            ConvBNReLU(c0, c0, 3, stride=2, groups=c0, form=form),
        )
        self.stages = nn.ModuleList(Stage(g, i, form) for i in range(len(g.channels)))
        self.transitions = nn.ModuleList(
            nn.Sequential(ConvBNReLU(a, b, 1, form=form), ConvBNReLU(b, b, 3, stride=2, groups=b, form=form))
            for a, b in pairwise(g.channels)
        )
        self.norm = None if g.classes is None else _norm(g.channels[-1], form)
        self.head = None if g.classes is None else nn.Linear(g.channels[-1], g.classes)

    @classmethod
    def build(cls, geometry: RepLKGeometry, form: Form) -> Self:
        """Build the network in eval mode, randomly initialised."""
        return cls(geometry, form).eval()

    @classmethod
    def parse(cls, text: str) -> RepLKGeometry:
        """Read a geometry back from the text that `describe` gave."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        for name in ("channels", "depths", "kernels", "dw_channels", "ffn_channels"):
            if not fields[name] or not all(isinstance(n, int) and n > 0 for n in fields[name]):
                raise ValueError(f"{name} are {fields[name]}")
        stages = range(len(fields["channels"]))
        for name in ("out_indices", "norms"):
            if not isinstance(fields[name], tuple) or not all(isinstance(n, int) and n in stages for n in fields[name]):
                raise ValueError(f"{name} are {fields[name]}")
        if sum(fields["depths"]) > MOST_BLOCKS:
            raise ValueError(f"depths are {fields['depths']}")
        return RepLKGeometry(**fields)

    def describe(self) -> str:
        """Write the geometry as one line of JSON."""
        return json.dumps(dataclasses.asdict(self.geometry), sort_keys=True)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return logits [N, classes], or one feature map per `out_indices`, for images [N, 3, H, W]."""
        x, outs = self.stem(images), []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.geometry.out_indices:
                outs.append(cast("Stage", stage).norm(x))
            if index < len(self.transitions):
                x = self.transitions[index](x)
        return tuple(outs) if self.head is None else (self.head_of(x),)

    def head_of(self, features: Tensor) -> Tensor:
        """Map the last stage's output to the logits, or to the last feature map."""
        if self.head is None or self.norm is None:
            out: Tensor = cast("Stage", self.stages[-1]).norm(features)
            return out
        logits: Tensor = self.head(functional.adaptive_avg_pool2d(self.norm(features), 1).flatten(1))
        return logits

    def blocks(self) -> Iterator[str]:
        """Name the submodules that `forward` chains before the head, in order."""
        yield from (f"stem.{i}" for i in range(len(self.stem)))
        for s, depth in enumerate(self.geometry.depths):
            yield from (f"stages.{s}.blocks.{b}" for b in range(2 * depth))
            if s < len(self.transitions):
                yield from (f"transitions.{s}.{i}" for i in range(2))

    def folds(self) -> Iterator[Fold]:
        """Name each BatchNorm outside a LargeKernel: own norms first, then those before a 1x1 map."""
        inside = tuple(f"{name}." for name, m in self.named_modules() if isinstance(m, LargeKernel))
        for name, module in self.named_modules():
            if isinstance(module, ConvBN) and not name.startswith(inside):
                yield Fold(f"{name}.bn", f"{name}.conv", "after")
        for name, module in self.named_modules():
            if isinstance(module, RepLKBlock):
                yield Fold(f"{name}.prelkb_bn", f"{name}.pw1.conv", "before")
            elif isinstance(module, ConvFFN):
                yield Fold(f"{name}.preffn_bn", f"{name}.pw1.conv", "before")
        for index in self.geometry.norms:
            yield Fold(f"stages.{index}.norm", f"stages.{index}.norm", "alone")
        if self.head is not None:
            yield Fold("norm", "head", "before")

    @classmethod
    def infer(cls, shapes: Shapes) -> tuple[RepLKGeometry, Form]:
        """Read geometry and form from tensor shapes, by majority, so that one odd tensor is named by the fit.

        Raises:
            ValueError: forms are mixed, or no tensor tells a stage's width, depth or kernel.
        """
        stages = 1 + max((int(m[1]) for k in shapes if (m := re.match(r"stages\.(\d+)\.", k))), default=-1)
        if not stages:
            raise ValueError("it has no tensor named stages.*")
        origin, merged, norms = (
            any(word in k for k in shapes) for word in ("lkb_origin", "lkb_reparam", "running_mean")
        )
        if origin and merged:
            raise ValueError("it mixes the training form (lkb_origin) with the merged form (lkb_reparam)")
        form: Form = "training" if origin else "merged" if norms else "folded"
        per_stage = [_stage_shape(shapes, s) for s in range(stages)]
        head = any(k.startswith("head.") for k in shapes)
        classes = _majority([shapes[k][0] for k in ("head.weight", "head.bias") if shapes.get(k)])
        normed = tuple(s for s in range(stages) if any(k.startswith(f"stages.{s}.norm.") for k in shapes))
        small = _majority(_sizes(shapes, r"stages\.\d+\.blocks\.\d+\.large_kernel\.small_conv\.conv\.weight", -1))
        kernels = tuple(p["kernel"] for p in per_stage)
        if any(size % 2 == 0 for size in (*kernels, small or 1)) or (small or 1) > min(kernels):
            raise ValueError(f"kernels {kernels} and {small} have no common centre")
        geometry = RepLKGeometry(
            channels=tuple(p["channels"] for p in per_stage),
            depths=tuple(p["depth"] for p in per_stage),
            kernels=kernels,
            small=small,
            dw_channels=tuple(p["dw"] for p in per_stage),
            ffn_channels=tuple(p["ffn"] for p in per_stage),
            classes=classes if head else None,
            out_indices=() if head else normed or tuple(range(stages)),
            norms=() if head else normed,
        )
        return geometry, form


def _stage_shape(shapes: Shapes, stage: int) -> dict[str, int]:
    block = rf"stages\.{stage}\.blocks\.\d*"
    even, odd, pw = f"{block}[02468]", f"{block}[13579]", r"\.conv\.weight"
    large = rf"{even}\.large_kernel\.(lkb_origin\.conv|lkb_reparam)\.weight"
    votes = {
        "channels": [
            *_sizes(shapes, rf"{block}\.pw1{pw}", 1),
            *_sizes(shapes, rf"{block}\.pw2{pw}", 0),
        ],
        "dw": [
            *_sizes(shapes, rf"{even}\.pw1{pw}", 0),
            *_sizes(shapes, large, 0),
            *_sizes(shapes, rf"{even}\.pw2{pw}", 1),
        ],
        "ffn": [*_sizes(shapes, rf"{odd}\.pw1{pw}", 0), *_sizes(shapes, rf"{odd}\.pw2{pw}", 1)],
        "kernel": _sizes(shapes, large, -1),
    }
    found = {name: _majority(sizes) for name, sizes in votes.items()}
    unknown = [name for name, size in found.items() if not size]
    if unknown:
        raise ValueError(f"no tensor of stage {stage} tells its {', '.join(unknown)}")
    last = max(int(m[1]) for k in shapes if (m := re.match(rf"stages\.{stage}\.blocks\.(\d+)\.", k)))
    if last > len(shapes):
        raise ValueError(f"stage {stage} has a block {last}, and the file only {len(shapes)} tensors")
    return {name: size for name, size in found.items() if size is not None} | {"depth": last // 2 + 1}


def _sizes(shapes: Shapes, pattern: str, axis: int) -> list[int]:
    return [shape[axis] for key, shape in shapes.items() if len(shape) == CONV_DIMS and re.fullmatch(pattern, key)]


def _majority(sizes: Iterable[int]) -> int | None:
    counted = Counter(sizes).most_common(1)
    return counted[0][0] if counted else None
