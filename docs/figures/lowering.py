"""Draw docs/figures/lowering.svg: where the rows of one kernel go in the weight of each lowering.

    python docs/figures/lowering.py

The weights are what the lowerings themselves write, for a kernel whose taps are numbered.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

mpl.use("svg")
from matplotlib import pyplot as plt  # noqa: E402  # after the backend is chosen
from matplotlib.patches import Rectangle  # noqa: E402

from replk_deploy.lowerings.base import LargeConv  # noqa: E402
from replk_deploy.lowerings.dense import Dense  # noqa: E402
from replk_deploy.lowerings.grouped import Grouped  # noqa: E402
from replk_deploy.lowerings.strip import Strip  # noqa: E402

PAPER, INK, FAINT, RED = "#f6f8fa", "#1f2328", "#6e7781", "#d1242f"
WIDE, TALL = 8.5, 6.3  # inches
K, H = 7, 6  # of the kernel and of the map
AT = 1, 2  # the output pixel that is followed: row and column
STRIP = 4  # rows of a strip in the picture


SITE = LargeConv(name="figure", channels=1, kernel=(K, K), map=(H, H))
TAPS = np.arange(1, K * K + 1, dtype=np.float64).reshape(1, 1, K, K)  # 0 is left for what is no tap


def main() -> None:
    """Write the figure beside this file."""
    mpl.rcParams.update({"svg.hashsalt": "replk", "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK})
    figure = plt.figure(figsize=(WIDE, TALL), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDE), ylim=(0, TALL))
    axes.axis("off")
    convolution(axes, 0.62, 3.92, 0.21)
    grouped(axes, 3.62, 3.60, 0.77, 0.32)
    dense(axes, 0.62, 0.34, 0.069)
    strip(axes, 3.62, 1.22, 0.462, 0.32)
    figure.savefig(Path(__file__).with_suffix(".svg"), facecolor=PAPER, metadata={"Date": None}, dpi=160)


def convolution(axes: plt.Axes, left: float, bottom: float, cell: float) -> None:
    """Draw the kernel around one output pixel, and the map under it."""
    title(axes, 0.25, 6.02, "The convolution", f"{K}×{K} on {H}×{H}")
    row, column = AT
    taps(axes, TAPS[0, 0], left + (column - K // 2) * cell, bottom + (H - 1 - row - K // 2) * cell, cell, cell)
    axes.add_patch(Rectangle((left, bottom), H * cell, H * cell, fill=False, edgecolor=INK, linewidth=1.6))
    centre = left + (column + 0.5) * cell, bottom + (H - 1 - row + 0.5) * cell
    axes.plot(*centre, "o", color=RED, markersize=4.5)
    for i in range(H):
        axes.text(left + H * cell + 0.07, bottom + (H - 1 - i + 0.5) * cell, f"$i={i}$", fontsize=8, va="center")
    below = f"The pixel in row $o$ sees row $i$\nthrough kernel row $i-o+{K // 2}$ (colour)."
    axes.text(0.25, bottom - 0.10, below, fontsize=8.5, va="top", linespacing=1.4)


def grouped(axes: plt.Axes, left: float, bottom: float, width: float, high: float) -> None:
    """Draw T: a row of kernels of 1 x k for each row of the output."""
    weight = Grouped.weight(SITE, TAPS).reshape(H, H, K)
    title(axes, left - 0.37, 6.02, "grouped", f"$T$: {H} output rows × {H} input rows × {K} taps")
    blocks(axes, weight, left, bottom, width, high)
    frame(axes, left, bottom + (H - 1 - AT[0]) * high, H * width, high)


def strip(axes: plt.Axes, left: float, bottom: float, width: float, high: float) -> None:
    """Draw S: the same for a few rows of the output and all input rows that they need."""
    Strip.ROWS = STRIP
    reach = STRIP + K - 1
    tall = LargeConv(name="figure", channels=1, kernel=(K, K), map=(4 * K, H))
    weight = Strip.weight(tall, TAPS).reshape(STRIP, reach, K)
    title(axes, left - 0.37, 2.98, "strip", f"$S$: {STRIP} output rows × {reach} input rows × {K} taps, for any height")
    blocks(axes, weight, left, bottom, width, high)
    words = (
        "Rows count from the start of the strip, padding included.\n\n"
        "One channel each; white is zero; red frames: the weights of the red pixel."
    )
    axes.text(left - 0.37, bottom - 0.14, words, fontsize=8.5, va="top", linespacing=1.3)


def dense(axes: plt.Axes, left: float, bottom: float, cell: float) -> None:
    """Draw D, turned so that its rows are pixels of the output."""
    weight = Dense.weight(SITE, TAPS)[0].T
    title(axes, 0.25, 2.98, "dense", f"$D$: {H * H} × {H * H} pixels")
    taps(axes, weight, left, bottom, cell, cell, lines=False)
    side = H * H * cell
    for n in range(H + 1):
        axes.plot((left, left + side), (bottom + n * H * cell,) * 2, color=FAINT, linewidth=0.5)
        axes.plot((left + n * H * cell,) * 2, (bottom, bottom + side), color=FAINT, linewidth=0.5)
    for n in range(H):
        at = (n + 0.5) * H * cell
        axes.text(left + at, bottom - 0.12, f"$i={n}$", fontsize=8, ha="center", va="center")
        axes.text(left - 0.07, bottom + side - at, f"$o={n}$", fontsize=8, ha="right", va="center")
    frame(axes, left, bottom + side - (AT[0] * H + AT[1] + 1) * cell, side, cell)


def blocks(axes: plt.Axes, weight: np.ndarray, left: float, bottom: float, width: float, high: float) -> None:
    """Draw weights [o, i, k] as a table of kernels of one row."""
    outputs, inputs, _ = weight.shape
    for o in range(outputs):
        below = bottom + (outputs - 1 - o) * high
        axes.text(left - 0.07, below + high / 2, f"$o={o}$", fontsize=8, ha="right", va="center")
        for i in range(inputs):
            x = left + i * width + 0.03
            taps(axes, weight[o, i][None], x, below + 0.05, (width - 0.06) / K, high - 0.10)
    for i in range(inputs):
        x = left + (i + 0.5) * width
        axes.text(x, bottom + outputs * high + 0.09, f"$i={i}$", fontsize=8, ha="center", va="center")


def taps(
    axes: plt.Axes, values: np.ndarray, left: float, bottom: float, wide: float, high: float, *, lines: bool = True
) -> None:
    """Draw numbered taps: the colour says which row of the kernel, its lightness which column; zeros are white."""
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.95, K))[:, :3]
    rows, columns = np.divmod(values.astype(int) - 1, K)
    light = (columns / (K - 1) * 0.55)[..., None]
    shown = np.where(values[..., None] == 0, 1.0, colours[rows] * (1 - light) + light)
    extent = (left, left + values.shape[1] * wide, bottom, bottom + values.shape[0] * high)
    axes.imshow(shown, extent=extent, interpolation="nearest", aspect="auto", zorder=1)
    axes.set(xlim=(0, WIDE), ylim=(0, TALL))
    if lines:
        corner, size = (extent[0], extent[2]), (extent[1] - extent[0], extent[3] - extent[2])
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=FAINT, linewidth=0.5, zorder=2))


def frame(axes: plt.Axes, left: float, bottom: float, wide: float, high: float) -> None:
    """Mark the weights that give the pixel of the first panel."""
    axes.add_patch(Rectangle((left, bottom), wide, high, fill=False, edgecolor=RED, linewidth=1.4, zorder=3))


def title(axes: plt.Axes, x: float, y: float, text: str, more: str) -> None:
    """Write a heading."""
    said = axes.text(x, y, text, fontsize=10, fontweight="bold", va="baseline")
    axes.annotate(f"   {more}", (1, 0), xycoords=said, fontsize=9, va="bottom", color=FAINT)


if __name__ == "__main__":
    main()
