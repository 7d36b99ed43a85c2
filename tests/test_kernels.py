"""Our kernels without a GPU: they compile for every architecture, and all around them is right on a CPU."""

import contextlib
import copy
import functools
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from replk_deploy.errors import Exit, ReplkError, UnavailableError
from replk_deploy.fuse import fuse
from replk_deploy.kernels import LargeDepthwiseConv2d, large_depthwise_conv2d, matrix, nvrtc, op, tuning
from replk_deploy.kernels.launch import ACTIVATIONS, Band, Direct, Shape, Tile, candidates
from replk_deploy.kernels.layers import Maps
from replk_deploy.kernels.network import ChannelMajor
from replk_deploy.preprocess import IMAGENET, Preprocessing
from replk_deploy.proof import cast
from tests import networks, test_kernels_gpu
from tests.false_gpu import without

H100, SMALLEST = (132, 232448), 101376  # of 8.6, 8.9 and 12.0: bytes of shared memory a block
ARCHITECTURES = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
SHAPES = {  # one for each way in which a map is cut
    "whole": Shape(images=64, channels=2, height=14, width=14, kernel=27),
    "groups of rows": Shape(images=1, channels=2, height=15, width=21, kernel=7),
    "in columns": Shape(images=1, channels=2, height=40, width=200, kernel=13),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    nvrtc.compiled.cache_clear()
    yield
    nvrtc.compiled.cache_clear()


def families() -> Iterator[tuple[str, nvrtc.Constants]]:
    """Yield each source with constants for each way in which a map is cut, and for each type."""
    dtypes = itertools.cycle(("float16", "bfloat16"))
    for ahead, shape in enumerate(SHAPES.values()):
        tile = candidates(shape, "float16", multiprocessors=108, shared=SMALLEST)[0]
        assert isinstance(tile, Band)
        said = tile.constants(dtype=next(dtypes), activation=ACTIVATIONS[ahead], shared=SMALLEST)
        yield tile.name, (*said, ("AHEAD", ahead % 2))
    split = candidates(shape, "tf32", multiprocessors=108, shared=SMALLEST)[0]
    yield split.name, (*split.constants(dtype="tf32", activation="relu", shared=SMALLEST), ("AHEAD", 0))
    for dtype in ("float16", "bfloat16", "float32"):
        direct = Direct.of(SHAPES["groups of rows"], SMALLEST)
        yield "direct", (*direct.constants(dtype=dtype, activation="gelu", shared=SMALLEST), ("AHEAD", 0))
    for stride, width in ((1, 8), (2, 7)):
        said = (("K", 3), ("STRIDE", stride), ("H", 9), ("W", width), ("V", 8 // stride**2), ("BF16", 0), ("ACT", 1))
        yield "small", said


@pytest.mark.parametrize("capability", ARCHITECTURES, ids="{0[0]}.{0[1]}".format)
def test_every_source_compiles_for_every_architecture(capability: tuple[int, int]) -> None:
    for name, constants in families():
        assert nvrtc.compiled(name, constants, capability).code[:4] == b"\x7fELF", (name, constants)
    sources = {path.stem for path in Path(nvrtc.__file__).with_name("src").iterdir()}
    assert {name for name, _ in families()} == sources, "each source is compiled"


@functools.cache
def compiler_log(tile: Tile) -> str:
    """Return what the assembler says of a kernel for an H100."""
    import cuda.core as cuda

    constants = (*tile.constants(dtype="float16", activation="relu", shared=H100[1]), ("AHEAD", 1))
    said = io.StringIO()
    macros = [(key, str(value)) for key, value in constants]
    options = cuda.ProgramOptions(arch="sm_90", std="c++17", ptxas_options=["-v"], define_macro=macros)
    cuda.Program(nvrtc.source(tile.name), "c++", options).compile("cubin", logs=said)
    return said.getvalue()


@pytest.mark.parametrize(("images", "size", "kernel"), [(64, 56, 31), (1, 28, 29), (64, 14, 27)])
def test_no_register_spills_in_the_layers_of_replknet(images: int, size: int, kernel: int) -> None:
    shape = Shape(images=images, channels=128, height=size, width=size, kernel=kernel)
    log = compiler_log(candidates(shape, "float16", multiprocessors=H100[0], shared=H100[1])[0])
    assert "0 bytes spill stores, 0 bytes spill loads" in log, log


INTERFACE = re.compile(r'extern "C" __global__ void\s*(?:__launch_bounds__\([^)]*\))?\s*(\w+)\(([^)]*)\)')


def plain(text: str) -> list[str]:
    """Name the entries of a source, each taking addresses and 32-bit integers alone."""
    assert text.count("__global__") == len(INTERFACE.findall(text))
    for name, arguments in INTERFACE.findall(text):
        for argument in arguments.split(","):
            assert re.fullmatch(r"\s*(const )?\w+\* __restrict__ \w+|\s*int \w+", argument), f"{name}: {argument}"
    return [name for name, _ in INTERFACE.findall(text)]


@pytest.mark.parametrize("name", ["band", "direct", "small"])
def test_kernels_take_addresses_and_32_bit_integers(name: str) -> None:
    text = nvrtc.source(name)
    assert plain(text) == [name]
    for wrong in (text.replace("int images", "i64 images"), text.replace('extern "C" ', "")):
        with pytest.raises(AssertionError):
            plain(wrong)


def kept() -> list[Path]:
    return [path for path in (Path(os.environ["XDG_CACHE_HOME"]) / "replk").rglob("*") if path.is_file()]


def test_machine_code_is_kept_by_source_constants_architecture_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda.bindings.nvrtc as bindings

    name, constants = next(one for one in families() if one[0] == "small")
    text = nvrtc.source(name)

    def again(sources: str = text, said: nvrtc.Constants = constants, capability: tuple[int, int] = (9, 0)) -> bytes:
        nvrtc.compiled.cache_clear()
        monkeypatch.setattr(nvrtc, "source", lambda _: sources)
        return bytes(nvrtc.compiled(name, said, capability).code)

    first, calls = again(), []
    assert len(kept()) == 1
    with monkeypatch.context() as patch:
        patch.setattr(bindings, "nvrtcCompileProgram", lambda *_: calls.append("compiled"))
        assert again() == first
    assert (len(kept()), calls) == (1, [])
    assert again(sources=text.replace("ACT == 1", "ACT == 3")) != first
    assert again(said=(*constants[:-1], ("ACT", 0))) != first
    assert again(capability=(8, 0)) != first
    assert len(kept()) == 4
    _, major, minor = bindings.nvrtcVersion()
    monkeypatch.setattr(bindings, "nvrtcVersion", lambda: (bindings.nvrtcResult.NVRTC_SUCCESS, major, minor + 1))
    again()
    assert len(kept()) == 5


def test_a_broken_source_is_said_in_the_words_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "source", lambda _: 'extern "C" __global__ void small() { planted; }')
    with pytest.raises(UnavailableError, match=r"compile the kernel small for 9\.0.*\n.*\n.*planted") as caught:
        nvrtc.compiled("small", (("K", 3),), (9, 0))
    assert caught.value.code == Exit.UNAVAILABLE
    assert "\0" not in caught.value.problem
    assert kept() == []


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UnavailableError, match="XDG_CACHE_HOME"):
        nvrtc.compiled(*next(families()), (9, 0))


def test_a_gpu_that_is_too_old_is_refused() -> None:
    with pytest.raises(UnavailableError, match=r"compute capability 8\.0, and this GPU has 7\.5"):
        nvrtc.compiled("small", (), (7, 5))


@pytest.mark.parametrize(("missing", "package"), [("cuda", "cuda-bindings"), ("cuda.core", "cuda-core")])
def test_a_missing_package_is_one_sentence(missing: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc._cuda.cache_clear()
    without(monkeypatch, missing)
    with pytest.raises(UnavailableError) as caught:
        nvrtc.versions()
    assert str(caught.value) == f"{package} is not installed (pip install 'replk-deploy[native]')"
    assert caught.value.code == Exit.UNAVAILABLE


def test_products_without_triton_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "triton")
    with pytest.raises(UnavailableError, match=r"triton is not installed .*replk-deploy\[native\]"):
        matrix.programs()


def test_failures_of_nvidia_s_packages_and_of_memory_are_said_and_others_are_not() -> None:
    import cuda.core as cuda
    from cuda.core._utils.cuda_utils import CUDAError

    assert not issubclass(CUDAError, (RuntimeError, OSError)), "what it was once caught as"
    for failure in (CUDAError("CUDA_ERROR_INVALID_VALUE: planted"), torch.OutOfMemoryError("planted")):
        with pytest.raises(UnavailableError, match="planted") as caught, nvrtc.translated("convolve"):
            raise failure
        assert caught.value.code == Exit.UNAVAILABLE
        assert "convolve" in caught.value.problem
    with pytest.raises(UnavailableError, match="driver"), nvrtc.translated("ask the driver"):
        cuda.Device(99).set_current()
    with pytest.raises(ZeroDivisionError), nvrtc.translated("divide"):
        print(1 // 0)


def test_a_number_beyond_32_bits_never_reaches_a_kernel() -> None:
    with pytest.raises(ReplkError, match=r"2147483648 elements apart.*smaller batch"):
        nvrtc.start("direct", (), torch.empty(1), 2**31, grid=(1, 1, 1), threads=1)
    assert nvrtc._argument(2**31 - 1).value == 2**31 - 1
    for grid in ((1, 65536, 1), (1, 1, 65536)):
        with pytest.raises(ReplkError, match=r"needs 65536 blocks.*takes 65535.*smaller batch"):
            nvrtc.start("direct", (), torch.empty(1), 1, grid=grid, threads=1)


def values(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=source).to(dtype) for size in sizes]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_cpu_it_is_the_convolution(dtype: torch.dtype, activation: str) -> None:
    x, weight, bias = values((2, 3, 9, 12), (3, 1, 13, 13), (3,), dtype=dtype)
    whole = functional.conv2d(x.double(), weight.double(), bias.double(), padding=6, groups=3)
    got = large_depthwise_conv2d(x, weight, bias, activation)
    assert float((got - op.activated(whole, activation)).norm() / whole.norm()) < 2 * torch.finfo(dtype).eps
    wrong = op.activated(functional.conv2d(x.double(), weight.double(), padding=6, groups=3), activation)
    assert float((got - wrong).norm() / whole.norm()) > 0.01, "a bias that is left out shows"


def test_a_kernel_gets_filter_and_bias_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Tensor, Tensor | None]] = []
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(nvrtc, "limits", lambda: H100)
    monkeypatch.setattr(tuning, "fastest", lambda _work, ways, _start: ways[0])
    monkeypatch.setattr(nvrtc, "start", lambda _, _said, _x, w, b, *_rest, **_grid: started.append((w, b)))
    x, weight, bias = values(X, WEIGHT, BIAS)
    for shift in (torch.stack([bias, bias + 9], 1)[:, 0], bias[:1].expand(3)):
        op._on_gpu(x, weight.mT, shift, "none")
        filters, shifts = started.pop()
        assert torch.equal(filters, weight.mT)
        assert torch.equal(shifts, shift)
        assert filters.is_contiguous()
        assert shifts.is_contiguous()
    op._on_gpu(x, weight, None, "none")
    assert started.pop()[1] is None


