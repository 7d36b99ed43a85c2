"""Networks of timm under the contract of our own, so that every step takes one to compare with.

They come with random weights, so nothing is downloaded and no accuracy can be had. What timm leaves at
0, 1 or 1e-6 is disturbed and BatchNorms are fitted: a ConvNeXt whose layer scales are 1e-6 would answer
the same whatever its blocks did, and a proof of it would be blind.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from replk_deploy import optional
from replk_deploy.errors import ReplkError
from replk_deploy.models.base import Fold, Form, Network, Shapes
from replk_deploy.preprocess import Preprocessing

SOURCE = "timm"
NOISE = 0.1  # of what timm leaves constant; answers to two images then differ by 1.7% and more, see the tests
IMAGES = 4  # that a BatchNorm is fitted to
UNLOADED = ("nms", "qnms")  # operators that torchvision describes to torch even where it could not load them


@dataclass(frozen=True, slots=True, kw_only=True)
class TimmGeometry:
    """The shape of a timm network: its name there says the rest.

    Attributes:
        name: as timm.create_model takes it.
        size: height and width; `fixed` networks are built for it and take no other.
        stride: the largest down-sampling factor.
    """

    name: str
    classes: int
    size: tuple[int, int]
    fixed: bool
    stride: int

    @property
    def label(self) -> str:
        """Name the network as timm does."""
        return self.name

    @property
    def outputs(self) -> tuple[str, ...]:
        """Name the only output."""
        return ("logits",)


@final
class _Body(nn.Module):
    """A timm network up to its head: the one block that every one of them has."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Map [N, 3, H, W] to features in timm's own layout."""
        features: Tensor = self.net.forward_features(images)  # type: ignore[operator]  # timm's own convention
        return features


