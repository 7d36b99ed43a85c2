"""The whole map at once: one matrix per channel.

y[:, c] = x[:, c] · D[c] over maps laid out as vectors of H·W, with D[c, i·W+j, o·W+q] = w[c, i−o+P, j−q+P].
Where the kernel covers the map there is hardly a zero in it, and a batch is one matrix product per
channel. It works on [C, N, H·W], so two transpositions surround it unless its neighbours share that layout.
"""

import math
from typing import ClassVar, final

import onnx_ir as ir
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from replk_deploy.lowerings.base import BY_IMAGE, Array, ChannelMajor, LargeConv, Layout, Writer, centre


@final
class Dense(ChannelMajor):
    """Identity B: weight [C, H·W, H·W], input by output."""

    name: ClassVar[str] = "dense"
    layout: ClassVar[Layout] = BY_IMAGE

    @classmethod
    def shape(cls, site: LargeConv) -> tuple[int, ...]:
        """Return [C, H·W, H·W]."""
        area = math.prod(site.map)
        return site.channels, area, area

    @classmethod
    def placed(cls, site: LargeConv, kernel: Array) -> Array:
        """Slide the kernel, between zeros, over the map: [C, i, j, o, q]."""
        high, wide = site.map
        taps = centre(kernel, (2 * high - 1, 2 * wide - 1))  # tap (d, e) is that of distances d − (H−1), e − (W−1)
        windows = sliding_window_view(taps, (high, wide), axis=(1, 2))[:, ::-1, ::-1]  # [C, o, q, i, j]
        return windows.transpose(0, 3, 4, 1, 2)

    @classmethod
    def bias(cls, site: LargeConv, bias: Array) -> Array:
        """Shape it as [C, 1, 1]."""
        return bias.reshape(site.channels, 1, 1)

    @classmethod
    def macs(cls, site: LargeConv) -> int:
        """Count H·W an output."""
        return site.channels * math.prod(site.map) ** 2

    @classmethod
    def apply(cls, site: LargeConv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute it on [C, N, H·W]; what comes back lies channel by channel in memory."""
        y = torch.bmm(x.flatten(2).transpose(0, 1), weight)
        y = y if bias is None else y + bias  # apart from the product, so that a compiler fuses it with what follows
        return y.transpose(0, 1).view(x.shape[0], site.channels, *site.map)

    @classmethod
    def nodes(cls, site: LargeConv, write: Writer, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Write Reshape, Transpose, the product, Transpose, Reshape."""
        high, wide = site.map
        planes = write.op("Transpose", write.reshape(x, 0, site.channels, high * wide), perm=[1, 0, 2])
        y = cls._product(write, planes, weight, bias)
        return write.reshape(write.op("Transpose", y, perm=[1, 0, 2]), 0, site.channels, high, wide)

    @classmethod
    def flat(cls, site: LargeConv, write: Writer, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Write Reshape, the product, Reshape."""
        planes = write.reshape(x, site.channels, -1, math.prod(site.map))
        return write.reshape(cls._product(write, planes, weight, bias), 0, -1)

    @classmethod
    def _product(cls, write: Writer, planes: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Write MatMul and Add on [C, N, H·W]."""
        y = write.op("MatMul", planes, weight)
        return y if bias is None else write.op("Add", y, bias)
