"""Each rewrite computes the convolution that it replaces, on every map, and only moves weights."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from replk_deploy.errors import ReplkError
from replk_deploy.forms import AUTO, FORMS
from replk_deploy.lowerings import LOWERINGS, NONE, base, dense, grouped, strip
from replk_deploy.lowerings.base import Additions, LargeConv, Lowering, Writer, crop

EXACT = 1e-12
ODD = st.integers(0, 15).map(lambda n: 2 * n + 1)
KERNELS = st.one_of(
    st.integers(3, 15).map(lambda n: (2 * n + 1,) * 2), st.tuples(ODD, ODD).filter(lambda k: max(k) >= 7)
)
LENGTHS = st.one_of(st.integers(1, 20), st.sampled_from([31, 33]))
MAPS = st.tuples(LENGTHS, LENGTHS).filter(lambda m: m[0] * m[1] <= 400)
SITES = st.builds(
    lambda channels, kernel, size: LargeConv(name="here", channels=channels, kernel=kernel, map=size),
    st.integers(1, 5),
    KERNELS,
    MAPS,
)
MANY_STRIPS = LargeConv(name="here", channels=2, kernel=(13, 9), map=(41, 5))
EXAMPLES = [
    MANY_STRIPS,
    LargeConv(name="here", channels=3, kernel=(7, 7), map=(7, 7)),
    LargeConv(name="here", channels=3, kernel=(31, 31), map=(16, 9)),
    LargeConv(name="here", channels=1, kernel=(51, 5), map=(14, 18)),
    LargeConv(name="here", channels=2, kernel=(5, 51), map=(14, 18)),
    LargeConv(name="here", channels=2, kernel=(27, 27), map=(1, 1)),
    LargeConv(name="here", channels=2, kernel=(1, 7), map=(5, 1)),
]
every = pytest.mark.parametrize("lowering", LOWERINGS.values(), ids=LOWERINGS)


def direct(site: LargeConv, x: torch.Tensor, weight: np.ndarray, bias: np.ndarray | None) -> torch.Tensor:
    """Convolve with the kernel as it is, padding and all."""
    padding = (site.kernel[0] // 2, site.kernel[1] // 2)
    b = None if bias is None else torch.from_numpy(bias)
    return functional.conv2d(x, torch.from_numpy(weight), b, padding=padding, groups=site.channels)


def drawn(
    site: LargeConv, *, bias: bool, batch: int, seed: int = 0
) -> tuple[torch.Tensor, np.ndarray, np.ndarray | None]:
    """Return input, kernel and bias in float64."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((batch, site.channels, *site.map)))
    kernel = rng.standard_normal((site.channels, 1, *site.kernel))
    return x, kernel, rng.standard_normal(site.channels) if bias else None


def module(lowering: type[Lowering], site: LargeConv, kernel: np.ndarray, bias: np.ndarray | None) -> nn.Module:
    weight = torch.from_numpy(lowering.weight(site, kernel))
    return lowering.module(site, weight, None if bias is None else torch.from_numpy(lowering.bias(site, bias)))


def error(lowering: type[Lowering], site: LargeConv, *, bias: bool = True, batch: int = 2) -> float:
    x, kernel, b = drawn(site, bias=bias, batch=batch)
    wanted, got = direct(site, x, kernel, b), module(lowering, site, kernel, b)(x)
    assert got.shape == wanted.shape
    assert got.dtype == torch.float64
    return float((got - wanted).norm() / wanted.norm())


@every
@settings(deadline=None, max_examples=60, derandomize=True)
@given(site=SITES, bias=st.booleans(), batch=st.integers(1, 3))
def test_a_module_computes_the_convolution(lowering: type[Lowering], site: LargeConv, bias: bool, batch: int) -> None:  # noqa: FBT001
    assert error(lowering, site, bias=bias, batch=batch) <= EXACT


@every
@pytest.mark.parametrize("site", EXAMPLES, ids=str)
def test_a_module_computes_it_on_odd_maps(lowering: type[Lowering], site: LargeConv) -> None:
    assert error(lowering, site) <= EXACT