SWITCHES = {  # of PyTorch, in a process of its own: once set, the newer ones cannot be unset
    "pass": True,
    "b.cudnn.allow_tf32 = False": False,
    "b.cudnn.allow_tf32 = False; b.cudnn.allow_tf32 = True": True,
    "b.fp32_precision = 'ieee'": False,
    "b.cudnn.fp32_precision = 'tf32'": True,
    "b.cudnn.conv.fp32_precision = 'ieee'": False,
    "b.cudnn.allow_tf32 = False; b.fp32_precision = 'tf32'": True,
}


def test_pytorch_s_word_on_tf32_is_understood_whichever_switch_said_it() -> None:
    program = f"""
import os, torch
from replk_deploy.kernels import op
b = torch.backends
for words, expected in {SWITCHES!r}.items():
    if not (child := os.fork()):
        exec(words)
        os._exit(op._may_be_tf32() != expected)
    assert not os.waitpid(child, 0)[1], words
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("how", test_kernels_gpu.HOW)
@pytest.mark.parametrize("dims", [(3, 4, 10, 12), (2, 1, 5, 1)])
def test_the_fake_kernel_knows_how_the_answer_lies(how: str, dims: tuple[int, int, int, int]) -> None:
    plain, weight, bias = values(dims, (dims[1], 1, 7, 7), dims[1:2], dtype=torch.float16)
    x = test_kernels_gpu.laid(plain, how)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.replk.large_depthwise_conv2d.default, (x, weight, bias, "relu"), test_utils=checks)
    assert op._readable(x).data_ptr() % 16 == 0
    assert torch.equal(op._readable(x), x)
    fake = torch.empty_like(op._laid_out(x))
    assert op._readable(x).stride() == fake.stride(), "read as the fake kernel promises"


def test_it_is_compiled_and_exported_whole() -> None:
    conv = nn.Conv2d(3, 3, 7, padding="same", groups=3)
    model = nn.Sequential(LargeDepthwiseConv2d.of(conv, "gelu"), nn.Conv2d(3, 2, 1)).eval()
    (x,) = values((4, 3, 9, 9))
    expected = model[1](functional.gelu(conv(x)))
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(batch,), strict=False)
    assert "replk.large_depthwise_conv2d" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x[:3]), expected[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast_it_takes_the_place_of_a_convolution(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(3, 3, 7, padding=3, groups=3)
    (x,) = values((2, 3, 9, 9), dtype=dtype)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(LargeDepthwiseConv2d.of(conv)(x), conv(x))


def test_no_image_and_no_row_give_none() -> None:
    x, weight, bias = values(X, WEIGHT, BIAS)
    for empty in (x[:0], x[:, :, :0], x[..., :0]):
        assert large_depthwise_conv2d(empty, weight, bias).shape == empty.shape


X, WEIGHT, BIAS = (2, 3, 9, 12), (3, 1, 13, 13), (3,)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((X, (3, 1, 12, 12), BIAS), "K odd and 7 to 31"),
        ((X, (3, 1, 33, 33), BIAS), "K odd and 7 to 31"),
        ((X, (3, 1, 5, 5), BIAS), "K odd and 7 to 31"),
        ((X, (3, 1, 13, 11), BIAS), r"\[3, 1, 13, 11\] for 3 channels"),
        ((X, (4, 1, 13, 13), BIAS), r"\[4, 1, 13, 13\] for 3 channels"),
        ((X, (3, 3, 13, 13), BIAS), "for 3 channels"),
        ((X, WEIGHT, (4,)), r"bias is \[4\]"),
        ((X[1:], WEIGHT, BIAS), "3 dimensions"),
    ],
)
def test_other_shapes_are_refused(sizes: tuple[tuple[int, ...], ...], words: str) -> None:
    with pytest.raises(ReplkError, match=words) as caught:
        large_depthwise_conv2d(*values(*sizes))
    assert caught.value.code == Exit.USAGE


def test_other_types_and_activations_are_refused() -> None:
    x, weight, bias = values(X, WEIGHT, BIAS)
    for wrong in ((x.double(), weight.double(), bias.double()), (x.half(), weight, bias), (x, weight, bias.half())):
        with pytest.raises(ReplkError, match=r"float64|float16 on cpu.*one of float16, bfloat16, float32"):
            large_depthwise_conv2d(*wrong)
    with pytest.raises(ReplkError, match="on meta"):
        large_depthwise_conv2d(x, weight.to("meta"), bias)
    with pytest.raises(ReplkError, match=r"no activation silu.*none, relu, gelu"):
        large_depthwise_conv2d(x, weight, bias, "silu")


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 7, padding=3),
        nn.Conv2d(4, 8, 7, padding=3, groups=4),
        nn.Conv2d(4, 4, 7, padding=3, groups=4, stride=2),
        nn.Conv2d(4, 4, 7, padding=2, groups=4),
        nn.Conv2d(4, 4, 7, padding=6, dilation=2, groups=4),
        nn.Conv2d(4, 4, (7, 9), padding=(3, 4), groups=4),
        nn.Conv2d(4, 4, 7, padding=3, groups=4, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 8, padding="same", groups=4),
    ],
    ids=str,
)
def test_a_convolution_that_it_cannot_replace_is_left(conv: nn.Conv2d) -> None:
    with pytest.raises(ReplkError, match="no depthwise convolution of stride 1"):
        LargeDepthwiseConv2d.of(conv)


@settings(max_examples=12, derandomize=True, database=None, deadline=None)
@given(
    images=st.integers(1, 70),
    height=st.integers(1, 130),
    width=st.integers(1, 300),
    kernel=st.sampled_from(op.SIZES),
    shared=st.sampled_from([49152, SMALLEST, 166912, H100[1]]),
    dtype=st.sampled_from(["float16", "float32", "tf32"]),
)
def test_a_tile_fits_the_gpu_and_its_grid_covers_the_maps(
    images: int, height: int, width: int, kernel: int, shared: int, dtype: str
) -> None:
    shape = Shape(images=images, channels=3, height=height, width=width, kernel=kernel)
    found = candidates(shape, dtype, multiprocessors=108, shared=shared)
    assert found
    for tile in (*found, Direct.of(shape, shared)):
        channels, groups, tiles = tile.grid
        assert tile.shared <= shared
        assert tile.threads <= 1024
        assert channels == 3
        assert groups * tile.images >= images > (groups - 1) * tile.images
        assert tiles == -(-height // tile.rows) * -(-width // tile.columns)
        assert tile.columns % 8 == 0


def test_less_shared_memory_means_a_smaller_tile() -> None:
    shape = Shape(images=8, channels=1, height=16, width=8, kernel=31)
    tiles = [Direct.of(shape, shared) for shared in (H100[1], 49152, 20000, 4900)]
    assert [tile.shared <= room for tile, room in zip(tiles, (H100[1], 49152, 20000, 4900), strict=True)] == [
        *(True, True, True, False)  # no tile is so small: the driver will say so
    ]
    assert [(tile.images, tile.rows) for tile in tiles] == [(8, 16), (6, 16), (2, 16), (1, 1)]


def test_the_cases_for_a_gpu_hold_every_pair_of_choices() -> None:
    cases = test_kernels_gpu.CASES
    columns = list(zip(*[(c.kernel, (c.height, c.width), *c[3:9]) for c in cases], strict=True))
    pairs = [
        set(itertools.product(*map(set, two))) - set(zip(*two, strict=True))
        for two in itertools.combinations(columns, 2)
    ]
    assert not any(pairs)


@settings(max_examples=50, derandomize=True, database=None, deadline=None)
@given(
    images=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_a_1x1_convolution_is_one_product_of_channel_major_maps(
    images: int, height: int, width: int, channels: tuple[int, int]
) -> None:
    x = Maps.empty(channels[0], images, height, width, torch.empty(0, dtype=torch.float64))
    x.data.fill_(torch.nan)
    x.view.copy_(torch.randn(images, channels[0], height, width, dtype=torch.float64))
    weight = torch.randn(*reversed(channels), dtype=torch.float64)
    y = x.like(channels[1])
    y.data.copy_(weight @ x.data)
    expected = functional.conv2d(x.view, weight[:, :, None, None])
    torch.testing.assert_close(y.view, expected)
    y.data.copy_(y.data.roll(1, 1))
    assert not torch.allclose(y.view, expected), "a column further is another pixel, or beyond the last"


@settings(max_examples=50, derandomize=True, database=None, deadline=None)
@given(
    rows=st.integers(1, 5000),
    depth=st.integers(1, 5000),
    columns=st.integers(1, 400_000),
    residual=st.booleans(),
    linked=st.booleans(),
    shared=st.sampled_from([SMALLEST, 166912, H100[1]]),
)
def test_there_is_a_cut_for_every_product_that_the_gpu_can_have(
    rows: int,
    depth: int,
    columns: int,
    residual: bool,  # noqa: FBT001
    linked: bool,  # noqa: FBT001
    shared: int,
) -> None:
    work = matrix.Work(rows, depth, columns, "none", residual, torch.float16)
    cuts = matrix._fitting(work, shared=shared, linked=linked)
    assert cuts
    for cut in cuts:
        assert cut.shared(residual=residual) <= shared
        assert not cut.each or (linked and depth % 8 == 0), "descriptors want Hopper, and rows aligned"


def test_the_products_are_right_in_triton_s_interpreter_and_planted_bugs_are_seen() -> None:
    command = [sys.executable, "-m", "tests.interpreted"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("right, and 7 bugs seen")


RULES = Preprocessing(size=(64, 64), mean=IMAGENET[0], std=IMAGENET[1], resize="crop", crop_pct=None, said_by="user")


@pytest.mark.parametrize("name", list(networks.GEOMETRIES))
def test_the_channel_major_network_is_the_fused_one(name: str) -> None:
    fused = cast(fuse(networks.trained(networks.GEOMETRIES[name], size=64)).model, torch.float64)
    images = torch.randn(2, 3, 70, 45, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    pixels = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, 70, 45, 3), dtype=np.uint8))
    normal = torch.from_numpy(RULES.normalise(pixels.numpy())).double()
    ours = ChannelMajor(copy.deepcopy(fused), RULES).eval()
    with torch.inference_mode():
        for got, expected in zip(ours(images), fused(images), strict=True):
            assert got.shape == expected.shape
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        for got, expected in zip(ours(pixels), fused(normal), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # mean and std are float32


@pytest.mark.parametrize("bug", ["residual", "activation", "a channel"])
def test_a_wrong_layer_shows_in_the_network(bug: str, trained) -> None:
    fused = cast(fuse(trained).model, torch.float64)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    ours = ChannelMajor(copy.deepcopy(fused), RULES).eval()
    block = ours.model.stages[0].blocks[0]
    if bug == "residual":
        block.pw2.conv.forward = lambda x, _add, forward=block.pw2.conv.forward: forward(x)
    elif bug == "activation":
        block.pw1.conv.activation = "gelu"
    else:
        block.large_kernel.lkb_reparam.weight = nn.Parameter(
            fused.stages[0].blocks[0].large_kernel.lkb_reparam.weight.roll(1, 0)
        )
    with torch.inference_mode():
        assert float((ours(images)[0] - fused(images)[0]).norm() / fused(images)[0].norm()) > 1e-6


class Timer:
    """A false GPU that takes as long for a way as it is told."""

    def __init__(self, patch: pytest.MonkeyPatch, path: Path) -> None:
        self.ms: dict[str, float] = {}
        self.timed: list[str] = []
        self.capturing = False
        patch.setattr(torch.cuda, "get_device_name", lambda: "False GPU")
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(tuning, "captured", lambda run: run)
        patch.setattr(tuning, "replayed_ms", self._ms)
        patch.setattr(tuning, "_path", lambda _gpu: path)
        self.forget(patch)

    @staticmethod
    def forget(patch: pytest.MonkeyPatch) -> None:
        """Let the next question come from another process."""
        patch.setattr(tuning, "_known", {})
        patch.setattr(tuning, "_decided", {})

    def _ms(self, run: Callable[[], object]) -> float:
        run()
        return self.ms[self.timed[-1]]


@pytest.fixture
def timer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Timer:
    return Timer(monkeypatch, tmp_path / "cache" / "false-gpu.json")


def test_the_fastest_way_is_measured_once_and_remembered(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    timer.ms = {"slow": 2.0, "fast": 1.0, "new": 0.5}
    for _ in range(2):
        assert tuning.fastest("work", ["slow", "fast"], timer.timed.append) == "fast"
    assert timer.timed == ["slow", "fast"] * tuning.ROUNDS
    timer.timed.clear()
    timer.forget(monkeypatch)
    assert tuning.fastest("work", ["slow", "fast"], timer.timed.append) == "fast"
    assert timer.timed == [], "another process knows"
    timer.forget(monkeypatch)
    assert tuning.fastest("work", ["slow", "new"], timer.timed.append) == "new"
    assert timer.timed, "a way that is no longer tried is measured again"
    assert tuning.fastest("other work", ["slow"], timer.timed.append) == "slow"


def test_in_a_capture_nothing_is_measured_and_nothing_decided(timer: Timer) -> None:
    timer.ms, timer.capturing = {"slow": 2.0, "fast": 1.0}, True
    assert tuning.fastest("work", ["slow", "fast"], timer.timed.append) == "slow"
    assert timer.timed == []
    timer.capturing = False
    assert tuning.fastest("work", ["slow", "fast"], timer.timed.append) == "fast"
    timer.capturing = True
    assert tuning.fastest("work", ["slow", "fast"], timer.timed.append) == "fast"


def test_answers_travel_with_a_file(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    timer.ms = {"slow": 2.0, "fast": 1.0}
    with tuning.asked() as outer, tuning.asked() as inner:
        tuning.fastest("work", ["slow", "fast"], timer.timed.append)
        tuning.fastest("work", ["slow", "fast"], timer.timed.append)
    tuning.fastest("unasked", ["slow", "fast"], timer.timed.append)
    assert outer == inner == {"work": "fast"}
    tuning._path("").unlink()
    timer.timed.clear()
    timer.forget(monkeypatch)
    tuning.know({"work": "slow"})
    assert tuning.fastest("work", ["slow", "fast"], timer.timed.append) == "slow"
    assert timer.timed == [], "what it was told, it does not measure"


def test_nobody_s_answers_are_lost(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    timer.ms = {"slow": 2.0, "fast": 1.0}
    tuning.fastest("mine", ["slow", "fast"], timer.timed.append)
    timer.forget(monkeypatch)
    tuning.know({"a file's": "fast", "mine": "slow"})
    timer.timed.clear()
    assert tuning.fastest("mine", ["slow", "fast"], timer.timed.append) == "fast"
    assert timer.timed == [], "what the cache holds is known beside what a file says"
    held = json.loads(tuning._path("").read_text(encoding="utf-8"))
    tuning._path("").write_text(json.dumps({**held, "another process's": "fast"}), encoding="utf-8")
    tuning.fastest("new", ["slow", "fast"], timer.timed.append)
    kept = json.loads(tuning._path("").read_text(encoding="utf-8"))
    assert kept == dict.fromkeys(("mine", "a file's", "another process's", "new"), "fast")


@pytest.mark.parametrize("damage", ["{", "[1]", '{"work": 7}', "\0"])
def test_damaged_answers_are_measured_again(damage: str, timer: Timer) -> None:
    timer.ms = {"slow": 2.0, "fast": 1.0}
    tuning._path("").parent.mkdir(parents=True, exist_ok=True)
    tuning._path("").write_text(damage, encoding="utf-8")
    assert tuning.fastest("work", ["slow", "fast"], timer.timed.append) == "fast"
    assert '"work": "fast"' in tuning._path("").read_text(encoding="utf-8")


def test_answers_that_cannot_be_written_are_given(
    timer: Timer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timer.ms = {"slow": 2.0, "fast": 1.0}
    (tmp_path / "file").touch()
    monkeypatch.setattr(tuning, "_path", lambda _gpu: tmp_path / "file" / "below.json")
    assert tuning.fastest("work", ["slow", "fast"], timer.timed.append) == "fast"
