"""Shape of a large depthwise convolution → which kernel, in which tiles, on which grid.

A tile is what one block computes. Every tile gives the same answer; `candidates` lists those worth timing, best
guess first by counting products, bytes and waves.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, Self

from replk_deploy.kernels.nvrtc import Constants

Activation = Literal["none", "relu", "gelu"]
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "gelu")
TYPES = ("float16", "bfloat16", "float32")
TF32 = "tf32"  # float32 where tensor cores are allowed
ROWS = 16  # of one tensor-core product
NARROW, WIDEST = 64, 128  # columns: maps up to the first are never cut into tiles, wider ones than the second always
ACCUMULATORS = 32  # blocks of 8 columns times rows that a warp sums at a time, 4 registers each
REGISTERS, WARPS = 65536, 64  # of one multiprocessor
MOST_REGISTERS = 240  # of a thread, of 255: the count is a guess
CYCLES = 7.0  # a product on one of four tensor cores, measured (docs/kernels.md)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One depthwise convolution: `images` maps of `channels` x `height` x `width`, a `kernel` x `kernel` filter."""

    images: int
    channels: int
    height: int
    width: int
    kernel: int

    @property
    def reach(self) -> int:
        """Return how many chunks of 8 columns a filter row reaches to either side."""
        return (self.kernel // 2 + 7) // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A tile of band.cu: constants as there; `parts` is how many values of 16 bits stand for one."""

    shape: Shape
    parts: int
    images: int
    rows: int
    columns: int
    strip: int
    warps: int
    skew: int = 0
    pad: int = 0

    name = "band"

    def padded(self) -> Self:
        """Fill in the padding that keeps shared memory free of bank conflicts."""
        choices = (dataclasses.replace(self, skew=skew, pad=pad) for skew, pad in product(range(8), range(8)))
        return min(choices, key=lambda tile: (tile.conflicts, tile.pad + tile.skew))

    @property
    def banded(self) -> bool:
        """Tell whether the tile is lower than the map."""
        return self.shape.height > self.rows

    @property
    def chunks(self) -> int:
        """Return the chunks of 8 columns in a row of shared memory."""
        return self.columns // 8 + (2 * self.shape.reach if self.shape.width > self.columns else 0)

    @property
    def rows_in(self) -> int:
        """Return the input rows in shared memory."""
        return self.rows + 2 * (self.shape.kernel // 2) if self.banded else self.shape.height

    @property
    def group(self) -> int:
        """Return the output rows of one row group."""
        return -(-min(self.rows, self.shape.height) // (ROWS // self.images))

    @property
    def strips(self) -> int:
        """Return how many strips the warps of a block share."""
        return -(-self.group // self.strip)

    @property
    def image_units(self) -> int:
        """Return 16-byte units from one image to the next."""
        return self.rows_in * self.chunks + (self.rows_in - 1) // self.group * self.skew + self.pad

    @property
    def conflicts(self) -> int:
        """Return how many of the 8 rows that a load takes at once meet in the fullest bank, less one."""
        group = self.group * self.chunks + self.skew
        starts = [(m % self.images * self.image_units + m // self.images * group) % 8 for m in range(8)]
        return max(map(starts.count, starts)) - 1

    @property
    def shared(self) -> int:
        """Return the bytes of shared memory of a block."""
        words = 8 * self.shape.reach + 8
        part = self.shape.kernel * 2 * words * 4 + self.images * self.image_units * 16
        return self.parts * part + self.chunks * 16

    @property
    def registers(self) -> int:
        """Return about how many registers a thread takes."""
        found = 4 * self.strip * (self.columns // 8) + self.strip * (2 * self.shape.reach + 1)
        return found + 2 * self.chunks + 40

    def blocks(self, shared: int) -> int:
        """Return how many blocks run at a time on a multiprocessor with this much shared memory."""
        threads = self.warps * 32
        by_registers = REGISTERS // (threads * min(-(-self.registers // 8) * 8, 255))
        return max(1, min(by_registers, shared // (self.shared + 1024), WARPS // self.warps, 16))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Return channels, groups of images, tiles of a map."""
        s = self.shape
        tiles = -(-s.height // self.rows) * -(-s.width // self.columns)
        return (s.channels, -(-s.images // self.images), tiles)

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return self.warps * 32

    def constants(self, *, dtype: str, activation: Activation, shared: int) -> Constants:
        """Return what the kernel is compiled with."""
        s = self.shape
        return (
            *(("K", s.kernel), ("H", s.height), ("W", s.width)),
            *(("IMG", self.images), ("TH", self.strip), ("WARPS", self.warps), ("BLOCKS", self.blocks(shared))),
            *(("BH", self.rows), ("BW", self.columns), ("SKEW", self.skew), ("PAD", self.pad)),
            *(("BF16", int(dtype != "float16")), ("SPLIT", int(self.parts > 1))),
            ("ACT", ACTIVATIONS.index(activation)),
        )

    def cost(self, multiprocessors: int, shared: int) -> float:
        """Return about how many cycles it takes, to order candidates by."""
        s = self.shape
        half, blocks = s.kernel // 2, self.columns // 8
        chunks = sum(
            1 for j in range(blocks) for c in range(self.chunks)
            if abs(c - j - (self.chunks - blocks) // 2) <= s.reach
        )  # fmt: skip
        products = chunks / 2 * 1.2  # the leftovers go one by one
        if self.images == ROWS and not self.banded:
            met = sum(min(y, half) + min(s.height - 1 - y, half) + 1 for y in range(s.height)) / self.strips
        else:
            met = s.kernel * self.strip
        steps = min(s.kernel + self.strip - 1, self.rows_in if self.images == ROWS else 10**9)
        a_strip = (2 * self.parts - 1) * met * products * CYCLES + steps * (self.chunks + 2 * s.reach + 6) * 4
        per_warp = -(-self.strips // self.warps)
        fill = 1500 + self.shared / self.threads / 4
        at_once = self.blocks(shared)
        each = max(at_once * self.warps * per_warp * a_strip / 4, per_warp * a_strip * 2) + fill * math.sqrt(at_once)
        return -(-math.prod(self.grid) // (multiprocessors * at_once)) * each


@dataclass(frozen=True, slots=True, kw_only=True)
class Direct:
    """A tile of direct.cu: constants as there."""

    shape: Shape
    images: int
    rows: int
    columns: int

    name = "direct"

    @classmethod
    def of(cls, shape: Shape, shared: int) -> Self:
        """Choose a tile of at most 256 threads, in at most so many bytes of shared memory where one row fits."""
        columns = min(-(-shape.width // 8) * 8, 128)
        rows = min(shape.height, max(1, 256 // (columns // 8)), 16)
        images = max(1, min(shape.images, 256 // (rows * columns // 8), 8))
        tile = cls(shape=shape, images=images, rows=rows, columns=columns)
        while tile.shared > shared and tile.images * tile.rows > 1:
            tile = tile._smaller()
        return tile

    def _smaller(self) -> Self:
        if self.images > 1:
            return dataclasses.replace(self, images=self.images - 1)
        return dataclasses.replace(self, rows=-(-self.rows // 2))

    @property
    def shared(self) -> int:
        """Return the bytes of shared memory of a block."""
        s = self.shape
        return 4 * (s.kernel**2 + self.images * (self.rows + s.kernel - 1) * (self.columns + s.kernel))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Return channels, groups of images, tiles of a map."""
        s = self.shape
        return (s.channels, -(-s.images // self.images), -(-s.height // self.rows) * -(-s.width // self.columns))

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return self.images * self.rows * self.columns // 8

    def constants(self, *, dtype: str, activation: Activation, shared: int) -> Constants:
        """Return what the kernel is compiled with."""
        del shared
        s = self.shape
        return (
            *(("K", s.kernel), ("H", s.height), ("W", s.width), ("BH", self.rows), ("BW", self.columns)),
            *(
                ("PLANES", self.images),
                ("TYPE", TYPES.index("float32" if dtype == TF32 else dtype)),
                ("ACT", ACTIVATIONS.index(activation)),
            ),
        )


Tile = Band | Direct


@functools.cache
def candidates(shape: Shape, dtype: str, *, multiprocessors: int, shared: int, most: int = 8) -> tuple[Tile, ...]:
    """List tiles for a shape that fit a GPU, best guess first.

    Args:
        shape: of the convolution.
        dtype: float16, bfloat16, float32, which only CUDA cores take, or tf32.
        multiprocessors: of the GPU.
        shared: bytes of shared memory that one block, and so one multiprocessor, can have.
        most: how many.
    """
    if dtype == "float32":
        return (Direct.of(shape, shared),)
    fitting = (
        tile
        for tile in _bands(shape, 2 if dtype == TF32 else 1)
        if tile.shared <= shared and tile.registers <= MOST_REGISTERS and tile.conflicts == 0
    )
    ordered = sorted(fitting, key=lambda tile: tile.cost(multiprocessors, shared))
    return tuple(ordered[:most]) or (Direct.of(shape, shared),)


def _bands(shape: Shape, parts: int) -> Iterator[Band]:
    whole = -(-shape.width // 8) * 8
    widths = {whole} if whole <= NARROW else {min(whole, WIDEST), 64, 48, 32} if whole <= WIDEST else {64, 48, 32}
    heights = {shape.height, *(h for h in (64, 32, 16) if h < shape.height)}
    for columns, rows, images in product(sorted(widths), sorted(heights), (16, 8, 4, 2, 1)):
        if images > 1 and images >= 2 * shape.images:
            continue
        group = -(-rows // (ROWS // images))
        most = min(ACCUMULATORS * 8 // columns, group)
        for strip in (s for s in range(1, most + 1) if s == 1 or -(-group // s) < -(-group // (s - 1))):
            strips = -(-group // strip)
            for warps in {min(w, strips) for w in (1, 2, 4, 6, 8)}:
                yield Band(
                    shape=shape, parts=parts, images=images, rows=rows, columns=columns, strip=strip, warps=warps
                ).padded()
