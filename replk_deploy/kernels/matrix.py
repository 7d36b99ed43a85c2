"""A 1x1 convolution of channel-major activations as one matrix product: how it is cut, and its start on a GPU."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from replk_deploy import optional
from replk_deploy.kernels import nvrtc, tuning
from replk_deploy.kernels.launch import ACTIVATIONS, Activation
from replk_deploy.kernels.nvrtc import EXTRA

FEW, MANY = 16, 4000  # tiles: products in fewer leave a GPU idle, and small tiles in more are never the fastest
SMALL = 128 * 64  # elements of a tile


class Work(NamedTuple):
    """One matrix product: weight [rows, depth] and activations [depth, columns]."""

    rows: int
    depth: int
    columns: int
    activation: Activation
    residual: bool
    dtype: torch.dtype


class Cut(NamedTuple):
    """How a matrix product is cut: rows, columns and depth of a tile, warps, stages of its pipeline.

    Attributes:
        each: programs a multiprocessor that take one tile after the other through tensor descriptors; 0 for one
            program a tile without them.
        halves: finish a tile in two halves.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    each: int = 0
    halves: bool = False

    def shared(self, *, residual: bool) -> int:
        """Return the bytes of shared memory: the pipeline, and with descriptors what goes in and out at the end."""
        pipeline = self.stages * (self.rows + self.columns) * self.depth * 2
        end = self.rows * self.columns * 2 // (2 if self.halves else 1) if self.each else 0
        return pipeline + end * (1 + residual) + 1024


CUTS = (
    *(Cut(128, 256, 64, 8, 3, 1), Cut(128, 128, 64, 8, 4, 1), Cut(128, 128, 64, 8, 3, 2, halves=True)),
    *(Cut(128, 256, 64, 8, 3, 1, halves=True), Cut(128, 128, 32, 4, 4, 3), Cut(64, 256, 64, 8, 3, 2)),
    *(Cut(128, 128, 64, 4, 3, 2, halves=True), Cut(256, 128, 64, 8, 3, 1, halves=True)),
    *(Cut(128, 128, 64, 8, 4, 1, halves=True), Cut(128, 256, 32, 8, 4, 1)),
    *(Cut(128, 128, 64, 8, 3), Cut(128, 128, 32, 4, 4), Cut(64, 128, 64, 4, 4), Cut(64, 256, 32, 4, 4)),
    *(Cut(64, 64, 64, 4, 5), Cut(64, 64, 128, 4, 4), Cut(64, 32, 64, 4, 5), Cut(32, 64, 64, 4, 5)),
    *(Cut(64, 16, 128, 4, 5), Cut(16, 32, 128, 2, 5), Cut(32, 32, 128, 4, 5), Cut(16, 32, 256, 4, 3)),
)


def multiply(
    weight: Tensor, x: Tensor, bias: Tensor, residual: Tensor | None, y: Tensor, activation: Activation
) -> None:
    """Compute y = activation(weight @ x + bias + residual) in the cut that is fastest here.

    Args:
        weight: [rows, depth] float16 or bfloat16, like all the others.
        x: [depth, columns], each row aligned to 16 bytes.
        bias: [rows].
        residual: [rows, columns], laid out as x.
        y: [rows, columns], laid out as x; written.
        activation: none, relu or gelu.
    """
    rows, depth = weight.shape
    work = Work(rows, depth, x.shape[1], activation, residual is not None, x.dtype)
    cuts = _fitting(work, shared=nvrtc.limits()[1], linked=linked())
    start = functools.partial(_start, weight, x, bias, residual, y, activation)
    start(tuning.fastest(work, cuts, start))


def programs() -> Any:
    """Return the kernels that Triton compiles; UnavailableError without it."""
    optional.load("triton", package="triton", install=EXTRA)
    from replk_deploy.kernels import products  # noqa: PLC0415  # needs Triton

    return products


@functools.cache
def _fitting(work: Work, *, shared: int, linked: bool) -> list[Cut]:
    """List the cuts worth trying on a GPU with so much shared memory a block."""

    def tiles(cut: Cut) -> int:
        return -(-work.rows // cut.rows) * -(-work.columns // cut.columns)

    tensors = linked and work.depth % 8 == 0  # a descriptor wants rows aligned
    able = [cut for cut in CUTS if (tensors or not cut.each) and cut.shared(residual=work.residual) <= shared]
    fit = [cut for cut in able if cut.rows < 2 * work.rows and cut.depth < 2 * work.depth and tiles(cut) >= FEW]
    found = [cut for cut in fit if tiles(cut) <= MANY or cut.rows * cut.columns > SMALL]
    return found or [max(able, key=tiles)]


def linked() -> bool:
    """Tell whether a kernel can start while the one before it ends, and use tensor descriptors: from Hopper on."""
    return torch.cuda.get_device_capability() >= (9, 0)


def _start(
    weight: Tensor, x: Tensor, bias: Tensor, residual: Tensor | None, y: Tensor, activation: Activation, cut: Cut
) -> None:
    """Start y = activation(weight @ x + bias + residual) in a cut."""
    (rows, depth), columns = weight.shape, x.shape[1]
    tiles = -(-rows // cut.rows) * -(-columns // cut.columns)
    common = {
        "ACT": ACTIVATIONS.index(activation),
        "ADD": residual is not None,
        "LINKED": linked(),
        "launch_pdl": linked(),
        "BM": cut.rows,
        "BN": cut.columns,
        "BK": cut.depth,
        "num_warps": cut.warps,
        "num_stages": cut.stages,
    }
    other = y if residual is None else residual
    if not cut.each:
        sizes = (rows, columns, depth, x.stride(0))
        programs().product[(tiles,)](weight, x, bias, other, y, *sizes, EVEN=depth % cut.depth == 0, **common)
        return
    descriptor = optional.load("triton.tools.tensor_descriptor", package="triton", install=EXTRA).TensorDescriptor
    out = [cut.rows, cut.columns // 2 if cut.halves else cut.columns]
    tensors = (
        *(weight, descriptor.from_tensor(weight, [cut.rows, cut.depth])),
        *(descriptor.from_tensor(x, [cut.depth, cut.columns]), bias),
        *(descriptor.from_tensor(other, out), descriptor.from_tensor(y, out)),
    )
    count = min(tiles, cut.each * nvrtc.limits()[0])
    programs().product_tiles[(count,)](
        *tensors, rows, columns, depth, count, HALVES=cut.halves, FLAT=tiles > count, **common
    )
