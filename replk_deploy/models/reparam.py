"""The algebra of re-parameterisation: several linear branches are one convolution.

In eval mode a BatchNorm is the affine map y = s·x + t per channel, with s = γ / √(var + ε) and
t = β − mean·s. Convolution is linear, so an affine map after it scales its kernels, one before an
unpadded 1x1 convolution scales the input axis, and parallel kernels add once they are centred in
one another. Every function returns float64 and leaves its arguments alone.
"""

import abc
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Kernel(NamedTuple):
    """A convolution or linear map: weight [out, in/groups, ...] and bias [out], both float64."""

    weight: Tensor
    bias: Tensor


class Reparam(nn.Module, abc.ABC):
    """A block that trains as several branches and deploys as one convolution."""

    @abc.abstractmethod
    def merged(self) -> nn.Conv2d:
        """Return one float64 convolution with the same answer in eval mode; the block stays as it was."""


def kernel_of(module: nn.Module) -> Kernel:
    """Return a convolution's or linear layer's weight and bias in float64, zeros where it has no bias."""
    weight, bias = module.weight, module.bias
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight tensor")
    zeros = torch.zeros(weight.shape[0], dtype=torch.float64)
    return Kernel(weight.detach().double(), bias.detach().double() if isinstance(bias, Tensor) else zeros)


def bn_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a BatchNorm in eval mode, each [C] float64."""
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise TypeError("a BatchNorm without running statistics cannot be folded")
    scale = norm.weight.detach().double() / torch.sqrt(var.double() + norm.eps)
    return scale, norm.bias.detach().double() - mean.double() * scale


def fold_after(kernel: Kernel, norm: nn.BatchNorm2d) -> Kernel:
    """Fold the BatchNorm that follows a convolution: W·s on the output axis, b·s + t."""
    scale, shift = bn_affine(norm)
    rows = scale.reshape(-1, *[1] * (kernel.weight.dim() - 1))
    return Kernel(kernel.weight * rows, kernel.bias * scale + shift)


def fold_before(norm: nn.BatchNorm2d, kernel: Kernel) -> Kernel:
    """Fold the BatchNorm that precedes an unpadded, ungrouped 1x1 map: W·s on the input axis, b + W·t.

    Exact too where a global mean lies between the two, since a mean of affine maps is the affine map
    of the mean. Not exact for a padded convolution: zeros of the padding never went through the norm.
    """
    scale, shift = bn_affine(norm)
    matrix = kernel.weight.flatten(1)
    if kernel.weight.shape[1] != len(scale) or matrix.shape[1] != len(scale):
        raise ValueError(f"only a 1x1 map takes a norm before it; the weight is {tuple(kernel.weight.shape)}")
    return Kernel((matrix * scale).reshape(kernel.weight.shape), kernel.bias + matrix @ shift)


def embed_kernel(small: Tensor, size: int) -> Tensor:
    """Centre a kernel in a larger one of zeros.

    Args:
        small: [C, 1, k, k], k odd.
        size: K >= k, odd.

    Returns:
        [C, 1, K, K]; convolving with padding K // 2 gives what `small` gives with k // 2.

    Raises:
        ValueError: K − k is odd or negative: the two have no common centre.
    """
    margin, odd = divmod(size - small.shape[-1], 2)
    if odd or margin < 0:
        raise ValueError(f"a {small.shape[-1]} kernel has no centre in a {size} kernel")
    return functional.pad(small, (margin, margin, margin, margin))


def add_branches(large: Kernel, small: Kernel) -> Kernel:
    """Add a parallel "same"-padded depthwise branch into a larger one, bias and all."""
    return Kernel(large.weight + embed_kernel(small.weight, large.weight.shape[-1]), large.bias + small.bias)


def affine_conv(norm: nn.BatchNorm2d) -> Kernel:
    """Return a lone BatchNorm as a depthwise 1x1 convolution: weight [C, 1, 1, 1], bias [C]."""
    scale, shift = bn_affine(norm)
    return Kernel(scale.reshape(-1, 1, 1, 1), shift)
