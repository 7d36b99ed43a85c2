"""Plants every known fusion bug and shows that the proof catches it.

A bug is planted in the code of the fusion itself, by putting a faulty function in its place, and the
whole proof runs as it does for a user. A gate that nobody has seen fail is no gate.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from replk_deploy import fuse as fusing
from replk_deploy.errors import MismatchError
from replk_deploy.fuse import fuse
from replk_deploy.models import reparam, replknet
from replk_deploy.models.base import Network
from replk_deploy.models.reparam import Kernel
from replk_deploy.models.replknet import RepLKGeometry, RepLKNet
from replk_deploy.poison import randomise
from replk_deploy.progress import Progress, silent
from replk_deploy.proof import Oracle, Proof, cast, prove_fusion

SIZE = (64, 64)
SEEDS = (0, 1, 2)

GEOMETRY = RepLKGeometry(
    channels=(8, 12, 16, 24),
    depths=(1, 1, 2, 1),
    kernels=(31, 29, 27, 13),
    small=5,
    dw_channels=(8, 12, 16, 24),
    ffn_channels=(32, 48, 64, 96),
    classes=10,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plant:
    """One planted bug: how far off it made the answer, and the block or sentence that names it."""

    bug: str
    caught: bool
    caught_by: str
    rel_l2: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Selftest:
    """Every planted bug, and the correct fusions that must pass."""

    KIND: ClassVar[str] = "selftest"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ("passed",)

    plants: tuple[Plant, ...]
    clean: int
    false_alarms: int

    @property
    def passed(self) -> bool:
        """Tell whether every bug was caught and no correct fusion was refused."""
        return not self.false_alarms and bool(self.plants) and all(p.caught for p in self.plants)


def selftest(*, progress: Progress = silent) -> Selftest:
    """Run the proof of a small network with each bug planted, and without any."""
    total = len(BUGS) + len(SEEDS)
    plants, alarms = [], 0
    for done, (bug, plant) in enumerate(BUGS.items(), start=1):
        plants.append(caught(bug, plant))
        progress("selftest", done, total)
    for done, seed in enumerate(SEEDS, start=1 + len(BUGS)):
        alarms += prove(network(seed)).state != "pass"
        progress("selftest", done, total)
    return Selftest(plants=tuple(plants), clean=len(SEEDS), false_alarms=alarms)


def network(seed: int = 0) -> Network:
    """Make the small network in training form, with fresh BatchNorms: the proof must poison it itself."""
    return randomise(RepLKNet.build(GEOMETRY, "training"), seed=seed)


def prove(model: Network) -> Proof:
    """Fuse a network, store it in float32 and prove it, as `replk fuse` does."""
    return prove_fusion(Oracle(model, "selftest"), cast(fuse(model).model, torch.float32), level="full", size=SIZE)


def caught(bug: str, plant: Callable[[], AbstractContextManager[Any]]) -> Plant:
    """Plant one bug and say what the proof made of it."""
    with plant():
        try:
            found = prove(network())
        except MismatchError as exc:
            return Plant(bug=bug, caught=True, caught_by=exc.problem, rel_l2=float("inf"))
    worst = max(a.rel_l2 for a in [a for a in found.agreements if not a.passed] or found.agreements)
    culprit = found.bisection.culprit if found.bisection else None
    by = culprit.block if culprit else found.sentence
    return Plant(bug=bug, caught=found.state == "rejected", caught_by=by, rel_l2=worst)


def _affine(change: Callable[[nn.BatchNorm2d, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """Replace the scale and shift that a BatchNorm is read as."""
    honest = reparam.bn_affine

    def faulty(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        return change(norm, *honest(norm))

    return lambda: mock.patch.object(reparam, "bn_affine", faulty)


def _mean(norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_mean is not None  # noqa: S101  # every norm here has statistics
    return norm.running_mean.double()


def _sigma(norm: nn.BatchNorm2d, eps: float) -> Tensor:
    assert norm.running_var is not None  # noqa: S101
    return torch.sqrt(norm.running_var.double() + eps)


def _with_eps(eps: float) -> Any:
    def change(norm: nn.BatchNorm2d, _scale: Tensor, _shift: Tensor) -> tuple[Tensor, Tensor]:
        scale = norm.weight.double() / _sigma(norm, eps)
        return scale, norm.bias.double() - _mean(norm) * scale

    return _affine(change)


def _no_root(norm: nn.BatchNorm2d, scale: Tensor, _shift: Tensor) -> tuple[Tensor, Tensor]:
    wrong = scale / _sigma(norm, norm.eps)
    return wrong, norm.bias.double() - _mean(norm) * wrong


def _no_gamma(norm: nn.BatchNorm2d, _scale: Tensor, _shift: Tensor) -> tuple[Tensor, Tensor]:
    scale = 1 / _sigma(norm, norm.eps)
    return scale, norm.bias.double() - _mean(norm) * scale


def _embed(change: Callable[[Tensor], Tensor]) -> Any:
    """Replace the small kernel as it lies in the large one."""
    honest = reparam.embed_kernel
    return lambda: mock.patch.object(reparam, "embed_kernel", lambda small, size: change(honest(small, size)))


def _branches(change: Callable[[Kernel, Kernel], Kernel]) -> Any:
    """Replace the sum of two branches."""
    return lambda: mock.patch.object(reparam, "add_branches", change)


def _sum(large: Kernel, small: Kernel) -> Kernel:
    return Kernel(large.weight + reparam.embed_kernel(small.weight, large.weight.shape[-1]), large.bias + small.bias)


def _before(change: Callable[[nn.BatchNorm2d, Kernel], Kernel]) -> Any:
    return lambda: mock.patch.object(reparam, "fold_before", change)


_BEFORE = reparam.fold_before


def _wrong_axis(norm: nn.BatchNorm2d, kernel: Kernel) -> Kernel:
    """Scale rows for columns, where the map is square and nothing else would complain."""
    if kernel.weight.shape[0] != kernel.weight.shape[1]:
        return _BEFORE(norm, kernel)
    scale, shift = reparam.bn_affine(norm)
    return Kernel(kernel.weight * scale.reshape(-1, 1, 1, 1), kernel.bias + kernel.weight.flatten(1) @ shift)


def _head_shift(norm: nn.BatchNorm2d, kernel: Kernel) -> Kernel:
    folded = _BEFORE(norm, kernel)
    return Kernel(folded.weight, kernel.bias) if kernel.weight.dim() == 2 else folded  # noqa: PLR2004  # the head


def _after(change: Callable[[Kernel], Kernel]) -> Any:
    honest = reparam.fold_after
    return lambda: mock.patch.object(reparam, "fold_after", lambda kernel, norm: change(honest(kernel, norm)))


def _one_channel(large: Kernel, small: Kernel) -> Kernel:
    whole = _sum(large, small)
    bias = whole.bias.clone()
    bias[0] -= small.bias[0]
    return Kernel(whole.weight, bias)


def _one_block(large: Kernel, small: Kernel) -> Kernel:
    return large if large.weight.shape[-1] == GEOMETRY.kernels[2] else _sum(large, small)


def _swapped_norms() -> AbstractContextManager[Any]:
    def merged(block: replknet.LargeKernel) -> nn.Conv2d:
        small = block.small_conv
        assert small is not None  # noqa: S101  # the network of the selftest has a small kernel
        large, small_norm = block.lkb_origin.bn, small.bn
        block.lkb_origin.bn, small.bn = small_norm, large
        try:
            return honest(block)
        finally:
            block.lkb_origin.bn, small.bn = large, small_norm

    honest = replknet.LargeKernel.merged
    return mock.patch.object(replknet.LargeKernel, "merged", merged)


@contextmanager
def _lost_relu() -> Iterator[None]:
    """Leave out the ReLU behind the first stage's large kernel, in fused networks only."""
    honest = replknet.MergedKernel.forward

    class _Linear(Tensor):
        pass

    def forward(block: replknet.MergedKernel, x: Tensor) -> Tensor:
        out = honest(block, x)
        first = block.lkb_reparam.kernel_size[0] == GEOMETRY.kernels[0]
        return out.as_subclass(_Linear) if first else out

    relu = functional.relu

    def skipped(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.as_subclass(Tensor) if isinstance(x, _Linear) else relu(x, *args, **kwargs)

    with (
        mock.patch.object(replknet.MergedKernel, "forward", forward),
        mock.patch.object(functional, "relu", skipped),
    ):
        yield


@contextmanager
def _in_fused(change: Callable[[Network, Tensor], Tensor]) -> Iterator[None]:
    """Change what a folded network does with its images."""
    honest = RepLKNet.forward

    def forward(model: RepLKNet, images: Tensor) -> tuple[Tensor, ...]:
        if model.form != "folded":
            return honest(model, images)
        return honest(model, change(model, images))

    with mock.patch.object(RepLKNet, "forward", forward):
        yield


@contextmanager
def _tanh_gelu() -> Iterator[None]:
    """Use the approximate GELU in fused networks, where the norm before it is gone."""
    honest = replknet.ConvFFN.forward

    def forward(block: replknet.ConvFFN, x: Tensor) -> Tensor:
        if isinstance(block.preffn_bn, nn.BatchNorm2d):
            return honest(block, x)
        out: Tensor = block.pw2(functional.gelu(block.pw1(x), approximate="tanh"))
        return x + out

    with mock.patch.object(replknet.ConvFFN, "forward", forward):
        yield


@contextmanager
def _shortcut_too() -> Iterator[None]:
    """Let the shortcut, too, take the norm that was folded into the map beside it."""
    taken: list[tuple[Tensor, Tensor, Tensor]] = []  # folded weight, scale and shift of the norm inside it
    honest = replknet.RepLKBlock.forward

    def fold(norm: nn.BatchNorm2d, kernel: Kernel) -> Kernel:
        folded = _BEFORE(norm, kernel)
        taken.append((folded.weight, *reparam.bn_affine(norm)))
        return folded

    def forward(block: replknet.RepLKBlock, x: Tensor) -> Tensor:
        out = honest(block, x)
        for weight, scale, shift in taken:
            if weight.data_ptr() == block.pw1.conv.weight.data_ptr():
                out = out - x + x * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
        return out

    with (
        mock.patch.object(reparam, "fold_before", fold),
        mock.patch.object(replknet.RepLKBlock, "forward", forward),
    ):
        yield


def _half(kernel: Kernel) -> Kernel:
    return Kernel(kernel.weight.half().double(), kernel.bias.half().double())


def _nan(kernel: Kernel) -> Kernel:
    if kernel.weight.shape[-1] != GEOMETRY.kernels[0]:
        return kernel
    bias = kernel.bias.clone()
    bias[-1] = float("nan")
    return Kernel(kernel.weight, bias)


def _stored(change: Callable[[dict[str, Tensor]], None]) -> Any:
    """Change the float32 weights as they lie in the file, after a correct fusion."""
    honest = cast

    def faulty(model: Network, to: torch.dtype) -> Network:
        stored = honest(model, to)
        change(stored.state_dict())
        return stored

    return lambda: mock.patch.dict(globals(), {"cast": faulty})


def _one_weight(weights: dict[str, Tensor]) -> None:
    weights["stages.2.blocks.1.pw1.conv.weight"][0, 0] += 1e-2


def _ten_bits(weights: dict[str, Tensor]) -> None:
    for tensor in weights.values():
        bits = tensor.view(torch.int32)
        bits.add_(1 << 12).bitwise_and_(-(1 << 13))


def _ring(weights: dict[str, Tensor]) -> None:
    weights["stages.3.blocks.0.large_kernel.lkb_reparam.weight"][..., 0, :] += 1e-2


@contextmanager
def _lost_ring() -> Iterator[None]:
    """Lose the outer taps of merged kernels on their way into the fused network, where small maps do not reach."""
    honest = fusing._put

    def put(state: dict[str, Tensor], name: str, kernel: Kernel) -> None:
        if kernel.weight.shape[-1] in GEOMETRY.kernels[1:]:
            kernel = Kernel(functional.pad(kernel.weight[..., 1:-1, 1:-1], (1, 1, 1, 1)), kernel.bias)
        honest(state, name, kernel)

    with mock.patch.object(fusing, "_put", put):
        yield


def _other_checkpoint(weights: dict[str, Tensor]) -> None:
    for name, tensor in fuse(network(seed=7)).model.state_dict().items():
        weights[name].copy_(tensor)


BUGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "running mean dropped": _affine(lambda n, s, _t: (s, n.bias.double())),
    "beta dropped": _affine(lambda n, s, _t: (s, -_mean(n) * s)),
    "gamma dropped": _affine(_no_gamma),
    "sign of gamma lost": _affine(lambda n, s, _t: (s.abs(), n.bias.double() - _mean(n) * s.abs())),
    "sign of the mean": _affine(lambda n, s, _t: (s, n.bias.double() + _mean(n) * s)),
    "eps left out": _with_eps(0.0),
    "eps 1e-3": _with_eps(1e-3),
    "eps 1e-6": _with_eps(1e-6),
    "variance for its root": _affine(_no_root),
    "small kernel one pixel off in W": _embed(lambda k: k.roll(1, -1)),
    "small kernel one pixel off in H": _embed(lambda k: k.roll(1, -2)),
    "small kernel mirrored": _embed(lambda k: k.flip(-1)),
    "small kernel transposed": _embed(lambda k: k.transpose(-1, -2)),
    "small kernels shifted by one channel": _embed(lambda k: k.roll(1, 0)),
    "small branch dropped": _branches(lambda large, _small: large),
    "small branch dropped in one stage": _branches(_one_block),
    "small branch's bias dropped": _branches(lambda a, b: Kernel(_sum(a, b).weight, a.bias)),
    "small branch's bias dropped in one channel": _branches(_one_channel),
    "large kernel rotated": _branches(lambda a, b: _sum(Kernel(a.weight.rot90(2, (2, 3)), a.bias), b)),
    "outer taps of the merged kernels lost": _lost_ring,
    "norms of the branches swapped": _swapped_norms,
    "norm before a 1x1: shift dropped": _before(lambda norm, k: Kernel(_BEFORE(norm, k).weight, k.bias)),
    "norm before the head: shift dropped": _before(_head_shift),
    "norm before a 1x1: on the output axis": _before(_wrong_axis),
    "norm folded into the shortcut too": _shortcut_too,
    "fold done in float16": _after(_half),
    "one ReLU lost": _lost_relu,
    "tanh GELU for erf GELU": _tanh_gelu,
    "channels of the input reversed": lambda: _in_fused(lambda _m, x: x.flip(1)),
    "one NaN": _after(_nan),
    "one weight of the file changed": _stored(_one_weight),
    "outer taps of a kernel in the file changed": _stored(_ring),
    "weights of the file rounded as TF32": _stored(_ten_bits),
    "file of another checkpoint": _stored(_other_checkpoint),
}
