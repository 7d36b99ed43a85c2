"""Our kernels on a GPU: every tile against float64 and against PyTorch's own kernel; streams, graphs, the network.

Run by `make test-gpu`, on a machine with a GPU; without one it fails. What needs two GPUs is skipped with one.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from replk_deploy import weights
from replk_deploy.backends import sidecar
from replk_deploy.backends.base import Recipe
from replk_deploy.backends.native import Native
from replk_deploy.batch import Batch
from replk_deploy.errors import Exit, UnavailableError
from replk_deploy.fuse import fuse
from replk_deploy.kernels import LargeDepthwiseConv2d, large_depthwise_conv2d, nvrtc, op, tuning
from replk_deploy.kernels.launch import ACTIVATIONS, Activation, Direct, Shape, Tile, candidates
from replk_deploy.models.replknet import VARIANTS, RepLKNet
from replk_deploy.poison import poison, randomise
from replk_deploy.precision import TOLERANCES
from replk_deploy.progress import silent
from replk_deploy.proof import cast
from tests import artefacts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # inside inductor
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # inside inductor
]

KERNELS = range(7, 32, 2)
MAPS = ((1, 1), (3, 3), (7, 7), (14, 14), (15, 15), (28, 28), (33, 9), (20, 50), (56, 56), (64, 256))
BATCHES, CHANNELS = (1, 3, 8), (1, 3, 8)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
LAYOUTS = ("nchw", "channel-major")
ROUNDS = 2  # cases of each kernel and map
# a twentieth of the last place; in fp32 two places; in tf32, which PyTorch computes as fp32, the last of 16 bits
TINY = {"float16": 5e-5, "bfloat16": 4e-4, "float32": 3e-7, "tf32": 1.5e-5}
GUARD = 64  # elements before and after what a kernel may touch


class Case(NamedTuple):
    """One convolution; `seed` chooses its tile among those that fit."""

    kernel: int
    height: int
    width: int
    images: int
    channels: int
    dtype: str
    activation: Activation
    bias: bool
    layout: str
    seed: int

    @property
    def shape(self) -> Shape:
        return Shape(
            images=self.images, channels=self.channels, height=self.height, width=self.width, kernel=self.kernel
        )


def cases() -> list[Case]:
    """Return each kernel with each map, all else drawn; the seed is fixed, and `test_kernels` counts the pairs."""
    draw = random.Random(0)  # noqa: S311  # no secret
    axes = (BATCHES, CHANNELS, tuple(DTYPES), ACTIVATIONS, (True, False), LAYOUTS)
    plain = itertools.product(KERNELS, MAPS, range(ROUNDS))
    return [Case(k, *size, *map(draw.choice, axes), seed=i) for i, (k, size, _) in enumerate(plain)]


CASES = cases()


@functools.cache
def tiles(case: Case) -> tuple[Tile, ...]:
    """Return the tile that is thought best, another one that fits, and the one of CUDA cores."""
    count, shared = nvrtc.limits()
    found = candidates(case.shape, case.dtype, multiprocessors=count, shared=shared, most=10**6)
    other = found[case.seed * 7919 % len(found)]
    return tuple(dict.fromkeys((found[0], other, Direct.of(case.shape, shared))))


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Compile what the cases need, on all processors."""
    shared, capability = nvrtc.limits()[1], torch.cuda.get_device_capability()
    wanted = {
        (t.name, (*t.constants(dtype=c.dtype, activation=c.activation, shared=shared), ("AHEAD", 0)))
        for c in CASES
        for t in tiles(c)
    }
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda one: nvrtc.compiled(*one, capability), wanted))


@pytest.fixture(autouse=True)
def _own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remember measured tiles for one test only; let PyTorch compute fp32 as fp32."""
    monkeypatch.setattr(tuning, "_path", lambda _gpu: tmp_path / "tuned.json")
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_decided", {})
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def first_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the first way without measuring."""
    monkeypatch.setattr(tuning, "_measured", lambda _runs: 0)


