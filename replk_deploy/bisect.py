"""A network that answers wrongly → the first block that is at fault.

Each block is fed what the reference feeds its own: an error then belongs to that block alone, and
does not grow from one to the next.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from replk_deploy.models.base import Network
from replk_deploy.precision import ALGEBRA, TOLERANCES

HEAD = "head"
BlockAnswer = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockError:
    """How far one block is off when it is fed the reference's input, and how far it may be."""

    block: str
    rel_l2: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """The error of every block on its own."""

    KIND: ClassVar[str] = "bisection"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ("culprit",)

    blocks: tuple[BlockError, ...]

    @property
    def culprit(self) -> BlockError | None:
        """Return the first block that is not inside its limit."""
        return next((b for b in self.blocks if not b.rel_l2 <= b.limit), None)

    @property
    def sentence(self) -> str:
        """Name the culprit in words."""
        bad = self.culprit
        if bad is None:
            return "each block alone is right: the error lies before, behind or between them"
        return f"first wrong block: {bad.block}, alone {bad.rel_l2:.1e} off (limit {bad.limit:.1e})"


def bisect(
    reference: Network, candidate: BlockAnswer, images: Tensor, *, eager: BlockAnswer | None = None
) -> Bisection:
    """Compare a candidate with its reference block by block.

    Args:
        reference: float64.
        candidate: gives a named block's answer to that block's input; `head` is the last one.
        images: [N, 3, H, W] float64.
        eager: the same blocks in PyTorch at the candidate's precision, whose error times ten is the
            limit; None for a float64 candidate, held to the limit of the algebra.
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, _out: Any) -> None:
            inputs[name] = args[0]

        return hook

    names = tuple(reference.blocks())
    hooks = [reference.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    rows = []
    with torch.inference_mode():
        reference(images)
        for hook in hooks:
            hook.remove()
        inputs[HEAD] = reference.get_submodule(names[-1])(inputs[names[-1]])
        for name in (*names, HEAD):
            x = inputs.pop(name)
            ref = _block(reference, name, x)
            limit = ALGEBRA if eager is None else 10 * max(_off(eager(name, x), ref), TOLERANCES["fp32"].floor)
            rows.append(BlockError(block=name, rel_l2=_off(candidate(name, x), ref), limit=limit))
    return Bisection(blocks=tuple(rows))


def blocks_of(model: Network) -> BlockAnswer:
    """Return a network's blocks as answers, in the network's own precision."""
    dtype = next(model.parameters()).dtype
    return lambda name, x: _block(model, name, x.to(dtype))


def _block(model: Network, name: str, x: Tensor) -> Tensor:
    out: Tensor = model.head_of(x) if name == HEAD else model.get_submodule(name)(x)
    return out


def _off(got: Tensor, ref: Tensor) -> float:
    if got.shape != ref.shape:
        return float("inf")
    return float((got.double() - ref).norm() / ref.norm().clamp_min(1e-300))
