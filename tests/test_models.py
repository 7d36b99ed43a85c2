"""The algebra of re-parameterisation in float64, and RepLKNet against a reference that shares no code with it."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import replk_deploy.models
from replk_deploy.models import reparam
from replk_deploy.models.replknet import VARIANTS, LargeKernel, RepLKNet
from tests import networks

EXACT = 1e-13  # relative L2, float64; measured 1e-16 for single folds, 1e-15 for networks
FEW = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
sides = st.integers(1, 13)
epsilons = st.sampled_from([1e-8, 1e-5, 1e-3, 0.1])
strides = st.sampled_from([1, 2])


def off(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float(((got - wanted).norm() / wanted.norm()).detach())


def live(norm: nn.BatchNorm2d, rng: torch.Generator) -> nn.BatchNorm2d:
    """Give a norm statistics far from those of a fresh one: both signs of gamma, variances from tiny to large."""
    count = norm.num_features
    signs = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0).double()
    norm.running_mean = torch.randn(count, generator=rng).double()
    norm.running_var = 10 ** (4 * torch.rand(count, generator=rng).double() - 3)
    norm.weight.data = signs * (0.5 + torch.rand(count, generator=rng).double())
    norm.bias.data = torch.randn(count, generator=rng).double()
    return norm.eval()


def noise(*shape: int, rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng).double()


def branch(channels: int, kernel: int, rng: torch.Generator) -> reparam.Kernel:
    return reparam.Kernel(noise(channels, 1, kernel, kernel, rng=rng), noise(channels, rng=rng))


def depthwise(x: Tensor, kernel: reparam.Kernel, stride: int = 1) -> Tensor:
    weight, bias = kernel
    return functional.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=len(weight))


def large_kernel(channels: int, kernel: int, small: int | None, rng: torch.Generator) -> LargeKernel:
    block = LargeKernel(channels, kernel, small).double().eval().requires_grad_(requires_grad=False)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            live(module, rng)
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(generator=rng)
    return block


@FEW
@given(
    seed=seeds,
    kernel=st.sampled_from([1, 3, 5, 7]),
    stride=strides,
    depth=st.booleans(),
    bias=st.booleans(),
    eps=epsilons,
    batch=st.integers(1, 3),
    height=sides,
    width=sides,
)
def test_a_norm_folds_into_the_convolution_before_it(seed, kernel, stride, depth, bias, eps, batch, height, width):
    rng = torch.Generator().manual_seed(seed)
    c_in, c_out, groups = (4, 4, 4) if depth else (3, 5, 1)
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=bias).double()
    conv.weight.data.normal_(generator=rng)
    norm = live(nn.BatchNorm2d(c_out, eps=eps).double(), rng)
    x = noise(batch, c_in, height, width, rng=rng)
    weight, shift = reparam.fold_after(reparam.kernel_of(conv), norm)
    got = functional.conv2d(x, weight, shift, stride, kernel // 2, groups=groups)
    assert off(got, norm(conv(x))) < EXACT


@FEW
@given(seed=seeds, bias=st.booleans(), eps=epsilons, batch=st.integers(1, 3), height=sides, width=sides, stride=strides)
def test_a_norm_folds_into_the_1x1_convolution_or_linear_layer_behind_it(seed, bias, eps, batch, height, width, stride):
    rng = torch.Generator().manual_seed(seed)
    norm = live(nn.BatchNorm2d(4, eps=eps).double(), rng)
    conv, head = nn.Conv2d(4, 7, 1, stride, bias=bias).double(), nn.Linear(4, 3, bias=bias).double()
    x = 3 * noise(batch, 4, height, width, rng=rng) + 1
    weight, shift = reparam.fold_before(norm, reparam.kernel_of(conv))
    assert off(functional.conv2d(x, weight, shift, stride), conv(norm(x))) < EXACT
    weight, shift = reparam.fold_before(norm, reparam.kernel_of(head))
    pooled = functional.linear(x.mean((2, 3)), weight, shift)
    assert off(pooled, head(norm(x).mean((2, 3)))) < EXACT


@FEW
@given(
    seed=seeds,
    kernel=st.integers(1, 15).map(lambda n: 2 * n + 1),
    half=st.integers(0, 3),
    stride=strides,
    batch=st.integers(1, 2),
    height=sides,
    width=sides,
)
def test_a_small_kernel_lies_in_a_large_one_on_any_map(seed, kernel, half, stride, batch, height, width):
    rng = torch.Generator().manual_seed(seed)
    small_size = min(2 * half + 1, kernel)
    large, small = branch(3, kernel, rng), branch(3, small_size, rng)
    x = noise(batch, 3, height, width, rng=rng)
    got = depthwise(x, reparam.add_branches(large, small), stride)
    assert off(got, depthwise(x, large, stride) + depthwise(x, small, stride)) < EXACT


@FEW
@given(
    seed=seeds,
    kernel=st.sampled_from([7, 13, 29, 31]),
    small=st.sampled_from([None, 1, 3, 5, 7]),
    size=st.one_of(st.tuples(sides, sides), st.sampled_from([(1, 1), (7, 7), (14, 31), (33, 17)])),
)
def test_a_large_kernel_block_merges_on_maps_smaller_and_larger_than_it(seed, kernel, small, size):
    rng = torch.Generator().manual_seed(seed)
    block = large_kernel(3, kernel, small, rng)
    before = {name: t.clone() for name, t in block.state_dict().items()}
    merged, x = block.merged(), noise(2, 3, *size, rng=rng)
    assert off(merged(x), block(x)) < EXACT
    assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())
    assert {p.dtype for p in merged.parameters()} == {torch.float64}


@pytest.mark.parametrize(("kernel", "small"), [(31, 5), (13, 5), (7, 3), (5, 5), (27, None)])
def test_an_impulse_reads_the_merged_kernel_back_tap_by_tap(kernel: int, small: int | None) -> None:
    block = large_kernel(4, kernel, small, torch.Generator().manual_seed(kernel))
    side, half = 2 * kernel - 1, kernel // 2
    impulse = torch.zeros(1, 4, side, side, dtype=torch.float64)
    impulse[..., kernel - 1, kernel - 1] = 1
    window = slice(kernel - 1 - half, kernel + half)
    response = (block(impulse) - block(torch.zeros_like(impulse)))[0, :, window, window].flip(1, 2)
    merged = block.merged()
    assert off(merged.weight[:, 0], response) < EXACT
    assert off(merged.bias, block(torch.zeros_like(impulse))[0, :, kernel - 1, kernel - 1]) < EXACT
    assert not torch.equal(response, response.flip(2)), "a symmetric kernel would hide a mirrored one"


@pytest.mark.parametrize(("small", "large"), [(2, 5), (4, 31), (5, 6), (7, 5), (3, 1)])
def test_kernels_without_a_common_centre_are_refused(small: int, large: int) -> None:
    with pytest.raises(ValueError, match=f"a {small} kernel has no centre in a {large} kernel"):
        reparam.embed_kernel(torch.ones(2, 1, small, small), large)


@pytest.mark.parametrize("channels", [4, 9])  # nine channels and nine taps flatten to the same length
@pytest.mark.parametrize("kind", ["dense", "depthwise"])
def test_a_norm_before_a_padded_3x3_is_refused(channels: int, kind: str) -> None:
    norm = live(nn.BatchNorm2d(channels).double(), torch.Generator())
    conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels if kind == "depthwise" else 1).double()
    with pytest.raises(ValueError, match="only a 1x1 map takes a norm before it"):
        reparam.fold_before(norm, reparam.kernel_of(conv))


def test_a_norm_before_a_grouped_1x1_or_one_of_another_width_is_refused() -> None:
    norm = live(nn.BatchNorm2d(4).double(), torch.Generator())
    for conv in (nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(8, 4, 1)):
        with pytest.raises(ValueError, match="only a 1x1 map"):
            reparam.fold_before(norm, reparam.kernel_of(conv))


def test_a_lone_norm_is_a_depthwise_1x1_convolution() -> None:
    rng = torch.Generator().manual_seed(3)
    norm, x = live(nn.BatchNorm2d(5).double(), rng), noise(2, 5, 3, 4, rng=rng)
    assert off(depthwise(x, reparam.affine_conv(norm)), norm(x)) < EXACT


def test_a_norm_without_running_statistics_is_refused() -> None:
    with pytest.raises(TypeError, match="without running statistics"):
        reparam.bn_affine(nn.BatchNorm2d(3, track_running_stats=False))


def test_float32_weights_are_folded_in_float64_and_left_alone() -> None:
    conv, norm = nn.Conv2d(2, 3, 3, bias=False), live(nn.BatchNorm2d(3), torch.Generator().manual_seed(0)).float()
    before = [t.clone() for t in (*conv.state_dict().values(), *norm.state_dict().values())]
    kernel = reparam.fold_after(reparam.kernel_of(conv), norm)
    assert (kernel.weight.dtype, kernel.bias.dtype) == (torch.float64, torch.float64)
    exact = norm.double().weight / torch.sqrt(norm.running_var + norm.eps)
    assert off(kernel.weight, (conv.weight.double() * exact.reshape(-1, 1, 1, 1))) < EXACT
    after = [*conv.state_dict().values(), *norm.float().state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def reference(weights: dict[str, Tensor], images: Tensor, *, twist: str = "") -> list[Tensor]:
    """Compute RepLKNet from a training-form state dict alone; `twist` makes one named mistake.

    Every fact is read from keys and shapes: "same" padding, groups = inputs / second axis of the weight,
    strides 2 1 1 2 in the stem and 1 2 in a transition, eps 1e-5 everywhere.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, gamma, beta = (weights[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, mean, var, gamma, beta, False, 0.0, 1e-3 if twist == "eps" else 1e-5)

    def conv_bn(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.conv.weight"]
        pad = 0 if twist == "no padding in 3x3" and weight.shape[-1] == 3 else weight.shape[-1] // 2
        groups = x.shape[1] // weight.shape[1]
        return norm(functional.conv2d(x, weight, None, stride, pad, 1, groups), f"{name}.bn")

    def nonlinear(x: Tensor, kind: str) -> Tensor:
        if twist == "relu and gelu swapped":
            kind = {"relu": "gelu", "gelu": "relu"}[kind]
        if kind == "relu":
            return functional.relu(x)
        return functional.gelu(x, approximate="tanh" if twist == "tanh gelu" else "none")

    def replk(x: Tensor, name: str) -> Tensor:
        y = nonlinear(conv_bn(norm(x, f"{name}.prelkb_bn"), f"{name}.pw1"), "relu")
        z = conv_bn(y, f"{name}.large_kernel.lkb_origin")
        if f"{name}.large_kernel.small_conv.conv.weight" in weights and twist != "no small kernel":
            z = z + conv_bn(y, f"{name}.large_kernel.small_conv")
        if twist != "no relu behind the large kernel":
            z = nonlinear(z, "relu")
        z = conv_bn(z, f"{name}.pw2")
        if twist == "relu behind the block":
            z = functional.relu(z)
        return z if twist == "no shortcut" else x + z

    def ffn(x: Tensor, name: str) -> Tensor:
        y = conv_bn(norm(x, f"{name}.preffn_bn"), f"{name}.pw1")
        return x + conv_bn(nonlinear(y, "gelu"), f"{name}.pw2")

    x, outs = images, []
    for index, stride in enumerate((2, 1, 1, 2)):
        x = nonlinear(conv_bn(x, f"stem.{index}", stride), "relu")
    for stage in range(1 + max(int(m[1]) for k in weights if (m := re.match(r"stages\.(\d+)", k)))):
        blocks = 1 + max(int(m[1]) for k in weights if (m := re.match(rf"stages\.{stage}\.blocks\.(\d+)", k)))
        for block in range(blocks):
            x = (ffn if block % 2 else replk)(x, f"stages.{stage}.blocks.{block}")
        if f"stages.{stage}.norm.weight" in weights:
            outs.append(norm(x, f"stages.{stage}.norm"))
            if twist == "transition reads the normed map":
                x = outs[-1]
        if f"transitions.{stage}.0.conv.weight" in weights:
            x = nonlinear(conv_bn(x, f"transitions.{stage}.0"), "relu")
            x = nonlinear(conv_bn(x, f"transitions.{stage}.1", 2), "relu")
    if "head.weight" not in weights:
        return outs
    x = x if twist == "no last norm" else norm(x, "norm")
    pooled = x.amax((2, 3)) if twist == "max for mean" else x.mean((2, 3))
    return [functional.linear(pooled, weights["head.weight"], weights["head.bias"])]


def lived(name: str) -> RepLKNet:
    return networks.trained(networks.GEOMETRIES[name], seed=1).double()


@pytest.mark.parametrize("size", [(64, 64), (97, 75), (33, 130)])
@pytest.mark.parametrize("name", networks.GEOMETRIES)
def test_forward_equals_an_independent_reference(name: str, size: tuple[int, int]) -> None:
    model, images = lived(name), noise(2, 3, *size, rng=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        got, wanted = model(images), reference(model.state_dict(), images)
    assert len(got) == len(wanted) == len(model.geometry.outputs)
    for ours, theirs in zip(got, wanted, strict=True):
        assert off(ours, theirs) < EXACT
        assert off(ours[:1], ours[1:]) > 1e-2, "images must matter, or nothing was compared"


@pytest.mark.parametrize(
    ("name", "twist"),
    [
        ("small", "relu and gelu swapped"),
        ("small", "tanh gelu"),
        ("small", "no shortcut"),
        ("small", "no small kernel"),
        ("small", "no relu behind the large kernel"),
        ("small", "relu behind the block"),
        ("small", "eps"),
        ("small", "no last norm"),
        ("small", "max for mean"),
        ("backbone", "transition reads the normed map"),
        ("like XL", "no shortcut"),
    ],
)
def test_the_comparison_with_the_reference_sees_a_mistake(name: str, twist: str) -> None:
    model, images = lived(name), noise(1, 3, 64, 96, rng=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        got, wanted = model(images), reference(model.state_dict(), images, twist=twist)
    assert max(off(*pair) for pair in zip(got, wanted, strict=True)) > 1e-6


@pytest.mark.parametrize("name", networks.GEOMETRIES)
def test_the_named_blocks_and_the_head_in_a_chain_are_the_network(name: str) -> None:
    model, images = lived(name), noise(2, 3, 64, 40, rng=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        x = images
        for block in model.blocks():
            x = model.get_submodule(block)(x)
        assert torch.equal(model.head_of(x), model(images)[-1])


@pytest.mark.parametrize("geometry", [*networks.GEOMETRIES.values(), *VARIANTS.values()], ids=lambda g: g.label)
def test_geometry_survives_its_description_and_is_read_from_shapes(geometry) -> None:
    for form in ("training", "merged", "folded"):
        model = RepLKNet.empty(geometry, form)
        assert RepLKNet.parse(model.describe()) == geometry
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        inferred, found = RepLKNet.infer(shapes)
        assert found == form
        small = geometry.small if form == "training" else None  # once merged, nothing tells that it was there
        assert inferred == dataclasses.replace(geometry, small=small)
        assert RepLKNet.empty(inferred, form).state_dict().keys() == shapes.keys()


@pytest.mark.parametrize(
    ("name", "training", "merged", "folded", "tensors"),
    [
        ("RepLKNet-31B", 79_864_168, 79_527_272, 79_388_776, (1171, 931, 262)),
        ("RepLKNet-31L", 172_671_016, 172_165_672, 171_957_928, (1171, 931, 262)),
        ("RepLKNet-XL", 335_435_752, 335_399_656, 335_110_632, (1027, 931, 262)),
    ],
)
def test_the_published_variants_have_the_published_sizes(name, training, merged, folded, tensors) -> None:
    made = [RepLKNet.empty(VARIANTS[name], form) for form in ("training", "merged", "folded")]
    assert [sum(p.numel() for p in m.parameters()) for m in made] == [training, merged, folded]
    assert tuple(len(m.state_dict()) for m in made) == tensors


def test_nothing_in_the_environment_changes_a_network(monkeypatch: pytest.MonkeyPatch, in_empty_folder: Path) -> None:
    images = noise(1, 3, 64, 64, rng=torch.Generator().manual_seed(5)).float()
    keys = list(RepLKNet.empty(networks.SMALL, "training").state_dict())
    before = networks.trained()(images)[0]
    for name in ("LARGE_KERNEL_CONV_IMPL", "REPLK_PRECISION", "REPLK_FORM"):
        monkeypatch.setenv(name, str(in_empty_folder))
    assert torch.equal(networks.trained()(images)[0], before)
    assert list(RepLKNet.empty(networks.SMALL, "training").state_dict()) == keys
    for path in Path(replk_deploy.models.__file__).parent.glob("*.py"):
        assert not re.search(r"\benviron\b|\bgetenv\b|sys\.path", path.read_text(encoding="utf-8")), path.name


def test_building_a_network_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("training", "merged", "folded"):
        RepLKNet.build(networks.LIKE_XL, form)
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("", "")