def room(layout: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return maps [N, C, H, W] full of NaN, and the memory around them, likewise."""
    n, c, h, w = shape
    if layout == "nchw":
        whole = torch.full((n * c * h * w + 2 * GUARD,), torch.nan, dtype=dtype, device="cuda")
        return whole[GUARD:-GUARD].view(shape), whole
    pitch = -(-n * h * w // 16) * 16 + GUARD
    whole = torch.full((c + 2, pitch), torch.nan, dtype=dtype, device="cuda")
    return whole[1:-1, : n * h * w].view(c, n, h, w).transpose(0, 1), whole


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def true(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution in float64."""
    wide = None if bias is None else bias.double()
    return functional.conv2d(x.double(), weight.double(), wide, padding=weight.shape[-1] // 2, groups=x.shape[1])


def computed(case: Case, tile: Tile, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run one tile; all that it reads lies between NaN, and what it writes was NaN and lies between NaN."""
    dims = (case.images, case.channels, case.height, case.width)
    inside, around = room(case.layout, dims, x.dtype)
    inside.copy_(x)
    filters, around_filters = room("nchw", tuple(weight.shape), x.dtype)
    filters.copy_(weight)
    y, around_y = room(case.layout, dims, x.dtype)
    before = [bits(t).clone() for t in (around, around_filters)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "fastest", lambda _work, _ways, _start: tile)
        op.convolve(inside, filters, bias, case.activation, y, ahead=False)
    torch.cuda.synchronize()
    assert all(torch.equal(bits(t), b) for t, b in zip((around, around_filters), before, strict=True)), "input changed"
    answer = y.clone()
    y.fill_(torch.nan)
    assert around_y.isnan().all(), "written outside the output"
    return answer


def off(got: Tensor, truth: Tensor, scale: Tensor) -> tuple[float, float]:
    """Return the error as a whole and of the worst value, relative to the convolution before its activation."""
    wrong = got.double() - truth
    return float(wrong.norm() / scale.norm()), float(wrong.abs().max() / scale.abs().max())


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_every_tile_is_as_near_to_float64_as_pytorch_s_own_kernel(case: Case) -> None:
    dtype, dims = DTYPES[case.dtype], (case.images, case.channels, case.height, case.width)
    source = torch.Generator("cuda").manual_seed(case.seed)
    size = (case.channels, 1, case.kernel, case.kernel)
    x, weight, bias = (torch.randn(s, generator=source, device="cuda").to(dtype) for s in (dims, size, size[:1]))
    shift = bias if case.bias else None
    scale = true(x, weight, shift)
    truth = op.activated(scale, case.activation)
    theirs = functional.conv2d(x, weight, shift, padding=case.kernel // 2, groups=case.channels)
    allowed = [1.1 * e + TINY[case.dtype] for e in off(op.activated(theirs, case.activation), truth, scale)]

    whole, filters, shifts = (
        torch.randint(-8, 9, s, generator=source, device="cuda").to(dtype) for s in (dims, size, size[:1])
    )
    ones = torch.zeros(dims, dtype=dtype, device="cuda")  # in the corners, at the edges, in the middle
    for index in range(case.images):
        row, column = index % 3 * (case.height - 1) // 2, (index // 3 + index) % 3 * (case.width - 1) // 2
        ones[index, :, row, column] = 1
    for tile in tiles(case):
        got = computed(case, tile, x, weight, shift)
        assert got.isfinite().all(), tile
        errors = off(got, truth, scale)
        assert all(e <= a for e, a in zip(errors, allowed, strict=True)), f"{errors} > {allowed}: {tile}"
        if case.activation == "gelu":
            continue
        for exact in (whole, ones):  # whole numbers: sums are exact, and so is the answer once rounded
            expected = op.activated(true(exact, filters, shifts if case.bias else None), case.activation).to(dtype)
            got = computed(case, tile, exact, filters, shifts if case.bias else None)
            assert torch.equal(got, expected), tile


def example(
    dims: tuple[int, int, int, int] = (3, 8, 20, 28), *, kernel: int = 13, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator("cuda").manual_seed(1)
    sizes = (dims, (dims[1], 1, kernel, kernel), dims[1:2])
    x, weight, bias = (torch.randn(size, generator=source, device="cuda").to(dtype) for size in sizes)
    return x, weight, bias


def near(got: Tensor, truth: Tensor) -> bool:
    return float((got.double() - truth).norm() / truth.norm()) < 1e-3


def test_a_tile_that_is_one_row_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    first_guess(monkeypatch)
    x, weight, bias = example()
    assert near(large_depthwise_conv2d(x, weight, bias), true(x, weight, bias))
    assert not near(large_depthwise_conv2d(x, weight.roll(1, 2), bias), true(x, weight, bias))


def laid(x: Tensor, how: str) -> Tensor:
    """Return the same values, elsewhere in memory."""
    n, c, h, w = x.shape
    if how == "contiguous":
        return x
    if how == "channel-major":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "misaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if how == "misaligned channel-major":
        return torch.cat([x.new_zeros(1), x.transpose(0, 1).flatten()])[1:].view(c, n, h, w).transpose(0, 1)
    if how == "channels last":
        return x.to(memory_format=torch.channels_last)
    if how == "some images":
        return torch.stack([x, x], 1).flatten(0, 1)[::2]
    if how == "some columns":
        return torch.cat([x, x], 3)[..., :w]
    return x[:1].expand_as(x)


HOW = (
    *("contiguous", "channel-major", "misaligned", "misaligned channel-major"),
    *("channels last", "some images", "some columns", "one image, expanded"),
)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dims", [(3, 8, 20, 28), (2, 3, 7, 7), (1, 2, 32, 64), (2, 1, 5, 1)])
@pytest.mark.parametrize("dtype", ["float16", "tf32"])
def test_any_memory_is_read_rightly_and_the_fake_kernel_knows_how_the_answer_lies(
    dtype: str, how: str, dims: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first_guess(monkeypatch)
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    plain, weight, bias = example(dims, dtype=DTYPES[dtype])
    x = laid(plain, how)
    got = large_depthwise_conv2d(x, weight, bias, "relu")
    assert near(got, true(x, weight, bias).relu())
    torch.library.opcheck(torch.ops.replk.large_depthwise_conv2d.default, (x, weight, bias, "relu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_filter_and_bias_lie_anywhere(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first_guess(monkeypatch)
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    x, weight, bias = example(dtype=DTYPES[dtype])
    for turned, shift in ((weight.mT, torch.stack([bias, bias + 99], 1)[:, 0]), (weight, bias[:1].expand(8))):
        expected = large_depthwise_conv2d(x, turned.contiguous(), shift.contiguous())
        assert off(expected, true(x, turned, shift), expected.double())[0] < 1e-2
        assert torch.equal(large_depthwise_conv2d(x, turned, shift), expected)


@pytest.mark.parametrize("planted", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_never_becomes_one(
    dtype: str, activation: Activation, planted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    x, weight, bias = example((2, 3, 40, 70), dtype=DTYPES[dtype])
    x[0, 1, 20, 40] = planted
    expected = op.activated(true(x, weight, bias), activation)
    count, shared = nvrtc.limits()
    shape = Shape(images=2, channels=3, height=40, width=70, kernel=13)
    for tile in (candidates(shape, dtype, multiprocessors=count, shared=shared)[0], Direct.of(shape, shared)):
        monkeypatch.setattr(tuning, "fastest", lambda _work, _ways, _start, tile=tile: tile)
        got = large_depthwise_conv2d(x, weight, bias, activation)
        assert got[expected.isnan()].isnan().all(), tile
        told = ~got.isnan()
        assert torch.allclose(got[told].double(), expected[told], rtol=2e-2, atol=2e-2), tile
        told[0, 1, 14:27, 32:56] = True  # the columns in eights that the filter touches
        assert told.all(), tile


def test_no_image_and_no_row_give_none() -> None:
    x, weight, bias = example()
    assert large_depthwise_conv2d(x[:0], weight, bias).shape == (0, *x.shape[1:])
    assert large_depthwise_conv2d(x[:, :, :0], weight, bias).shape == (3, 8, 0, 28)


def test_a_measured_choice_is_right_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = example()
    with tuning.asked() as answers:
        assert near(large_depthwise_conv2d(x, weight, bias), true(x, weight, bias))
    assert len(answers) == 1
    monkeypatch.setattr(tuning, "_measured", None)  # a second measurement would fail
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_decided", {})
    with tuning.asked() as again:
        assert near(large_depthwise_conv2d(x, weight, bias), true(x, weight, bias))
    assert again == answers


def test_two_streams_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    first_guess(monkeypatch)
    inputs = [example((8, 64, 28, 28), kernel=29), example((4, 32, 56, 56), kernel=31)]
    alone = [large_depthwise_conv2d(*one, "gelu") for one in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    answers: list[list[Tensor]] = [[] for _ in inputs]
    for _ in range(50):
        for stream, one, kept in zip(streams, inputs, answers, strict=True):
            with torch.cuda.stream(stream):
                kept.append(large_depthwise_conv2d(*one, "gelu"))
    torch.cuda.synchronize()
    for expected, kept in zip(alone, answers, strict=True):
        assert all(torch.equal(got, expected) for got in kept)


def test_a_filter_that_the_kernel_before_has_just_written_is_read_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may start while the one before it ends: what that one writes is no weight to fetch ahead."""
    first_guess(monkeypatch)
    maker, weight, _ = example((1, 512, 31, 31), kernel=31)
    x, _, bias = example((8, 512, 14, 14), kernel=31)

    def chained() -> Tensor:
        made = large_depthwise_conv2d(maker, weight) / 31
        made = large_depthwise_conv2d(made, weight)  # no kernel of anybody else lies between it and its reader
        return large_depthwise_conv2d(x, made.view(512, 1, 31, 31), bias)

    made = large_depthwise_conv2d(large_depthwise_conv2d(maker, weight) / 31, weight)
    torch.cuda.synchronize()
    expected = large_depthwise_conv2d(x, made.view(512, 1, 31, 31).clone(), bias)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        answers = [chained() for _ in range(10)]
    for _ in range(5):
        for answer in answers:
            answer.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(answer, expected) for answer in answers)
    assert all(torch.equal(chained(), expected) for _ in range(50))


def test_graphs_are_captured_again_and_replayed_with_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    first_guess(monkeypatch)
    x, weight, bias = example()
    expected = large_depthwise_conv2d(x, weight, bias, "relu")
    for _ in range(3):
        graph, held = torch.cuda.CUDAGraph(), torch.zeros_like(x)
        with torch.cuda.graph(graph):
            y = large_depthwise_conv2d(held, weight, bias, "relu")
        for image in (x, -x, x):
            held.copy_(image)
            y.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, expected) == (image is x)
            assert near(y, true(image, weight, bias).relu())


def test_a_thousand_answers_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first_guess(monkeypatch)
    x, weight, bias = example((8, 64, 14, 14), kernel=27)
    first = large_depthwise_conv2d(x, weight, bias)
    assert all(torch.equal(large_depthwise_conv2d(x, weight, bias), first) for _ in range(1000))


@pytest.mark.parametrize("index", range(max(1, torch.cuda.device_count())))
def test_it_runs_where_its_input_lies(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first_guess(monkeypatch)
    with torch.cuda.device(0):
        x, weight, bias = (t.to(f"cuda:{index}") for t in example())
        got = large_depthwise_conv2d(x, weight, bias)
        assert got.device == x.device
        assert torch.cuda.current_device() == 0
        assert near(got, true(x, weight, bias))


def test_too_little_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    first_guess(monkeypatch)
    _, weight, bias = example((1, 8, 56, 56))
    x = torch.zeros(2000, 8, 56, 56, dtype=torch.float16, device="cuda")
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**23) / whole)
    try:
        with pytest.raises(UnavailableError, match="too little memory to convolve") as caught:
            large_depthwise_conv2d(x, weight, bias)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert caught.value.code == Exit.UNAVAILABLE
    assert "\n" not in str(caught.value)
    assert large_depthwise_conv2d(x, weight, bias).shape == x.shape  # and nothing is broken


