"""What a network costs, against published figures and against counting one tap at a time."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from replk_deploy.checkpoint import Loaded, load
from replk_deploy.errors import Exit, ReplkError
from replk_deploy.fuse import fuse
from replk_deploy.inspect import Inspection, inspect, taps_inside
from replk_deploy.models.replknet import VARIANTS, RepLKGeometry, RepLKNet
from replk_deploy.preprocess import from_args
from replk_deploy.records import plain
from tests import networks


def opened(model) -> Loaded:
    """Return a network as if it came from a file."""
    return Loaded(
        model=model,
        path=Path("x.pth"),
        file="x.pth",
        sha256="0" * 64,
        family="replknet",
        label=model.geometry.label,
        form=model.form,
        wrapper="bare",
        layout="reference",
        ignored=(),
        selected="",
        warnings=(),
        preprocessing=from_args(None, model.geometry.label),
    )


def seen(name: str, form: str = "training", *, size: int | None = None) -> Inspection:
    model = RepLKNet.empty(VARIANTS[name], form)
    return inspect(opened(model), size=(size, size) if size else None)


def giga(count: int) -> float:
    return round(count / 1e9, 3)


@pytest.mark.parametrize(
    ("name", "size", "fused", "training", "large", "inside"),
    [
        ("RepLKNet-31B", 224, 15.354, 15.431, 2.443, 1.117),
        ("RepLKNet-31B", 384, 45.119, 45.347, 7.179, 4.660),
        ("RepLKNet-31L", 384, 95.989, 96.332, 10.769, 6.989),
        ("RepLKNet-XL", 320, 128.730, 128.730, 13.541, 7.834),
    ],
)
def test_published_networks_cost_what_the_paper_says(name, size, fused, training, large, inside) -> None:
    found = seen(name, size=size)
    assert (giga(found.fused_macs), giga(found.macs)) == (fused, training)
    assert giga(sum(layer.macs for layer in found.large)) == large
    assert giga(sum(layer.inside_macs for layer in found.large)) == inside
    merged = seen(name, "merged", size=size)
    assert giga(merged.macs) == giga(merged.fused_macs) == fused
    assert found.inside_macs < found.macs


@pytest.mark.parametrize(
    ("name", "size", "table", "share_of_all"),
    [
        (
            "RepLKNet-31B",
            224,
            [
                (128, 56, 31, 385.8, 74.3),
                (256, 28, 29, 168.8, 55.0),
                (512, 14, 27, 73.2, 26.9),
                (1024, 7, 13, 8.5, 29.0),
            ],
            45.7,
        ),
        (
            "RepLKNet-31L",
            384,
            [
                (192, 96, 31, 1700.5, 84.5),
                (384, 48, 29, 744.1, 72.1),
                (768, 24, 27, 322.5, 51.7),
                (1536, 12, 13, 37.4, 53.4),
            ],
            64.9,
        ),
        (
            "RepLKNet-XL",
            320,
            [
                (384, 80, 27, 1791.6, 83.9),
                (768, 40, 27, 895.8, 69.1),
                (1536, 20, 27, 447.9, 44.0),
                (3072, 10, 13, 51.9, 45.8),
            ],
            57.9,
        ),
    ],
)
def test_every_large_kernel_costs_what_was_derived_by_hand(name, size, table, share_of_all) -> None:
    large = seen(name, size=size).large
    assert len(large) == 24
    rows = [
        (x.channels, x.map[0], x.kernel, round(x.macs / 1e6, 1), round(100 * x.inside_macs / x.macs, 1)) for x in large
    ]
    depths = (2, 2, 18, 2)
    assert rows == [row for row, depth in zip(table, depths, strict=True) for _ in range(depth)]
    assert all(x.map == (x.map[0], x.map[0]) for x in large)
    total = sum(x.inside_macs for x in large) / sum(x.macs for x in large)
    assert round(100 * total, 1) == share_of_all
    assert large[0].name == "stages.0.blocks.0.large_kernel.lkb_reparam"
    assert len({x.name for x in large}) == 24


@pytest.mark.parametrize(
    ("name", "norms", "convs", "branched"), [("RepLKNet-31B", 203, 154, 24), ("RepLKNet-XL", 179, 130, 24)]
)
def test_counts_of_norms_convolutions_branches_and_parameters(name, norms, convs, branched) -> None:
    found = seen(name)
    assert (found.batch_norms, found.convolutions, found.branched_blocks) == (norms, convs, branched)
    assert found.parameters == {"RepLKNet-31B": 79_864_168, "RepLKNet-XL": 335_435_752}[name]
    assert (found.size, found.classes, found.outputs) == (
        ((224,) * 2, (320,) * 2)[name.endswith("XL")],
        1000,
        ("logits",),
    )
    folded = seen(name, "folded")
    assert (folded.batch_norms, folded.convolutions, folded.branched_blocks) == (0, 130, 0)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(length=st.integers(1, 40), kernel=st.integers(1, 35), stride=st.integers(1, 5), padding=st.integers(0, 40))
def test_taps_inside_agree_with_counting_one_by_one(length: int, kernel: int, stride: int, padding: int) -> None:
    framed = [False] * padding + [True] * length + [False] * padding
    counted, start = 0, 0
    while start + kernel <= len(framed):
        counted += sum(framed[start : start + kernel])
        start += stride
    assert taps_inside(length, kernel, stride, padding) == counted


@pytest.mark.parametrize("geometry", [networks.SMALL, networks.LIKE_XL, networks.BACKBONE])
@pytest.mark.parametrize("form", ["training", "folded"])
@pytest.mark.parametrize("size", [(64, 64), (33, 47)])
def test_costs_agree_with_running_the_network_on_ones(geometry: RepLKGeometry, form: str, size) -> None:
    """A convolution of ones over ones adds up exactly the taps that lie on the map."""
    model = RepLKNet.empty(geometry, form)
    found = inspect(opened(model), size=size)
    nominal, inside = _counted(geometry, form, size)
    assert (found.macs, found.inside_macs) == (nominal, inside)


def _counted(geometry: RepLKGeometry, form: str, size: tuple[int, int]) -> tuple[int, int]:
    sums: list[tuple[int, int]] = []

    def count(module: nn.Conv2d | nn.Linear, args, out) -> None:
        if isinstance(module, nn.Linear):
            sums.append((module.weight.numel(), module.weight.numel()))
            return
        twin = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            groups=module.groups,
            bias=False,
            dtype=torch.float64,
        )
        nn.init.ones_(twin.weight)
        height, width = out.shape[2:]
        sums.append((twin.weight.numel() * height * width, round(twin(torch.ones_like(args[0]).double()).sum().item())))

    model = RepLKNet.build(geometry, form)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.inference_mode():
        model(torch.zeros(1, 3, *size))
    return sum(n for n, _ in sums), sum(i for _, i in sums)


def test_the_size_is_the_one_it_was_trained_for_unless_given(checkpoint_file: Path) -> None:
    loaded = load(checkpoint_file)
    assert inspect(loaded).size == (64, 64)
    wide = inspect(loaded, size=(64, 128))
    assert wide.size == (64, 128)
    assert [layer.map for layer in wide.large] == [(16, 32), (8, 16), (4, 8), (4, 8), (2, 4)]
    assert inspect(loaded).macs < wide.macs


@pytest.mark.parametrize("size", [(15, 64), (64, 1), (0, 0)])
def test_too_small_a_size_is_refused_with_one_that_works(size: tuple[int, int], checkpoint_file: Path) -> None:
    loaded = load(checkpoint_file)
    with pytest.raises(ReplkError, match="too small") as caught:
        inspect(loaded, size=size)
    assert caught.value.code == Exit.USAGE
    assert f"{size[0]}x{size[1]}" in caught.value.problem
    assert inspect(loaded, size=(16, 16)).macs > 0
    assert "--size 16, better 32" in caught.value.remedy


@pytest.mark.parametrize("classes", [10, None])
def test_a_record_of_it_is_plain_and_leaves_the_network_as_it_was(classes: int | None) -> None:
    geometry = networks.SMALL if classes else networks.BACKBONE
    model = networks.trained(geometry)
    hooks = [m._forward_hooks for m in model.modules()]
    record = plain(inspect(opened(model), size=(64, 64)))
    assert not any(hooks)
    assert record["classes"] == classes
    assert record["checkpoint"]["form"] == "training"
    assert len(record["outputs"]) == (1 if classes else 4)
    assert "model" not in record["checkpoint"]


def test_fused_and_trained_forms_of_one_network_agree_on_the_fused_cost() -> None:
    trained = networks.trained()
    both = [inspect(opened(m), size=(64, 64)) for m in (trained, fuse(trained).model)]
    assert both[0].fused_macs == both[1].fused_macs == both[1].macs < both[0].macs
    assert both[0].large == both[1].large
    assert dataclasses.asdict(both[0].large[0])["kernel"] == 31
