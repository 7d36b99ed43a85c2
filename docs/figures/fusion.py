"""Draw docs/figures/fusion.svg: one RepLK block before and after, and a 5x5 kernel inside a 31x31 one.

    python docs/figures/fusion.py

The kernels are those of the first block of models/digits.pth, scaled by their BatchNorms.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

mpl.use("svg")
from matplotlib import pyplot as plt  # noqa: E402  # after the backend is chosen
from matplotlib.patches import FancyBboxPatch, Rectangle  # noqa: E402

from replk_deploy import checkpoint  # noqa: E402
from replk_deploy.models import reparam  # noqa: E402

PAPER, INK, FAINT = "#f6f8fa", "#1f2328", "#6e7781"
BLUE, ORANGE, GREEN, GREY = "#b6d4f5", "#f8cfa0", "#b9e0bd", "#e3e6ea"
EDGE = {BLUE: "#2f6db3", ORANGE: "#b5671a", GREEN: "#3a8245", GREY: "#8b949e"}
CHANNEL = 5
FLOOR = -3.5  # log10 of the smallest magnitude that is told apart
HIGH = 0.62
WIDE, TALL = 8.5, 6.8  # inches


def main() -> None:
    """Write the figure beside this file."""
    mpl.rcParams.update({"svg.hashsalt": "replk", "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK})
    figure = plt.figure(figsize=(WIDE, TALL), facecolor=PAPER)
    axes = figure.add_axes((0, 0.47, 1, 0.53))
    axes.set(xlim=(0, WIDE), ylim=(0, 0.53 * TALL))
    axes.axis("off")
    block(axes)
    kernels(figure)
    figure.savefig(Path(__file__).with_suffix(".svg"), facecolor=PAPER, metadata={"Date": None}, dpi=160)


def block(axes: plt.Axes) -> None:
    """Draw the block in training form, and below it, aligned, what each part becomes."""
    high, low, after = 2.6, 1.82, 0.42
    middle = (high + low) / 2
    title(axes, 0.25, 3.27, "Training form: 4 convolutions, 5 BatchNorms")
    cells = [
        (1.05, middle, "BN", BLUE),
        (1.70, middle, "1×1", BLUE),
        (2.35, middle, "BN", BLUE),
        (3.05, middle, "ReLU", GREY),
        (3.97, high, "31×31", ORANGE),
        (4.70, high, "BN", ORANGE),
        (3.97, low, "5×5", ORANGE),
        (4.70, low, "BN", ORANGE),
        (5.95, middle, "ReLU", GREY),
        (6.62, middle, "1×1", GREEN),
        (7.24, middle, "BN", GREEN),
    ]
    dot(axes, 0.34, middle, "x")
    for start, end in (
        (0.46, 0.80),
        (1.30, 1.45),
        (1.95, 2.10),
        (2.60, 2.78),
        (5.51, 5.68),
        (6.22, 6.36),
        (6.88, 6.98),
    ):
        arrow(axes, (start, middle), (end, middle))
    for y in (high, low):
        line(axes, (3.32, 3.49, 3.49, 3.65), (middle, middle, y, y), arrowed=True)
        arrow(axes, (4.29, y), (4.45, y))
        line(axes, (4.95, 5.37, 5.37), (y, y, middle + 0.14 * np.sign(y - middle)), arrowed=True)
    plus(axes, 5.37, middle)
    arrow(axes, (7.50, middle), (7.62, middle))
    plus(axes, 7.76, middle)
    arrow(axes, (7.90, middle), (8.08, middle))
    dot(axes, 8.19, middle, "y")
    line(axes, (0.64, 0.64, 7.76, 7.76), (middle, 3.06, 3.06, middle + 0.14), arrowed=True)
    for x, y, text, colour in cells:
        box(axes, x, y, text, colour, width={"ReLU": 0.54, "31×31": 0.64, "5×5": 0.64}.get(text, 0.5))

    title(axes, 0.25, 1.28, "Folded form: 3 convolutions, each with a bias")
    dot(axes, 0.34, after, "x")
    spans = [(1.70, 1.80, "1×1 + bias", BLUE), (4.585, 1.87, "31×31 + bias", ORANGE), (6.93, 1.12, "1×1 + bias", GREEN)]
    arrow(axes, (0.46, after), (0.80, after))
    for start, end in ((2.60, 2.78), (3.32, 3.65), (5.52, 5.68), (6.22, 6.37), (7.49, 7.62)):
        arrow(axes, (start, after), (end, after))
    plus(axes, 7.76, after)
    arrow(axes, (7.90, after), (8.08, after))
    dot(axes, 8.19, after, "y")
    line(axes, (0.64, 0.64, 7.76, 7.76), (after, 0.94, 0.94, after + 0.14), arrowed=True)
    for x, width, text, colour in spans:
        box(axes, x, after, text, colour, width=width)
    box(axes, 3.05, after, "ReLU", GREY, width=0.54)
    box(axes, 5.95, after, "ReLU", GREY, width=0.54)


def kernels(figure: plt.Figure) -> None:
    """Draw the two kernels of one channel after their BatchNorms, and their sum."""
    network = checkpoint.load(ROOT / "models" / "digits.pth").model
    trained = network.get_submodule("stages.0.blocks.0.large_kernel")
    large, small = (
        reparam.fold_after(reparam.kernel_of(branch.conv), branch.bn)
        for branch in (trained.lkb_origin, trained.small_conv)
    )
    size = large.weight.shape[-1]
    centred = reparam.embed_kernel(small.weight, size)
    merged = reparam.add_branches(large, small).weight
    figure.text(
        0.25 / WIDE, 0.437, "The orange sum, in one channel of models/digits.pth", fontsize=10, fontweight="bold"
    )
    names = ("$s_K\\,W_K$   31×31", "$s_k\\,W_k$   5×5, centred", "$W$   31×31, merged")
    width, gap, left, bottom = 0.265, 0.042, 0.030, 0.045
    for index, (name, kernel) in enumerate(zip(names, (large.weight, centred, merged), strict=True)):
        x = left + index * (width + gap)
        axes = figure.add_axes((x, bottom, width, width * WIDE / TALL))
        values = np.abs(kernel[CHANNEL, 0].numpy())
        shown = np.log10(np.maximum(values, 10**FLOOR))
        image = axes.imshow(
            np.ma.masked_where(values == 0, shown), cmap="cividis", vmin=FLOOR, vmax=0, interpolation="nearest"
        )
        axes.set_facecolor("white")
        axes.set(xticks=(), yticks=())
        axes.set_title(name, fontsize=9, pad=5)
        for spine in axes.spines.values():
            spine.set_edgecolor(FAINT)
        margin = (size - small.weight.shape[-1]) / 2 - 0.5
        frame = Rectangle((margin, margin), 5, 5, fill=False, edgecolor="#e5484d", linewidth=1.3)
        axes.add_patch(frame)
        if index < 2:
            figure.text(
                x + width + gap / 2,
                bottom + width * WIDE / TALL / 2,
                "+="[index],
                ha="center",
                va="center",
                fontsize=14,
            )
    scale = figure.add_axes((left + 3 * width + 2 * gap + 0.016, bottom, 0.013, width * WIDE / TALL))
    bar = figure.colorbar(image, cax=scale, ticks=range(-3, 1))
    bar.ax.set_yticklabels([f"$10^{{{t}}}$" if t else "1" for t in range(-3, 1)])
    bar.ax.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK)
    bar.ax.set_title("|w|", fontsize=9, pad=5)
    bar.outline.set_edgecolor(FAINT)


def title(axes: plt.Axes, x: float, y: float, text: str) -> None:
    """Write a heading."""
    axes.text(x, y, text, fontsize=10, fontweight="bold", va="center")


def box(axes: plt.Axes, x: float, y: float, text: str, colour: str, *, width: float) -> None:
    """Draw one layer, centred at x, y."""
    corner = (x - width / 2 + 0.03, y - HIGH / 4 - 0.02)
    style = "round,pad=0.03,rounding_size=0.06"
    patch = FancyBboxPatch(
        corner, width - 0.06, HIGH / 2 + 0.04, boxstyle=style, facecolor=colour, edgecolor=EDGE[colour], linewidth=1
    )
    axes.add_patch(patch)
    axes.text(x, y - 0.005, text, ha="center", va="center", fontsize=9)


def dot(axes: plt.Axes, x: float, y: float, text: str) -> None:
    """Write the name of a value."""
    axes.text(x, y, f"${text}$", ha="center", va="center", fontsize=11)


def plus(axes: plt.Axes, x: float, y: float) -> None:
    """Draw a sum."""
    axes.plot(x, y, "o", markersize=15, markerfacecolor="white", markeredgecolor=FAINT, zorder=3)
    axes.text(x, y - 0.01, "+", ha="center", va="center", fontsize=11, zorder=4)


def arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow."""
    style = {"arrowstyle": "-|>", "color": FAINT, "linewidth": 1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def line(axes: plt.Axes, xs: tuple[float, ...], ys: tuple[float, ...], *, arrowed: bool) -> None:
    """Draw a line through points, with an arrow on its last stretch."""
    axes.plot(xs, ys, color=FAINT, linewidth=1, solid_joinstyle="round", zorder=0)
    if arrowed:
        arrow(axes, (xs[-2], ys[-2]), (xs[-1], ys[-1]))


if __name__ == "__main__":
    main()
