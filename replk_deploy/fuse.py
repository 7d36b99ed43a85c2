"""Trained → fused: branches merged into one kernel, BatchNorms folded into their neighbours.

All arithmetic is float64. `merge` gives the layout of the reference project: only the branches of
each large kernel become one convolution, every other BatchNorm stays. `full` leaves none.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from replk_deploy.errors import ContractError
from replk_deploy.models import reparam
from replk_deploy.models.base import Form, Network
from replk_deploy.progress import Progress, silent
from replk_deploy.records import live

Level = Literal["full", "merge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """What was fused: names of the merged blocks, the folded BatchNorms and the ones left."""

    KIND: ClassVar[str] = "fusion"
    FORMAT: ClassVar[int] = 1

    model: Network = live()
    level: Level
    merged: tuple[str, ...]
    folded: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Tell whether there was anything to fuse."""
        return bool(self.merged or self.folded)


def fuse(model: Network, *, level: Level = "full", progress: Progress = silent) -> Fusion:
    """Return a network in deploy form that gives the same answer in eval mode; the input is untouched.

    Args:
        model: in any form; what is fused already stays as it is.
        level: `full` leaves no BatchNorm, `merge` leaves all outside the large kernels.
        progress: told after each merged block and folded norm.

    Returns:
        A Fusion whose model is float64; a folded network comes back as it was, with nothing changed.

    Raises:
        ContractError: the weights do not fill the fused network exactly, or a Reparam is left.
    """
    form: Form = "folded" if level == "full" or model.form == "folded" else "merged"
    if form == model.form:
        return Fusion(model=model, level=level, merged=(), folded=(), left=batch_norms(model))
    state = {name: t.detach().double() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, reparam.Reparam)}
    folds = tuple(model.folds()) if form == "folded" else ()
    total, merged = len(blocks) + len(folds), tuple(blocks)
    target = type(model).empty(model.geometry, form)
    for done, (name, block) in enumerate(blocks.items(), start=1):
        _drop(state, name)
        (child,) = (n for n, m in target.get_submodule(name).named_children() if isinstance(m, nn.Conv2d))
        _put(state, f"{name}.{child}", reparam.kernel_of(block.merged()))
        progress("fuse", done, total)
    for done, fold in enumerate(folds, start=1 + len(blocks)):
        norm = model.get_submodule(fold.norm)
        if not isinstance(norm, nn.BatchNorm2d):
            raise ContractError(f"{fold.norm} is a {type(norm).__name__}, not a BatchNorm")
        if fold.side == "alone":
            kernel = reparam.affine_conv(norm)
        elif fold.side == "after":
            kernel = reparam.fold_after(_take(state, fold.into), norm)
        else:
            kernel = reparam.fold_before(norm, _take(state, fold.into))
        _drop(state, fold.norm)
        _put(state, fold.into, kernel)
        progress("fuse", done, total)
    _fill(target, state)
    return Fusion(
        model=target, level=level, merged=merged, folded=tuple(f.norm for f in folds), left=batch_norms(target)
    )


def batch_norms(model: nn.Module) -> tuple[str, ...]:
    """Name every BatchNorm in a model."""
    return tuple(name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def _take(state: dict[str, Tensor], name: str) -> reparam.Kernel:
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    return reparam.Kernel(weight, torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias)


def _put(state: dict[str, Tensor], name: str, kernel: reparam.Kernel) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = kernel


def _drop(state: dict[str, Tensor], name: str) -> None:
    for key in [k for k in state if k.startswith(f"{name}.")]:
        del state[key]


def _fill(target: Network, state: dict[str, Tensor]) -> None:
    wanted = {name: t.shape for name, t in target.state_dict().items()}
    found = {name: t.shape for name, t in state.items()}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ContractError(f"fused weights do not fill the network: {', '.join(odd[:8])}")
    target.load_state_dict(state, assign=True)
    target.requires_grad_(requires_grad=False)
    if any(isinstance(m, reparam.Reparam) for m in target.modules()):
        raise ContractError("a re-parameterised block is left after fusion")