def test_what_cannot_start_is_one_sentence() -> None:
    x, weight, bias = example()
    tile = Direct.of(Shape(images=3, channels=8, height=20, width=28, kernel=13), 99 * 1024)
    constants = (*tile.constants(dtype="float16", activation="none", shared=0), ("AHEAD", 0))
    start = functools.partial(nvrtc.start, "direct", constants, x, weight, bias, x, 3, 1, 1, 1, 1)
    with pytest.raises(UnavailableError, match="could not start the kernel direct") as caught:
        start(grid=(1, 1, 1), threads=2048)  # more than a block can have
    assert caught.value.code == Exit.UNAVAILABLE
    assert "\n" not in str(caught.value)
    with pytest.raises(UnavailableError, match="bytes of shared memory"):
        start(grid=(1, 1, 1), threads=32, shared=2**20)


@pytest.mark.filterwarnings("default")  # inductor has its own
def test_a_module_takes_the_place_of_a_convolution_under_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    first_guess(monkeypatch)

    def network() -> nn.Sequential:
        torch.manual_seed(3)
        layers = (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 31, padding=15, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        return nn.Sequential(*layers).cuda().half().eval()

    theirs, ours = network(), network()
    ours[1], ours[2] = LargeDepthwiseConv2d.of(ours[1], "relu"), nn.Identity()
    images = torch.randn(2, 3, 56, 56, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        truth = theirs.double()(images.double())
        assert near(ours(images), truth)
        assert near(torch.compile(ours, fullgraph=True)(images), truth)


SIZE, COUNT = 96, 24


@pytest.fixture(scope="module")
def large() -> RepLKNet:
    """Return a folded RepLKNet-31B in float64 on the GPU, whose norms have lived."""
    lived = poison(randomise(RepLKNet.build(VARIANTS["RepLKNet-31B"], "training")).cuda(), size=SIZE)
    folded = fuse(lived.cpu()).model
    assert isinstance(folded, RepLKNet)
    return folded.cuda()


@pytest.fixture
def file(large: RepLKNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return it as a file of native in float16, whose kernels nobody has measured: that takes a minute."""
    first_guess(monkeypatch)
    source, path = tmp_path / "m.safetensors", tmp_path / "m.native"
    small = artefacts.describe("fp16")
    said = dataclasses.replace(
        small,
        geometry=large.describe(),
        label=large.geometry.label,
        preprocessing=dataclasses.replace(small.preprocessing, size=(SIZE, SIZE)),
    )
    weights.write(source, cast(large, torch.float16), said)
    made = Native.build(source, path, Recipe(batches=(Batch(min=1, opt=COUNT, max=COUNT),)), silent)
    engine = artefacts.describe_engine(Native, path, source, made, "fp16")
    sidecar.write(path, artefacts.sealed(dataclasses.replace(engine, metadata=said.to_strings())))
    return path


def errors(got: np.ndarray, truth: Tensor) -> np.ndarray:
    """Return the relative L2 error of each image."""
    whole = truth.cpu().numpy()
    return np.linalg.norm(got - whole, axis=1) / np.linalg.norm(whole, axis=1)


def test_the_whole_network_is_as_near_to_float64_as_pytorch_is(large: RepLKNet, file: Path) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
    images = artefacts.describe("fp16").preprocessing.normalise(pixels)
    twin = cast(large, torch.float16)
    with torch.inference_mode():
        there = torch.from_numpy(images).cuda()
        (truth,) = large(there.double())
        theirs = errors(twin(there.half())[0].double().cpu().numpy(), truth)
    with Native(file) as network:
        answers = {"floats": network(images)["logits"], "pixels": network(pixels)["logits"]}
        kept = answers["pixels"].copy()
        assert not np.array_equal(network(pixels[::-1].copy())["logits"], kept)
        assert np.array_equal(answers["pixels"], kept), "an answer is the caller's to keep"
        held = list(network._captured.values())
        assert all(t.is_pinned() for one in held for t in (one._in, *one._out))
        launch = network.prepare(images)
        launch.enqueue()
        launch.wait()
        answers["timed"] = launch.answers()[0]
        single = np.concatenate([network(images[n : n + 1])["logits"] for n in range(3)])
    for how, got in answers.items():
        ratios = errors(got, truth) / theirs
        assert ratios.max() < 3, how
        assert np.median(ratios) < 1.3, how
    assert (errors(single, truth[:3]) < 3 * theirs[:3]).all()
    assert np.median(theirs) < TOLERANCES["fp16"].limit, "else nothing was shown"


def test_a_picture_that_is_no_number_gets_no_logits(file: Path) -> None:
    images = np.random.default_rng(5).standard_normal((2, 3, SIZE, SIZE), dtype=np.float32)
    with Native(file) as network:
        whole = network(images)["logits"].copy()
        images[1, 0, 50, 50] = np.nan
        assert np.isnan(network(images)["logits"][1]).all()
        np.testing.assert_array_equal(network(images)["logits"][0], whole[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_network_stays_on_the_gpu_it_was_opened_on_whichever_thread_asks(file: Path) -> None:
    images = np.random.default_rng(5).standard_normal((3, 3, SIZE, SIZE), dtype=np.float32)

    def asked() -> list[np.ndarray]:
        assert torch.cuda.current_device() == 0
        launch = there.prepare(images[:2])
        launch.enqueue()
        launch.wait()
        assert len(there.layer_times(images[:1], repeats=2)) > 24
        assert torch.cuda.current_device() == 0
        return [there(images)["logits"], launch.answers()[0]]

    with Native(file) as here, torch.cuda.device(1), Native(file) as there:
        with ThreadPoolExecutor(1) as pool:
            batch, launched = pool.submit(asked).result()
        with torch.cuda.device(0):
            expected = here(images)["logits"]
        for got, wanted in ((batch, expected), (launched, expected[:2])):
            assert np.linalg.norm(got - wanted) < 1e-2 * np.linalg.norm(wanted)


def test_a_network_too_large_for_the_memory_is_one_sentence(file: Path) -> None:
    with Native(file) as network:
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / whole)
        try:
            with pytest.raises(UnavailableError, match="too little memory") as caught:
                network(np.zeros((COUNT * 8, 3, SIZE, SIZE), np.float32))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert caught.value.code == Exit.UNAVAILABLE
        assert "\n" not in str(caught.value)
