"""The layers of a network whose activations lie channel by channel.

A 1x1 convolution is one matrix product there, whatever the batch. Bias, activation and residual are part of the
product, or of the depthwise kernel, that comes before them. On a GPU each layer is one kernel; on a CPU it is
PyTorch's own convolution, slower, to check the arithmetic of a network by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from replk_deploy.kernels import matrix, nvrtc, op
from replk_deploy.kernels.launch import Activation

ALIGNED = 16  # elements
TAPS, PATCH = 27, 32  # of the first convolution, and a size that tensor cores take
SMALL_THREADS = 256


@dataclass(frozen=True, slots=True)
class Maps:
    """Feature maps: `data` is [C, pitch], of which N·H·W columns count."""

    data: Tensor
    images: int
    height: int
    width: int

    @classmethod
    def empty(cls, channels: int, images: int, height: int, width: int, like: Tensor) -> Self:
        """Make room for maps in the type of a tensor, where it lies; each channel begins aligned."""
        pitch = -(-images * height * width // ALIGNED) * ALIGNED
        return cls(torch.empty(channels, pitch, dtype=like.dtype, device=like.device), images, height, width)

    @property
    def columns(self) -> int:
        """Return N·H·W."""
        return self.images * self.height * self.width

    @property
    def view(self) -> Tensor:
        """Return them as [N, C, H, W], not copied."""
        shape = (self.images, self.height, self.width)
        return self.data[:, : self.columns].view(-1, *shape).transpose(0, 1)

    def like(self, channels: int) -> Self:
        """Make room for as many maps of the same size, with other channels."""
        return self.empty(channels, self.images, self.height, self.width, self.data)


def _bias(conv: nn.Conv2d) -> nn.Parameter:
    """Return the bias of a convolution, zeros where it has none."""
    found = conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias.detach()
    return nn.Parameter(found, requires_grad=False)


@final
class Pointwise(nn.Module):
    """A 1x1 convolution, what is added to it, and an activation."""

    def __init__(self, conv: nn.Conv2d, activation: Activation) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().flatten(1).contiguous(), requires_grad=False)
        self.bias, self.activation = _bias(conv), activation

    def forward(self, x: Maps, add: Maps | None = None) -> Maps:
        """Return activation(conv(x) + add)."""
        y = x.like(len(self.weight))
        if not x.data.is_cuda:
            found = functional.conv2d(x.view, self.weight[:, :, None, None], self.bias)
            y.view.copy_(op.activated(found if add is None else found + add.view, self.activation))
            return y
        residual = None if add is None else add.data
        matrix.multiply(self.weight, x.data, self.bias, residual, y.data, self.activation)
        return y


@final
class Large(nn.Module):
    """A depthwise convolution with a large kernel, and an activation."""

    def __init__(self, conv: nn.Conv2d, activation: Activation) -> None:
        super().__init__()
        self.weight, self.bias, self.activation = conv.weight, _bias(conv), activation

    def forward(self, x: Maps) -> Maps:
        """Return activation(conv(x))."""
        y = x.like(x.data.shape[0])
        if x.data.is_cuda:
            op.convolve(x.view, self.weight, self.bias, self.activation, y.view, ahead=True)
        else:
            y.view.copy_(op.by_pytorch(x.view, self.weight, self.bias, self.activation))
        return y


@final
class Small(nn.Module):
    """A depthwise convolution with a small kernel, of stride 1 or 2, and a ReLU."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.stride = conv.weight, _bias(conv), conv.stride[0]

    def forward(self, x: Maps) -> Maps:
        """Return relu(conv(x))."""
        channels, kernel = x.data.shape[0], self.weight.shape[-1]
        height, width = ((n - 1) // self.stride + 1 for n in (x.height, x.width))
        y = Maps.empty(channels, x.images, height, width, x.data)
        view, out = x.view, y.view
        if not x.data.is_cuda:
            found = functional.conv2d(view, self.weight, self.bias, self.stride, kernel // 2, groups=channels)
            out.copy_(functional.relu(found))
            return y
        neighbours = next(v for v in (8, 4, 2, 1) if width % v == 0)
        constants = (
            *(("K", kernel), ("STRIDE", self.stride), ("H", x.height), ("W", x.width), ("V", neighbours)),
            *(("BF16", int(x.data.dtype == torch.bfloat16)), ("ACT", 1)),
        )
        nvrtc.start(
            "small",
            constants,
            *(view, self.weight, self.bias, out),
            *(x.images, view.stride(0), view.stride(1), out.stride(0), out.stride(1)),
            grid=(-(-x.images * height * (width // neighbours) // SMALL_THREADS), channels, 1),
            threads=SMALL_THREADS,
        )
        return y


@final
class First(nn.Module):
    """The 3x3 convolution of stride 2 that reads the images, and a ReLU.

    Args:
        conv: the convolution.
        mean: of the three channels, of pixels from 0 to 1.
        std: of the three channels.
    """

    def __init__(self, conv: nn.Conv2d, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, _bias(conv)
        patch = functional.pad(conv.weight.detach().flatten(1), (0, PATCH - TAPS))
        self.patch = nn.Parameter(patch, requires_grad=False)
        of_std = torch.tensor(std, dtype=torch.float64)
        self.scale = nn.Parameter((1 / 255 / of_std).float(), requires_grad=False)
        of_mean = torch.tensor(mean, dtype=torch.float64)
        self.shift = nn.Parameter((-of_mean / of_std).float(), requires_grad=False)

    def forward(self, images: Tensor) -> Maps:
        """Return relu(conv(images)) for images [N, 3, H, W], or pixels [N, H, W, 3] uint8, normalised first."""
        pixels = images.dtype == torch.uint8
        planes = images.permute(0, 3, 1, 2) if pixels else images
        count, _, height, width = planes.shape
        channels = len(self.weight)
        y = Maps.empty(channels, count, (height - 1) // 2 + 1, (width - 1) // 2 + 1, self.weight)
        if not images.is_cuda:
            if pixels:
                planes = planes * self.scale[:, None, None] + self.shift[:, None, None]
            found = functional.conv2d(planes.to(self.weight.dtype), self.weight, self.bias, 2, 1)
            y.view.copy_(functional.relu(found))
            return y
        linked = matrix.linked()
        high, wide = min(128, max(16, 1 << (channels - 1).bit_length())), 128
        matrix.programs().first[(-(-y.columns // wide), -(-channels // high))](
            *(images, self.patch, self.bias, self.scale, self.shift, y.data),
            *(count, height, width, y.height, y.width, channels, *planes.stride(), y.data.stride(0)),
            PATCH=PATCH, PIXELS=pixels, LINKED=linked, launch_pdl=linked, BM=high, BN=wide, num_warps=4,
        )  # fmt: skip
        return y
