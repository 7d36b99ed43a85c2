"""What a layer costs, counted from modules and from graphs, and which layer of a runtime it is."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from replk_deploy import sites
from replk_deploy.batch import DYNAMIC
from replk_deploy.export import export
from replk_deploy.fuse import fuse
from replk_deploy.models.baselines import baseline
from replk_deploy.models.replknet import VARIANTS, RepLKNet
from replk_deploy.sites import Site
from tests import networks

LARGE = "stages.0.blocks.0.large_kernel.lkb_reparam"


@pytest.fixture(scope="module")
def folded() -> RepLKNet:
    return fuse(networks.trained()).model


def of(found: dict[str, Site], *, large: bool) -> list[Site]:
    return [site for site in found.values() if site.large == large]


def test_a_published_network_costs_what_the_paper_says() -> None:
    network = RepLKNet.empty(VARIANTS["RepLKNet-31B"], "folded")
    found = sites.of_network(network, batch=1, size=(224, 224))
    assert round(sum(site.macs for site in found.values()) / 1e9, 3) == 15.354
    assert round(sum(site.macs for site in of(found, large=True)) / 1e9, 3) == 2.443
    assert round(sum(site.inside_macs for site in of(found, large=True)) / 1e9, 3) == 1.117
    assert len(of(found, large=True)) == 24
    first = found[LARGE]
    assert (first.channels, first.kernel, first.map) == (128, (31, 31), (56, 56))
    assert first.elements == 2 * 128 * 56 * 56 + 128 * 31 * 31
    assert found["head"].macs == 1024 * 1000


def test_a_batch_multiplies_work_and_data_but_not_weights(folded: RepLKNet) -> None:
    one, four = (sites.of_network(folded, batch=n, size=(64, 64)) for n in (1, 4))
    assert one.keys() == four.keys()
    for name, site in one.items():
        weight = folded.get_submodule(name).weight.numel()
        assert (four[name].macs, four[name].inside_macs) == (4 * site.macs, 4 * site.inside_macs)
        assert four[name].elements - weight == 4 * (site.elements - weight)


def test_tokens_count_as_often_as_there_are() -> None:
    network, _ = baseline("timm:swin_tiny_patch4_window7_224", size=(64, 64))
    found = sites.of_network(network, batch=2, size=(64, 64))
    qkv = found["body.net.layers.0.blocks.0.attn.qkv"]
    windows = 2 * 9  # of 7x7, on a map of 16x16 padded to 21x21
    assert qkv.macs == windows * 49 * 96 * 288
    assert not of(found, large=True)


def test_seven_by_seven_is_large() -> None:
    network, _ = baseline("timm:test_convnext", size=(64, 64))
    large = of(sites.of_network(network, batch=1, size=(64, 64)), large=True)
    assert {site.kernel for site in large} == {(7, 7)}
    assert all(site.depthwise for site in large)


class _Called(nn.Module):
    """A network of one module, under the contract that `of_network` needs."""

    geometry, form = None, "folded"

    def __init__(self, conv: nn.Module, times: int) -> None:
        super().__init__()
        self.conv, self.times = conv, times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = self.conv(x)
        return x


def counted(conv: nn.Module, size: tuple[int, int], times: int = 1, name: str = "conv") -> Site:
    class Network(_Called):
        @classmethod
        def empty(cls, _geometry: object, _form: object) -> nn.Module:
            return _Called(conv, times).to("meta")

    return sites.of_network(Network(conv, times), batch=1, size=size)[name]


@pytest.mark.parametrize(
    ("made", "size"),
    [
        ({"kernel_size": 5, "padding": 2}, (9, 7)),
        ({"kernel_size": (3, 7), "padding": (1, 3)}, (4, 5)),
        ({"kernel_size": 3, "stride": 2, "padding": 1}, (9, 8)),
        ({"kernel_size": 3, "padding": 4, "dilation": 4}, (6, 11)),
        ({"kernel_size": 5, "padding": "same"}, (3, 3)),
        ({"kernel_size": 4, "stride": 4}, (8, 12)),
        ({"kernel_size": 7, "padding": 3, "groups": 3}, (4, 4)),
    ],
    ids=str,
)
def test_taps_inside_are_those_that_a_convolution_of_ones_over_ones_adds_up(made: dict, size: tuple[int, int]) -> None:
    conv = nn.Conv2d(3, 6, bias=False, **made)
    twin = nn.Conv2d(3, 6, bias=False, dtype=torch.float64, **made)
    nn.init.ones_(twin.weight)
    with torch.no_grad():
        out = twin(torch.ones(1, 3, *size).double())
    site = counted(conv, size)
    assert site.inside_macs == round(float(out.sum()))
    assert site.macs == out.numel() * conv.weight[0].numel()
    assert site.map == tuple(out.shape[2:])
    assert not site.depthwise or made.get("groups") == 3


@pytest.mark.parametrize(
    ("conv", "depthwise", "large"),
    [
        (nn.Conv2d(6, 6, 7, padding=3, groups=3), False, False),
        (nn.Conv2d(6, 12, 7, padding=3, groups=6), True, True),
        (nn.Conv2d(6, 6, 5, padding=2, groups=6), True, False),
        (nn.Conv2d(6, 6, (1, 11), padding=(0, 5), groups=6), True, True),
        (nn.Conv2d(1, 6, 7, padding=3), False, False),
    ],
    ids=str,
)
def test_only_one_filter_a_channel_is_depthwise(conv: nn.Conv2d, *, depthwise: bool, large: bool) -> None:
    site = counted(nn.Sequential(nn.Conv2d(3, conv.in_channels, 1), conv), (8, 8), name="conv.1")
    assert (site.depthwise, site.large) == (depthwise, large)


def test_a_module_that_is_called_twice_counts_twice() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    once, twice = counted(conv, (8, 8)), counted(conv, (8, 8), times=2)
    assert (twice.macs, twice.inside_macs) == (2 * once.macs, 2 * once.inside_macs)


@pytest.fixture(scope="module")
def file(folded: RepLKNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sites") / "model.onnx"
    export(folded, path, precision="fp32", size=(64, 64), batch=DYNAMIC)
    return path


def test_a_graph_costs_what_its_network_costs(folded: RepLKNet, file: Path) -> None:
    by_module = sites.of_network(folded, batch=3, size=(64, 64))
    by_node = sites.of_file(file, (3, 3, 64, 64))
    assert len(by_node) == len(by_module)
    for name, site in by_node.items():
        (module,) = sites.owners(name, by_module)
        twin = by_module[module]
        costs = ("macs", "inside_macs", "elements", "channels", "depthwise", "large")
        assert [getattr(site, c) for c in costs] == [getattr(twin, c) for c in costs], name
        assert site.kernel == twin.kernel


def foreign(path: Path, *nodes: onnx.NodeProto, **weights: tuple[int, ...]) -> Path:
    tensors = [helper.make_tensor(n, TensorProto.FLOAT, s, np.ones(s).ravel()) for n, s in weights.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 9, 9])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=opset), path)
    return path


@pytest.mark.parametrize(
    ("said", "inside"),
    [
        ({"pads": [1, 1, 1, 1]}, (3 * 9 - 2) ** 2),
        ({"auto_pad": "SAME_UPPER"}, (3 * 9 - 2) ** 2),
        ({"pads": [0, 0, 2, 2]}, (3 * 9 - 3) ** 2),
        ({}, (3 * 7) ** 2),
        ({"pads": [1, 1, 1, 1], "strides": [2, 2]}, (3 * 5 - 2) ** 2),
    ],
    ids=str,
)
def test_a_foreign_node_is_counted_by_what_it_says(said: dict, inside: int, tmp_path: Path) -> None:
    path = foreign(
        tmp_path / "f.onnx", helper.make_node("Conv", ["x", "w"], ["y"], name="c", group=4, **said), w=(4, 1, 3, 3)
    )
    (site,) = sites.of_file(path, (2, 4, 9, 9)).values()
    assert (site.name, site.depthwise, site.large, site.channels) == ("c", True, False, 4)
    assert site.inside_macs == 2 * 4 * inside


def test_products_and_nameless_nodes_are_counted_and_the_unknown_is_left_out(tmp_path: Path) -> None:
    path = foreign(
        tmp_path / "f.onnx",
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["g"], transB=1),
        helper.make_node("MatMul", ["g", "v"], ["m"], name="last"),
        helper.make_node("NonZero", ["m"], ["z"]),
        helper.make_node("Cast", ["z"], ["zf"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["q", "zf"], ["y"], name="unknown"),
        w=(5, 4), b=(5,), v=(5, 6), q=(3, 2),
    )  # fmt: skip
    found = sites.of_file(path, (2, 4, 9, 9))
    assert {name: site.macs for name, site in found.items()} == {"g": 2 * 4 * 5, "last": 2 * 5 * 6}
    assert found["last"].elements == 2 * 5 + 5 * 6 + 2 * 6


NAMES = {LARGE, "stages.0.blocks.0.pw1.conv", "head", "stem.0.conv", "/features/0/Conv", "node_conv2d_1"}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (LARGE, (LARGE,)),
        (f"{LARGE}/Conv", (LARGE,)),
        (f"{LARGE}/Conv_nchwc", (LARGE,)),
        (f"fused {LARGE}/Conv_token_12", (LARGE,)),
        (f"{LARGE}/Conv_nchwc_kernel_time", (LARGE,)),
        (f"{LARGE}/Reshape_2", (LARGE,)),
        (f"{LARGE}/Conv + stages.0.blocks.0/Relu", (LARGE,)),
        (f"{LARGE}/Conv + stages.0.blocks.0.pw1.conv/Conv", (LARGE, "stages.0.blocks.0.pw1.conv")),
        (f"[{LARGE}/Conv, head/Gemm]", (LARGE, "head")),
        (f"PWN({LARGE}/Relu)", (LARGE,)),
        ("head/MatMul/MatMulAddFusion", ("head",)),
        ("/features/0/Conv", ("/features/0/Conv",)),
        ("fused /features/0/Conv_nchwc", ("/features/0/Conv",)),
        ("node_conv2d_1", ("node_conv2d_1",)),
        ("node_conv2d_12", ()),
        (f"{LARGE}2/Conv", ()),
        ("stages.0.blocks.0/Add", ()),
        ("stages.0.blocks.0.pw1/Relu", ()),
        ("ReorderInput", ()),
        ("{ForeignNode[stem.0.conv/Conv...head]}", ()),
        ("", ()),
    ],
)
def test_a_layer_finds_its_modules_by_name(layer: str, expected: tuple[str, ...]) -> None:
    assert sites.owners(layer, NAMES) == expected