def session(lowering: type[Lowering], site: LargeConv, kernel: np.ndarray, bias: np.ndarray | None):
    """Open the nodes of a rewrite, for any batch, on ONNX Runtime."""
    dtype = ir.DataType.FLOAT
    x = ir.val("x", dtype=dtype, shape=("n", site.channels, *site.map))
    write = Writer("here/Conv", Additions(ir.Graph([], [], nodes=[])))
    weight = write.constant("w", lowering.weight(site, kernel))
    b = None if bias is None else write.constant("b", lowering.bias(site, bias))
    y = lowering.nodes(site, write, x, weight, b)
    y.name, y.shape = "y", ir.Shape(("n", site.channels, *site.map))
    assert y.dtype == dtype
    assert all(str(node.name).startswith("here/Conv/") for node in write.nodes)
    assert len({node.name for node in write.nodes}) == len(write.nodes)
    graph = ir.Graph([x], [y], nodes=write.nodes, initializers=write.constants, opset_imports={"": 18}, name="g")
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def nodes_are_exact(lowering: type[Lowering], site: LargeConv, *, bias: bool) -> None:
    """Compare with integers, whose sums float32 holds, so that nothing is rounded and nothing forgiven."""
    rng = np.random.default_rng(0)
    kernel = rng.integers(-4, 5, (site.channels, 1, *site.kernel)).astype(np.float32)
    b = rng.integers(-9, 10, site.channels).astype(np.float32) if bias else None
    opened = session(lowering, site, kernel, b)
    for batch in (1, 3):
        x = rng.integers(-4, 5, (batch, site.channels, *site.map)).astype(np.float32)
        (got,) = opened.run(None, {"x": x})
        assert np.array_equal(got, direct(site, torch.from_numpy(x), kernel, b).numpy())


@every
@settings(deadline=None, max_examples=25, derandomize=True)
@given(site=SITES, bias=st.booleans())
def test_nodes_compute_the_convolution_for_any_batch(lowering: type[Lowering], site: LargeConv, bias: bool) -> None:  # noqa: FBT001
    nodes_are_exact(lowering, site, bias=bias)


@every
@pytest.mark.parametrize("site", EXAMPLES, ids=str)
def test_nodes_compute_it_on_odd_maps(lowering: type[Lowering], site: LargeConv) -> None:
    nodes_are_exact(lowering, site, bias=True)


