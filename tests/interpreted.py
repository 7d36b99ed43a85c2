"""Our Triton kernels on a CPU, in Triton's interpreter: any matrix, any cut, and planted bugs.

    TRITON_INTERPRET=1 python -m tests.interpreted

A process of its own, because a Triton that interprets compiles no more. `test_kernels` starts it.
"""

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from replk_deploy.kernels import matrix, nvrtc, op, products, tuning
from replk_deploy.kernels.launch import ACTIVATIONS
from replk_deploy.kernels.matrix import CUTS, Cut

ROUNDED = 4e-4  # of float16, as a whole: half of the last place is 2.8e-4
BUGS = {
    "a column further": ("n = pid // tiles * BN + tl.arange(0, BN)", "n = pid // tiles * BN + tl.arange(0, BN) + 1"),
    "a tile too early": ("m0, n0 = tile % tiles_m * BM, tile // tiles_m * BN", "m0, n0 = 0, tile // tiles_m * BN"),
    "the same depth again": ("xs += BK * pitch.to(tl.int64)", "xs += 0"),
    "a half twice": ("_finish(right, shift,", "_finish(left, shift,"),
    "an image over its edge": ("(at_column < W) & (k[:, None] < 27)", "(k[:, None] < 27)"),
    "a GELU by polynomial alone": ("tl.where(v < -4.25, v * 0.0, near)", "near"),
    "a padding that is normalised": ("factor + offset, 0.0)", "factor + offset, offset)"),
}


def product_error(rows: int, depth: int, columns: int, cut: Cut, activation: Any, residual: bool) -> float:  # noqa: FBT001
    """Multiply in a cut; what lies beyond the columns that count is NaN, as it may be in a network."""
    source = torch.Generator().manual_seed(rows * depth + columns)
    pitch = -(-columns // 16) * 16

    def values(*size: int) -> torch.Tensor:
        found = torch.randn(size, generator=source).half()
        if len(size) > 1 and size[1] == pitch:
            found[:, columns:] = torch.nan
        return found

    weight, x, bias, y = values(rows, depth), values(depth, pitch), values(rows), torch.full((rows, pitch), torch.nan)
    add, y = values(rows, pitch) if residual else None, y.half()
    tuning.fastest = lambda _work, _ways, _start: cut
    matrix.multiply(weight, x, bias, add, y, activation)
    whole = weight.double() @ x.double() + bias.double()[:, None] + (add.double() if add is not None else 0)
    wrong = y.double() - op.activated(whole, activation)
    return float(wrong[:, :columns].norm() / whole[:, :columns].norm())


@settings(max_examples=20, derandomize=True, database=None, deadline=None)
@given(
    rows=st.integers(1, 150),
    depth=st.integers(1, 20),
    columns=st.integers(1, 300),
    cut=st.sampled_from(CUTS),
    activation=st.sampled_from(ACTIVATIONS),
    residual=st.booleans(),
)
def every_cut_is_the_product(rows: int, depth: int, columns: int, cut: Cut, activation: str, residual: bool) -> None:  # noqa: FBT001
    depth *= 8 if cut.each else 7  # a descriptor wants rows aligned
    assert product_error(rows, depth, columns, cut, activation, residual) < ROUNDED


def first_error(size: tuple[int, int], *, pixels: bool) -> float:
    """Run the first convolution on images, or on pixels that it normalises."""
    source, channels = torch.Generator().manual_seed(1), 20
    weight, bias = torch.randn(channels, 27, generator=source).half(), torch.randn(channels, generator=source).half()
    images: torch.Tensor = torch.randn(2, 3, *size, generator=source).half()
    scale, shift = torch.tensor([0.01, 0.02, 0.03]), torch.tensor([-1.0, -2.0, -3.0])
    wide = images.double()
    if pixels:
        images = torch.randint(0, 256, (2, *size, 3), generator=source, dtype=torch.uint8).permute(0, 3, 1, 2)
        wide = images.double() * scale.double()[:, None, None] + shift[:, None, None]
    whole = functional.conv2d(wide, weight.double().view(channels, 3, 3, 3), bias.double(), 2, 1)
    height, width = whole.shape[2:]
    columns = 2 * height * width
    y = torch.full((channels, columns + 5), torch.nan).half()
    high, wide_tile = 32, 128
    matrix.programs().first[(-(-columns // wide_tile), 1)](
        *(images, functional.pad(weight, (0, 5)), bias, scale, shift, y),
        *(2, *size, height, width, channels, *images.stride(), columns + 5),
        PATCH=32, PIXELS=pixels, LINKED=False, BM=high, BN=wide_tile,
    )  # fmt: skip
    got = y[:, :columns].view(channels, 2, height, width).transpose(0, 1).double()
    return float((got - whole.relu()).norm() / whole.norm()) if y[:, columns:].isnan().all() else torch.inf


def far_error(activation: Any) -> float:
    """Multiply what is no number, and what is far from 0, by 1; return the worst error."""
    far = torch.tensor([torch.nan, torch.inf, -torch.inf, 60000.0, -60000.0, -1000.0, -4.5, 4.5, -4.0, 4.0, 0.0]).half()
    weight, x, y = torch.zeros(16, 16).half(), torch.zeros(16, 16).half(), torch.zeros(16, 16).half()
    weight[0, 0], x[0, : len(far)] = 1, far
    tuning.fastest = lambda _work, _ways, _start: next(c for c in CUTS if not c.each)
    matrix.multiply(weight, x, torch.zeros(16).half(), None, y, activation)
    got, expected = y[0, : len(far)].double(), op.activated(far.double(), activation)
    alike = torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
    return float((got - expected)[expected.isfinite()].abs().max()) if alike else torch.inf


def with_bug(old: str, new: str) -> ModuleType:
    """Return the kernels with a few words changed."""
    text = Path(products.__file__).read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path = Path(tempfile.mkdtemp(), "planted.py")
    path.write_text(text.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("planted", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def worst() -> float:
    """Return the error of the worst of a few works that between them use all."""
    cuts = (CUTS[0], next(c for c in CUTS if c.halves), next(c for c in CUTS if not c.each))
    found = [product_error(150, 136, 300, cut, "gelu", residual=True) for cut in cuts]
    found += [first_error(size, pixels=pixels) for size in ((9, 12), (16, 33)) for pixels in (False, True)]
    found += [far_error(activation) for activation in ACTIVATIONS]
    return max(e if e == e else torch.inf for e in found)  # noqa: PLR0124  # NaN is no small error


if __name__ == "__main__":
    matrix.linked, nvrtc.limits = (lambda: False), (lambda: (1, 232448))  # few programs, which take tiles in turn
    assert worst() < ROUNDED, worst()
    every_cut_is_the_product()
    for name, (old, new) in BUGS.items():
        planted = with_bug(old, new)
        matrix.programs = lambda planted=planted: planted
        assert worst() > 10 * ROUNDED, name
    print("right, and", len(BUGS), "bugs seen")