@final
class Timm(Network):
    """A timm network; it has one form only, and what it merges or folds itself is timm's business."""

    family: ClassVar[str] = SOURCE
    exact_gelu: ClassVar[bool] = False

    def __init__(self, geometry: TimmGeometry, form: Form) -> None:
        super().__init__()
        self.geometry, self.form = geometry, form
        kwargs = {"img_size": geometry.size} if geometry.fixed else {}
        net = _timm().create_model(geometry.name, pretrained=False, num_classes=geometry.classes, **kwargs)
        for module in net.modules():  # masks and tables that timm computes: a file must fill the network alone
            for name, buffer in tuple(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer, persistent=True)
        self.body = _Body(net)

    @classmethod
    def build(cls, geometry: TimmGeometry, form: Form) -> Self:
        """Build the network in eval mode, as timm initialises it."""
        return cls(geometry, form).eval()

    @classmethod
    def infer(cls, shapes: Shapes) -> tuple[TimmGeometry, Form]:
        """Refuse: a timm network is named, not recognised."""
        raise ValueError(f"{len(shapes)} tensors do not tell which timm network they are of: name it, as timm:NAME")

    @classmethod
    def parse(cls, text: str) -> TimmGeometry:
        """Read a geometry back from the text that `describe` gave."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        if not _timm().is_model(fields["name"]):  # other names would be fetched from a hub
            raise ValueError(f"timm has no {fields['name']}")
        return TimmGeometry(**fields)

    def describe(self) -> str:
        """Write the geometry as one line of JSON."""
        return json.dumps(dataclasses.asdict(self.geometry), sort_keys=True)

    def folds(self) -> Iterator[Fold]:
        """Name nothing: a BatchNorm stays where timm put it."""
        return iter(())

    def blocks(self) -> Iterator[str]:
        """Name the body, since timm's networks are alike in nothing smaller."""
        yield "body"

    def head_of(self, features: Tensor) -> Tensor:
        """Map the body's features to the logits [N, classes]."""
        logits: Tensor = self.body.net.forward_head(features)  # type: ignore[operator]  # timm's own convention
        return logits

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return logits [N, classes] for images [N, 3, H, W]."""
        return (self.head_of(self.body(images)),)


def baseline(name: str, *, size: tuple[int, int] | None = None, seed: int = 0) -> tuple[Timm, Preprocessing]:
    """Return a network to compare with, in eval mode with seeded random weights, and what its pictures go through.

    Args:
        name: `timm:` and the model's name there, for example timm:swin_base_patch4_window7_224.
        size: height and width; by default those that timm names.
        seed: decides the weights.

    Raises:
        ReplkError: there is no such network, or it cannot be built for that size.
        UnavailableError: timm is not installed.
    """
    source, _, model = name.partition(":")
    if source != SOURCE or not model:
        raise ReplkError(f"there is no baseline {name!r}", "write timm:NAME, as timm:swin_base_patch4_window7_224")
    cfg = _look_up(model)
    geometry = TimmGeometry(
        name=model,
        classes=cfg.num_classes,
        size=size or tuple(cfg.input_size[1:]),
        fixed=cfg.fixed_input_size,
        stride=1,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        try:
            stride = _stride(Timm.empty(geometry, "folded"))
            network = Timm.build(dataclasses.replace(geometry, stride=stride), "folded")
            _live(network)
        except (AssertionError, RuntimeError, ValueError, TypeError) as exc:  # timm's errors share no other base
            if size is None:
                raise
            height, width = size
            raise ReplkError(f"timm cannot build {model} for {height}x{width}: {exc}", "leave out --size") from exc
    rules = Preprocessing(
        size=geometry.size,
        mean=cfg.mean,
        std=cfg.std,
        resize="warp" if cfg.crop_mode == "squash" else "crop",
        crop_pct=cfg.crop_pct,
        said_by="default" if size is None else "user",
    )
    return network.requires_grad_(requires_grad=False), rules


def _look_up(model: str) -> Any:
    timm = _timm()
    if timm.is_model(model):
        try:
            return timm.get_pretrained_cfg(model)
        except RuntimeError as exc:  # a tag that it does not know
            raise ReplkError(f"timm: {exc}", f"write timm:{model.partition('.')[0]}") from exc
    near = difflib.get_close_matches(model, timm.list_models(), n=3)
    hint = (
        f"did you mean {', '.join(near)}?" if near else "see them: python -c 'import timm; print(timm.list_models())'"
    )
    raise ReplkError(f"timm has no model {model!r}", hint)


def _stride(network: Timm) -> int:
    features: list[dict[str, Any]] = getattr(network.body.net, "feature_info", [])
    return max((int(stage["reduction"]) for stage in features), default=1)


def _live(network: Timm) -> None:
    """Disturb, in place, each vector of parameters, then give each BatchNorm the mean and variance that it sees."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                centre = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(centre + NOISE * torch.randn(parameter.shape))
        hooks = [m.register_forward_pre_hook(_fit) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        if hooks:
            network(torch.randn(IMAGES, 3, *network.geometry.size))
        for hook in hooks:
            hook.remove()


def _fit(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    assert isinstance(norm, nn.BatchNorm2d)  # noqa: S101  # registered on nothing else
    assert norm.running_mean is not None  # noqa: S101
    assert norm.running_var is not None  # noqa: S101
    norm.running_mean.copy_(args[0].mean(dim=(0, 2, 3)))
    norm.running_var.copy_(args[0].var(dim=(0, 2, 3), unbiased=False) + norm.eps)


def _timm() -> ModuleType:
    """Import timm, also beside a torchvision that was built for another torch.

    timm takes plain Python from torchvision. Where its compiled operators do not load, torchvision still
    describes two of them to torch, which knows nothing of them and refuses: they are declared first.
    """
    try:
        return _load()
    except RuntimeError as exc:
        if "torchvision::" not in str(exc):
            raise
        for name in UNLOADED:
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        return _load()


def _load() -> ModuleType:
    return optional.load("timm", package="timm", install="replk-deploy[baselines]")
