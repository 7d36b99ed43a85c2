"""Rows become channels: one grouped convolution along the width.

With x viewed as [N, C·H, 1, W], which moves nothing, a convolution in C groups with a 1 x k kernel mixes
the H rows of a channel as it likes. T[c·H+o, i, 0, s] = w[c, i−o+P, s] makes it the one that is wanted.
H must be known; it executes H·k multiply-adds an output instead of K·k.

Nothing runs down that map of one row, so rows of many images may stand in it: [C, H, N, W] is
[1, C·H, N, W] without moving anything, and the same convolution computes them all.
"""

from typing import ClassVar, final

import numpy as np
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.nn import functional

from replk_deploy.lowerings.base import BY_ROW, Array, ChannelMajor, LargeConv, Layout, Writer, centre


@final
class Grouped(ChannelMajor):
    """Identity A: weight [C·H, H, 1, k]."""

    name: ClassVar[str] = "grouped"
    layout: ClassVar[Layout] = BY_ROW

    @classmethod
    def shape(cls, site: LargeConv) -> tuple[int, ...]:
        """Return [C·H, H, 1, k]."""
        high = site.map[0]
        return site.channels * high, high, 1, site.taps[1]

    @classmethod
    def placed(cls, site: LargeConv, kernel: Array) -> Array:
        """Slide the rows of the kernel, between zeros, over the rows of the map: [C, o, i, k]."""
        high = site.map[0]
        rows = centre(kernel, (2 * high - 1, site.taps[1]))  # row d is that of the distance i − o = d − (H−1)
        return sliding_window_view(rows, high, axis=1)[:, ::-1].swapaxes(2, 3)

    @classmethod
    def bias(cls, site: LargeConv, bias: Array) -> Array:
        """Repeat it for each row, [C·H], so that it stays in the convolution."""
        return np.repeat(bias, site.map[0])

    @classmethod
    def macs(cls, site: LargeConv) -> int:
        """Count H·k an output."""
        high, wide = site.map
        return site.channels * high * wide * high * site.taps[1]

    @classmethod
    def apply(cls, site: LargeConv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute it on [N, C·H, 1, W]."""
        high, wide = site.map
        rows = x.reshape(x.shape[0], site.channels * high, 1, wide)
        y = functional.conv2d(rows, weight, bias, padding=(0, site.padding[1]), groups=site.channels)
        return y.reshape(x.shape[0], site.channels, high, wide)

    @classmethod
    def nodes(cls, site: LargeConv, write: Writer, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Write Reshape, Conv, Reshape."""
        high, wide = site.map
        rows = write.reshape(x, 0, site.channels * high, 1, wide)
        return write.reshape(cls._convolved(site, write, rows, weight, bias), 0, site.channels, high, wide)

    @classmethod
    def flat(cls, site: LargeConv, write: Writer, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Write Reshape, Conv, Reshape; the images are the height of the one map."""
        high, wide = site.map
        rows = write.reshape(x, 1, site.channels * high, -1, wide)
        return write.reshape(cls._convolved(site, write, rows, weight, bias), site.channels, -1)

    @classmethod
    def _convolved(
        cls, site: LargeConv, write: Writer, rows: ir.Value, weight: ir.Value, bias: ir.Value | None
    ) -> ir.Value:
        """Write the convolution of [·, C·H, ·, W]."""
        side = site.padding[1]
        return write.op(
            "Conv",
            rows,
            weight,
            *([] if bias is None else [bias]),
            group=site.channels,
            kernel_shape=[1, site.taps[1]],
            pads=[0, side, 0, side],
        )
