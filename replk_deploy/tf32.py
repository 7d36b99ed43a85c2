"""TensorFloat-32 on a machine that has none: the operands of matrix products rounded to 10 bits of mantissa."""

from typing import Any

import torch
from torch import Tensor, nn

DROPPED = 13  # of the 23 bits of mantissa of a float32
HALF = (1 << (DROPPED - 1)) - 1


def rounded(x: Tensor) -> Tensor:
    """Round float32 to the nearest value with 10 bits of mantissa, ties to even; NaN and infinities stay."""
    bits = x.contiguous().view(torch.int32)
    near = (bits + HALF + ((bits >> DROPPED) & 1)) & -(1 << DROPPED)
    return torch.where(x.isfinite(), near.view(torch.float32), x)


def emulate(model: nn.Module) -> None:
    """Let a float32 network compute as with TF32: convolutions and linear maps round both operands, sums stay float32.

    Changes `model`: its weights become rounded copies.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight = nn.Parameter(rounded(module.weight.detach()), requires_grad=False)
            module.register_forward_pre_hook(_round_inputs)


def _round_inputs(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(rounded(x) for x in inputs)