def shifted(rows: int, columns: int):
    def centre(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return np.roll(base.centre(kernel, size), (rows, columns), axis=(1, 2))

    return centre


def transposed(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return base.centre(kernel.swapaxes(2, 3), size)


def flipped(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return base.centre(kernel[:, :, ::-1], size)


def next_channel(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return base.centre(np.roll(kernel, 1, axis=0), size)


BUGS = {
    "P + 1 in rows": shifted(1, 0),
    "P - 1 in rows": shifted(-1, 0),
    "P + 1 in columns": shifted(0, 1),
    "rows and columns swapped": transposed,
    "rows upside down": flipped,
    "a channel off": next_channel,
}


@every
@pytest.mark.parametrize("bug", BUGS)
def test_a_misplaced_tap_is_seen(lowering: type[Lowering], bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site = LargeConv(name="here", channels=3, kernel=(13, 13), map=(20, 18))
    assert error(lowering, site) <= EXACT
    for home in (grouped, dense, strip):
        monkeypatch.setattr(home, "centre", BUGS[bug])
    assert error(lowering, site) > 1e-2


@every
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("site", EXAMPLES, ids=str)
def test_weights_are_only_moved(lowering: type[Lowering], dtype: type, site: LargeConv) -> None:
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[np.dtype(dtype).itemsize]
    rng = np.random.default_rng(0)
    kernel = rng.integers(1, np.iinfo(bits).max, (site.channels, 1, *site.kernel), bits)  # NaN, denormals, -0 and all
    made = lowering.weight(site, kernel.view(dtype))
    assert made.dtype == dtype
    assert made.flags.c_contiguous
    assert made.shape == lowering.shape(site)
    assert lowering.elements(site) == made.size
    assert set(made.view(bits).ravel()) - {0} == set(crop(site, kernel).ravel())
    bias = kernel.view(dtype)[:, 0, 0, 0]
    assert set(lowering.bias(site, bias).view(bits).ravel()) == set(bias.view(bits))


@every
@pytest.mark.parametrize("site", EXAMPLES, ids=str)
def test_it_executes_what_it_says(lowering: type[Lowering], site: LargeConv) -> None:
    x, kernel, _ = drawn(site, bias=False, batch=1)
    made = module(lowering, site, kernel, None)
    with FlopCounterMode(display=False) as counted:
        made(x)
    assert counted.get_total_flops() == 2 * lowering.macs(site)


def test_macs_of_the_published_stages() -> None:
    """Multiply-adds an output, as counted by hand: direct 961, 841, 729, 169."""
    stages = [(31, 56), (29, 28), (27, 14), (13, 7), (31, 96)]
    sites = [LargeConv(name="s", channels=2, kernel=(k, k), map=(m, m)) for k, m in stages]
    outputs = [2 * m * m for _, m in stages]
    each = {name: [low.macs(s) / n for s, n in zip(sites, outputs, strict=True)] for name, low in LOWERINGS.items()}
    assert each["grouped"] == [1736, 812, 378, 91, 2976]
    assert each["dense"] == [3136, 784, 196, 49, 9216]
    assert each["strip"][4] == (16 + 30) * 31


@settings(deadline=None, max_examples=60, derandomize=True)
@given(site=SITES)
def test_cropping_takes_what_never_touches_the_map_and_no_more(site: LargeConv) -> None:
    x, kernel, _ = drawn(site, bias=False, batch=1)
    cut = crop(site, kernel)
    assert cut.shape == (site.channels, 1, *site.taps)
    got = functional.conv2d(x, torch.from_numpy(cut.copy()), padding=site.padding, groups=site.channels)
    assert float((got - direct(site, x, kernel, None)).norm() / got.norm()) <= EXACT
    ones = direct(site, torch.ones(1, site.channels, *site.map).double(), np.ones_like(kernel), None)
    kept = np.zeros_like(kernel)
    top, left = ((k - t) // 2 for k, t in zip(site.kernel, site.taps, strict=True))
    kept[:, :, top : top + site.taps[0], left : left + site.taps[1]] = 1
    for row, column in ((top, left), (top + site.taps[0] - 1, left + site.taps[1] - 1)):
        fewer = kept.copy()
        fewer[:, :, row, column] = 0
        assert not torch.equal(direct(site, torch.ones_like(ones), fewer, None), ones)


@every
def test_another_map_is_refused(lowering: type[Lowering]) -> None:
    x, kernel, bias = drawn(MANY_STRIPS, bias=True, batch=1)
    made = module(lowering, MANY_STRIPS, kernel, bias)
    for other in (x[:, :, :40], x[..., :4], x[:, :1], torch.cat([x, x], dim=2)):
        with pytest.raises(ReplkError, match="here is lowered for maps of 41x5"):
            made(other)


@every
def test_strided_input_is_read_right(lowering: type[Lowering]) -> None:
    x, kernel, bias = drawn(MANY_STRIPS, bias=True, batch=3)
    made = module(lowering, MANY_STRIPS, kernel, bias)
    wanted = made(x)
    views = [x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1)]
    for view in views:
        assert not view.is_contiguous()
        torch.testing.assert_close(made(view), wanted, rtol=EXACT, atol=EXACT)


@every
def test_a_module_exports_with_any_batch(lowering: type[Lowering]) -> None:
    x, kernel, bias = drawn(MANY_STRIPS, bias=True, batch=2)
    made = module(lowering, MANY_STRIPS, kernel, bias)
    program = torch.export.export(made, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=8)},)).module()
    more = drawn(MANY_STRIPS, bias=True, batch=5, seed=1)[0]
    torch.testing.assert_close(program(more), made(more), rtol=EXACT, atol=EXACT)


@every
def test_what_no_file_holds_is_refused(lowering: type[Lowering]) -> None:
    small = LargeConv(name="here", channels=512, kernel=(27, 27), map=(14, 14))
    assert lowering.refusal(small) is None
    vast = LargeConv(name="here", channels=2**22, kernel=(27, 27), map=(14, 14))
    assert lowering.refusal(vast) == f"its weight would have {lowering.elements(vast):.1e} elements"


def test_the_registry_is_keyed_by_name() -> None:
    assert {name: low.name for name, low in LOWERINGS.items()} == {n: n for n in LOWERINGS}
    assert list(LOWERINGS) == ["grouped", "dense", "strip"]
    assert (AUTO, NONE, *LOWERINGS) == FORMS, "commands take these"
