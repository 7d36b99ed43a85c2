"""Strips of q rows: one strided grouped convolution, for maps much higher than the kernel.

A strip of q output rows needs R = q+K−1 input rows. A convolution with kernel R x k and stride q down the
map computes all q rows of a strip as q channels, with S[c·q+o, 0, i, s] = w[c, i−o, s]; strips and rows
then change places. The weight does not grow with the map, and R·k multiply-adds an output are fewer than
the H·k of whole columns where H is above R.
"""

from typing import ClassVar, final

import numpy as np
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.nn import functional

from replk_deploy.lowerings.base import Array, LargeConv, Lowering, Writer, centre


@final
class Strip(Lowering):
    """Identity A by strips: weight [C·q, 1, R, k]."""

    name: ClassVar[str] = "strip"
    ROWS: ClassVar[int] = 16  # of a strip: what one matrix instruction of a GPU takes

    @classmethod
    def rows(cls, site: LargeConv) -> int:
        """Return q: the output rows of one strip."""
        return min(cls.ROWS, site.map[0])

    @classmethod
    def strips(cls, site: LargeConv) -> int:
        """Count the strips; the last may reach beyond the map."""
        return -(-site.map[0] // cls.rows(site))

    @classmethod
    def reach(cls, site: LargeConv) -> int:
        """Return R: the input rows of one strip."""
        return cls.rows(site) + site.taps[0] - 1

    @classmethod
    def shape(cls, site: LargeConv) -> tuple[int, ...]:
        """Return [C·q, 1, R, k]."""
        return site.channels * cls.rows(site), 1, cls.reach(site), site.taps[1]

    @classmethod
    def placed(cls, site: LargeConv, kernel: Array) -> Array:
        """Slide the rows of the kernel, between zeros, over the rows of a strip: [C, o, i, k]."""
        rows = cls.rows(site)
        between = centre(kernel, (site.taps[0] + 2 * (rows - 1), site.taps[1]))
        return sliding_window_view(between, cls.reach(site), axis=1)[:, ::-1].swapaxes(2, 3)

    @classmethod
    def bias(cls, site: LargeConv, bias: Array) -> Array:
        """Repeat it for each row of a strip, [C·q]."""
        return np.repeat(bias, cls.rows(site))

    @classmethod
    def macs(cls, site: LargeConv) -> int:
        """Count R·k an output, of whole strips."""
        computed = site.channels * cls.strips(site) * cls.rows(site) * site.map[1]
        return computed * cls.reach(site) * site.taps[1]

    @classmethod
    def apply(cls, site: LargeConv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute all strips, then put their rows in order."""
        rows, strips, (high, wide) = cls.rows(site), cls.strips(site), site.map
        beyond = strips * rows - high
        x = functional.pad(x, (0, 0, 0, beyond)) if beyond else x
        y = functional.conv2d(x, weight, bias, stride=(rows, 1), padding=site.padding, groups=site.channels)
        y = y.reshape(x.shape[0], site.channels, rows, strips, wide).transpose(2, 3)
        return y.reshape(x.shape[0], site.channels, strips * rows, wide)[:, :, :high]

    @classmethod
    def nodes(cls, site: LargeConv, write: Writer, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Write Conv, Reshape, Transpose, Reshape, and Slice where the last strip reaches beyond the map."""
        rows, strips, (high, wide) = cls.rows(site), cls.strips(site), site.map
        top, side = site.padding
        beyond = strips * rows - high
        y = write.op(
            "Conv",
            x,
            weight,
            *([] if bias is None else [bias]),
            group=site.channels,
            kernel_shape=[cls.reach(site), site.taps[1]],
            strides=[rows, 1],
            pads=[top, side, top + beyond, side],
        )
        y = write.reshape(y, 0, site.channels, rows, strips, wide)
        y = write.reshape(write.op("Transpose", y, perm=[0, 1, 3, 2, 4]), 0, site.channels, strips * rows, wide)
        if not beyond:
            return y
        return write.op("Slice", y, *(write.integers(n, [v]) for n, v in (("start", 0), ("end", high), ("axis", 2))))
