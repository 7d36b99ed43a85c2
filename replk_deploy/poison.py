"""A copy of a network whose BatchNorm statistics fit its activations and are then disturbed.

Fresh BatchNorms (mean 0, variance 1, γ 1, β 0) hide every mistake in the algebra of a fold, and
statistics drawn without looking at the activations make the output almost independent of the
input. So images go through once, layer by layer, and each norm is given the mean and variance it
sees, moved by noise, before its output goes on.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from replk_deploy.models.base import Network

IMAGES = 8


def poison(model: Network, *, size: int = 96, seed: int = 0) -> Network:
    """Return a float64 copy with statistics fitted and disturbed; the input is untouched.

    Per norm: mean = batch mean + 0.3·sd·N(0, 1), variance = batch variance·U(0.5, 1.5),
    β = N(0, 0.3²), γ = 1 + N(0, 0.3²) with a fifth of the signs flipped.

    Args:
        model: in a form that has BatchNorms; without any, the copy equals the input.
        size: side of the square images that are sent through; larger than the images judged later, because
            a large kernel sees more of a larger map and a network fitted to smaller ones overflows float16.
        seed: decides images and noise.
    """
    twin = copy.deepcopy(model).double().eval().requires_grad_(requires_grad=False)
    rng = torch.Generator().manual_seed(seed)

    def disturb(norm: nn.Module, args: Any) -> None:
        assert isinstance(norm, nn.BatchNorm2d)  # noqa: S101  # registered on nothing else
        (x,) = args
        mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False) + norm.eps
        normal = torch.randn(3, len(mean), generator=rng).to(mean)
        uniform = torch.rand(2, len(mean), generator=rng).to(mean)
        _set(norm.running_mean, mean + 0.3 * var.sqrt() * normal[0])
        _set(norm.running_var, var * (0.5 + uniform[0]))
        _set(norm.bias, 0.3 * normal[1])
        _set(norm.weight, (1 + 0.3 * normal[2]) * torch.where(uniform[1] < 0.2, -1.0, 1.0))  # noqa: PLR2004

    hooks = [m.register_forward_pre_hook(disturb) for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        twin(torch.randn(IMAGES, 3, size, size, generator=rng).to(next(twin.parameters())))
    for hook in hooks:
        hook.remove()
    return twin


def randomise(model: Network, *, seed: int = 0) -> Network:
    """Fill convolution and linear weights in place so that activations keep their scale; returns the model."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, fan_in**-0.5, generator=rng)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=rng)
    return model


def _set(parameter: Tensor | None, value: Tensor) -> None:
    if parameter is not None:
        parameter.copy_(value)
