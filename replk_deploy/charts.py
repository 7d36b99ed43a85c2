"""Plots of the report, as SVG text that takes its colours from the page: light, dark and print need one picture.

Each function draws what it is given and knows nothing of records. Colours are placeholders that become
CSS variables; text stays text.
"""

import io
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, FIRST, SECOND, BAD = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
VARIABLES = {INK: "--ink", FAINT: "--faint", FIRST: "--first", SECOND: "--second", BAD: "--bad"}
LIGHT = {"--ink": "#3d4451", "--faint": "#d5d9e0", "--first": "#1f6feb", "--second": "#c2570c", "--bad": "#c62828"}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
WIDTH = 5.2  # inches: small enough for a phone, so that its letters can be read there
BINS = 90


def errors(rows: Sequence[tuple[str, float, float]]) -> str:
    """Draw an error and its gate a row, on a logarithmic axis; NaN stands at the right.

    Args:
        rows: name, error, gate.
    """

    def draw(axes: Axes) -> None:
        inside = [v for _, error, gate in rows for v in (error, gate) if np.isfinite(v) and v > 0]
        low, high = min(inside, default=1e-16) / 3, max(inside, default=1.0) * 3
        for y, (_, error, gate) in enumerate(rows):
            passed = error <= gate
            at = min(max(error, low), high) if np.isfinite(error) else high
            axes.plot([low, at], [y, y], color=FIRST if passed else BAD, linewidth=1.6, solid_capstyle="butt")
            axes.plot([at], [y], "o" if passed else "X", color=FIRST if passed else BAD, markersize=5)
            axes.plot([gate], [y], "|", color=INK, markersize=11, markeredgewidth=1.6)
        axes.set_xscale("log")
        axes.set_xlim(low, high * 1.5)
        axes.set_xlabel("relative L2 error  ●   gate  |")
        _names(axes, [name for name, _, _ in rows])

    return _svg("errors", draw, height=0.55 + 0.24 * len(rows))


def latencies(rows: Sequence[tuple[str, Sequence[float], Sequence[float], Sequence[float]]]) -> str:
    """Draw the distribution of all samples a row, with marks for median and p99.

    Args:
        rows: name; samples; median, low and high; p99, low and high, or nothing.
    """

    def draw(axes: Axes) -> None:
        every = np.concatenate([np.asarray(samples) for _, samples, _, _ in rows])
        edges = np.geomspace(every.min() * 0.98, every.max() * 1.02, BINS + 1)
        for y, (_, samples, median, tail) in enumerate(rows):
            counts, _ = np.histogram(samples, edges)
            heights = np.sqrt(counts / counts.max()) * 0.72  # a lone sample must be seen
            axes.stairs(y - heights + 0.3, edges, baseline=y + 0.3, fill=True, color=FIRST, alpha=0.45, linewidth=0)
            _mark(axes, y, median, INK, "o")
            _mark(axes, y, tail, SECOND, "D")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_formatter(
            lambda x, _: f"{x:.3g}" if every.max() < 8 * every.min() else ""
        )  # no decade is in sight
        axes.set_xlabel("ms  (● median, ◆ p99, bars: 95 % intervals)")
        _names(axes, [name for name, *_ in rows])

    return _svg("latencies", draw, height=0.6 + 0.42 * len(rows))


def throughput(series: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> str:
    """Draw images a second against batch.

    Args:
        series: name; batch and images a second.
    """

    def draw(axes: Axes) -> None:
        shades = (FIRST, SECOND, INK, BAD)
        for i, (name, points) in enumerate(series):
            style = ("-", "--", ":", "-.")[i // len(shades) % 4]
            axes.plot(*zip(*points, strict=True), "o", linestyle=style, color=shades[i % 4], markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        batches = sorted({batch for _, points in series for batch, _ in points})
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.set_xlabel("batch")
        axes.set_ylabel("images / s")
        axes.grid(axis="y")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)

    return _svg("throughput", draw, height=2.4)


def layers(rows: Sequence[tuple[str, float, float | None, bool]]) -> str:
    """Draw the time of each layer, large kernels in another colour, with what the device could do at best.

    Args:
        rows: name, ms, attainable ms or None, whether it holds a large kernel.
    """

    def draw(axes: Axes) -> None:
        y = range(len(rows))
        axes.barh(y, [ms for _, ms, _, _ in rows], height=0.62, color=[SECOND if big else FIRST for *_, big in rows])
        for at, (_, _, best, _) in zip(y, rows, strict=True):
            if best is not None:
                axes.plot([best], [at], "|", color=INK, markersize=9, markeredgewidth=1.6)
        axes.set_xlabel("ms  (orange: large kernels, |: attainable)")
        _names(axes, [name for name, *_ in rows])

    return _svg("layers", draw, height=0.55 + 0.21 * len(rows))


def fields(rows: Sequence[tuple[str, Sequence[Sequence[float]]]]) -> str:
    """Draw receptive fields side by side, on one scale from 0 to 1."""

    def draw(figure: Figure) -> None:
        for axes, (name, cells) in zip(np.atleast_1d(figure.subplots(1, len(rows))), rows, strict=True):
            picture = axes.imshow(np.asarray(cells), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
            axes.set_title(name, fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
        figure.colorbar(picture, ax=figure.axes, shrink=0.8, label="contribution A")

    return _figure("fields", draw, height=2.5)


def peers(points: Sequence[tuple[str, float, float]], lines: Sequence[tuple[str, float]]) -> str:
    """Draw accuracy against latency; networks whose accuracy is not known are lines at their latency.

    Args:
        points: name, ms per image, share of right answers.
        lines: name, ms per image.
    """

    def draw(axes: Axes) -> None:
        for name, ms, top1 in points:
            axes.plot([ms], [100 * top1], "o", color=FIRST, markersize=6)
            axes.annotate(name, (ms, 100 * top1), textcoords="offset points", xytext=(6, 5), fontsize=8.5)
        for name, ms in lines:
            axes.axvline(ms, color=SECOND, linewidth=1.1, linestyle="--")
            axes.annotate(name, (ms, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=8, color=SECOND)
        axes.margins(0.25, 0.25)
        axes.set_xlabel("median ms per image")
        axes.set_ylabel("top-1 %")
        axes.grid()

    return _svg("peers", draw, height=2.6)


def standalone(svg: str) -> str:
    """Give a picture colours of its own, for a file without a page around it."""
    for name, colour in LIGHT.items():
        svg = svg.replace(f"var({name})", colour)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{svg}'


def _mark(axes: Axes, y: int, value: Sequence[float], colour: str, marker: str) -> None:
    if value:
        axes.plot(value[1:], [y, y], color=colour, linewidth=1.6)
        axes.plot(value[:1], [y], marker, color=colour, markersize=4)


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _svg(name: str, draw: Callable[[Axes], None], *, height: float) -> str:
    return _figure(name, lambda figure: draw(figure.add_subplot()), height=height)


def _figure(name: str, draw: Callable[[Figure], Any], *, height: float) -> str:
    """Draw, and return the <svg> element: identifiers are the picture's own, so that a page may hold several."""
    text = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    own = f"{name}-{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r'\bid="', f'id="{own}', svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{own}", svg)
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return svg.strip()
