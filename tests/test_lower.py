"""A lowered graph and a lowered network give the answers of the one that they came from."""

import functools
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from replk_deploy import graph, lower, sites
from replk_deploy.batch import Batch
from replk_deploy.errors import MismatchError, ReplkError
from replk_deploy.export import export
from replk_deploy.fuse import fuse
from replk_deploy.lowerings import check, dense, grouped, strip
from replk_deploy.lowerings.base import BY_IMAGE, BY_ROW, LargeConv, Rewritten
from replk_deploy.lowerings.check import check_sites
from replk_deploy.models.baselines import baseline
from replk_deploy.models.replknet import RepLKGeometry, RepLKNet
from replk_deploy.poison import poison, randomise
from replk_deploy.precision import TOLERANCES, Precision
from tests import artefacts
from tests.test_lowerings import BUGS

EXACT = 1e-12
ROUND_OFF = 2e-6  # relative L2 between two float32 evaluations of a network of these sizes
CHOICES = ["none", "grouped", "dense", "strip"]
CHAINED = ["grouped", "dense"]  # forms that share a layout with their neighbours
GEOMETRY = RepLKGeometry(
    channels=(6, 8, 12),
    depths=(1, 3, 2),
    kernels=(13, 11, 9),
    small=3,
    dw_channels=(6, 12, 12),
    ffn_channels=(12, 16, 24),
    classes=10,
)
SIZE = (80, 64)  # maps of 20x16, 10x8, 5x4: in the last, 9 taps are more than touch the map across
BATCH = Batch(min=1, opt=2, max=8)


@pytest.fixture(scope="module")
def network() -> RepLKNet:
    """Return a folded float64 network; tests share it and never change it."""
    return fuse(poison(randomise(RepLKNet.build(GEOMETRY, "training")), size=64)).model


def written(network: RepLKNet, path: Path, precision: Precision, batch: Batch) -> Path:
    twin = RepLKNet.build(GEOMETRY, "folded")
    twin.load_state_dict(network.state_dict())
    export(twin.to(TOLERANCES[precision].torch_dtype), path, precision=precision, size=SIZE, batch=batch)
    graph.seal(path, artefacts.describe(precision))
    return path


@pytest.fixture(scope="module")
def files(network: RepLKNet, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the network's file, of a precision and for batches; each is written once."""
    folder = tmp_path_factory.mktemp("lower")

    @functools.cache
    def file(precision: Precision = "fp32", batch: Batch = BATCH) -> Path:
        return written(network, folder / f"{precision}-{batch.max}.onnx", precision, batch)

    return file


@pytest.fixture(scope="module")
def file(files: Callable[..., Path]) -> Path:
    return files()


def all_of(choice: str) -> lower.Choose:
    return lambda _site: choice


def ask(path: Path, x: np.ndarray) -> list[np.ndarray]:
    opened = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return opened.run(None, {opened.get_inputs()[0].name: x})


def images(batch: int, size: tuple[int, int] = SIZE, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, channels, *size), dtype=np.float32)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_the_sites_of_a_graph_are_those_of_its_network(network: RepLKNet, file: Path) -> None:
    by_module, by_node = lower.find_network(network, SIZE), lower.find(file)
    assert [(s.channels, s.kernel, s.map) for s in by_module] == [
        (6, (13, 13), (20, 16)),
        *[(12, (11, 11), (10, 8))] * 3,
        *[(12, (9, 9), (5, 4))] * 2,
    ]
    assert [(s.channels, s.kernel, s.map) for s in by_node] == [(s.channels, s.kernel, s.map) for s in by_module]
    assert [sites.owners(s.name, {m.name for m in by_module}) for s in by_node] == [(m.name,) for m in by_module]


@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_lowered_graph_gives_the_same_answers(choice: str, merge: bool, file: Path, tmp_path: Path) -> None:  # noqa: FBT001
    out = tmp_path / "out.onnx"
    lowered = lower.lower_graph(file, out, all_of(choice), channel_major=merge)
    assert [site.choice for site in lowered.sites] == [choice] * 6
    assert not any(site.reason for site in lowered.sites)
    assert lowered.chains == (2 if choice in CHAINED and merge else 0)
    for batch in (1, 3):
        assert apart(*ask(out, images(batch)), *ask(file, images(batch))) <= ROUND_OFF
    errors = check_sites(file, out)
    changed = {site.name for site in lowered.sites if site.changed}
    assert changed <= errors.keys()
    assert all(error <= EXACT for error in errors.values()), errors
    pointwise = 3 * 4 + 1 + 2 * 4  # of the blocks in two chains, and the transition that follows the first
    assert len(errors) == len(changed) + (pointwise if lowered.chains else 0)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_record_says_what_the_file_holds(choice: str, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    lowered = lower.lower_graph(file, out, all_of(choice))
    before, after = (
        {t.name: numpy_helper.to_array(t).nbytes for t in onnx.load(path).graph.initializer} for path in (file, out)
    )
    assert (lowered.bytes_before, lowered.bytes_after) == (sum(before.values()), sum(after.values()))
    assert lowered.growth == pytest.approx(lowered.bytes_after / lowered.bytes_before)
    for site in lowered.sites:
        module = site.name.removesuffix("/Conv")
        high, wide = site.map or (0, 0)
        made = f"{module}.weight.{'cropped' if choice == 'none' else choice}.{high}x{wide}"
        assert site.bytes_before == before[f"{module}.weight"]
        assert site.bytes_after == after[made if site.changed else f"{module}.weight"]
        assert (f"{module}.weight" in after) is not site.changed
        assert site.taps == (min(site.kernel[0], 2 * high - 1), min(site.kernel[1], 2 * wide - 1))
    assert [site.taps for site in lowered.sites][-1] == (9, 7)


@pytest.mark.parametrize("choice", CHOICES)
def test_what_others_read_in_a_file_stays(choice: str, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    lower.lower_graph(file, out, all_of(choice))
    before, after = onnx.load(file), onnx.load(out)
    assert graph.header(out) == graph.header(file)
    assert before.graph.input == after.graph.input
    assert before.graph.output == after.graph.output
    assert before.opset_import == after.opset_import
    results = {name for node in after.graph.node for name in node.output}
    assert {name for node in before.graph.node for name in node.output} <= results
    names = [node.name for node in after.graph.node]
    assert len(set(names)) == len(names)
    places = {s.name for s in lower.find(file)}
    new = [name for name in names if name not in {node.name for node in before.graph.node}]
    assert all(len(sites.owners(name, places)) == 1 for name in new)
    assert {sites.owners(name, places)[0] for name in names if sites.owners(name, places)} == places


@pytest.mark.parametrize("choice", CHAINED)
def test_a_chain_transposes_at_its_borders_only(choice: str, file: Path, tmp_path: Path) -> None:
    apart_, merged = tmp_path / "apart.onnx", tmp_path / "merged.onnx"
    lower.lower_graph(file, apart_, lambda s: "none" if s.map == (20, 16) else choice)
    lower.lower_graph(file, merged, lambda s: "none" if s.map == (20, 16) else choice, channel_major=True)
    products = 5 if choice == "dense" else 0
    assert operators(apart_).count("Transpose") == 2 * products
    assert operators(merged).count("Transpose") == 2 * 2
    assert operators(merged).count("MatMul") == products
    pointwise = 3 * 4 + 1 + 2 * 4  # of the blocks, and the transition that follows the first chain
    assert operators(merged).count("Gemm") == 1 + pointwise
    assert operators(file).count("Conv") - operators(merged).count("Conv") == products + pointwise
    kept = {t.name for t in onnx.load(merged).graph.initializer}
    read = {name for node in onnx.load(merged).graph.node for name in node.input}
    assert kept <= read


@pytest.mark.parametrize(
    ("order", "more"),
    [
        (["none", "dense", "grouped", "dense", "dense", "dense"], 2),
        (["grouped", "grouped", "grouped", "dense", "grouped", "dense"], 4),
        (["none", "dense", "strip", "grouped", "none", "grouped"], 2 + 3),
    ],
    ids=["dense rules", "grouped rules", "a strip amid"],
)
def test_the_form_that_most_take_rules_a_chain(order: list[str], more: int, file: Path, tmp_path: Path) -> None:
    """A rewrite that wants the other layout stands between two transpositions, as does one that knows neither."""
    out, chosen = tmp_path / "out.onnx", iter(order)
    lowered = lower.lower_graph(file, out, lambda _s: next(chosen), channel_major=True)
    assert operators(out).count("Transpose") == 2 * lowered.chains + more
    for batch in (1, 2, 3):
        assert apart(*ask(out, images(batch)), *ask(file, images(batch))) <= ROUND_OFF
    assert max(check_sites(file, out).values()) <= EXACT


@pytest.mark.parametrize("axes", [(1, 0, 2, 3), (1, 2, 3, 0), (1, 3, 0, 2)], ids=str)
def test_a_chain_in_another_order_than_its_rewrites_is_seen(
    axes: tuple[int, int, int, int], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = BY_ROW._replace(axes=axes)
    monkeypatch.setattr(check, "LAYOUTS", (BY_IMAGE, wrong))
    monkeypatch.setattr(grouped.Grouped, "layout", wrong)
    out = tmp_path / "out.onnx"
    lower.lower_graph(file, out, all_of("grouped"), channel_major=True)
    errors = [error for name, error in check_sites(file, out).items() if "large_kernel" in name]
    assert sum(error > 1e-2 for error in errors) == 5  # all but the one that is alone in its stage, and in no chain
    assert apart(*ask(out, images(3)), *ask(file, images(3))) > ROUND_OFF


def test_each_site_may_have_its_own(file: Path, tmp_path: Path) -> None:
    out, order = tmp_path / "out.onnx", iter(["grouped", "dense", "strip", "dense", "none", "grouped"])
    lowered = lower.lower_graph(file, out, lambda _s: next(order), channel_major=True)
    assert [s.choice for s in lowered.sites] == ["grouped", "dense", "strip", "dense", "none", "grouped"]
    assert lowered.chains == 1
    assert apart(*ask(out, images(2)), *ask(file, images(2))) <= ROUND_OFF
    assert max(check_sites(file, out).values()) <= EXACT


@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("choice", CHAINED)
def test_a_fixed_batch_stays_fixed(choice: str, merge: bool, files: Callable[..., Path], tmp_path: Path) -> None:  # noqa: FBT001
    file = files(batch=Batch(min=3, opt=3, max=3))
    out = tmp_path / "out.onnx"
    lower.lower_graph(file, out, all_of(choice), channel_major=merge)
    assert apart(*ask(out, images(3)), *ask(file, images(3))) <= ROUND_OFF
    with pytest.raises(Exception, match="Got: 2 Expected: 3"):
        ask(out, images(2))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_keeps_its_bits(
    precision: Precision, choice: str, files: Callable[..., Path], tmp_path: Path
) -> None:
    file, out = files(precision), tmp_path / "out.onnx"
    lowered = lower.lower_graph(file, out, all_of(choice), channel_major=True)
    row = TOLERANCES[precision]
    wanted = {"FLOAT16": np.float16, "BFLOAT16": ml_dtypes.bfloat16}[row.onnx]
    before, after = ({t.name: numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer} for p in (file, out))
    assert {a.dtype for a in after.values()} <= {np.dtype(wanted), np.dtype(np.int64)}
    held = [
        {v for a in arrays.values() if a.dtype == wanted for v in a.view(np.uint16).ravel()}
        for arrays in (after, before)
    ]
    assert held[0] - {0} <= held[1]
    assert max(check_sites(file, out).values()) <= EXACT
    types = {i.type.tensor_type.elem_type for i in onnx.load(out).graph.value_info} - {TensorProto.INT64}
    assert types == {getattr(TensorProto, row.onnx)}
    if precision == "fp16":
        assert apart(*ask(out, images(2).astype(np.float16)), *ask(file, images(2).astype(np.float16))) <= 5e-3
    else:
        twins = [tmp_path / f"{name}.twin.onnx" for name in ("before", "after")]
        for path, twin in zip((file, out), twins, strict=True):
            graph.bfloat16_twin(path, twin)
        assert apart(*(ask(twin, images(2))[0] for twin in twins)) <= 4e-2
    assert lowered.bytes_before == sum(a.nbytes for a in before.values())


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("choice", ["grouped", "dense", "strip"])
def test_a_misplaced_tap_is_seen_at_its_site(
    choice: str, bug: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for home in (grouped, dense, strip):
        monkeypatch.setattr(home, "centre", BUGS[bug])
    out = tmp_path / "out.onnx"
    lower.lower_graph(file, out, lambda site: choice if site.taps[0] == site.taps[1] else "none")  # else one crashes
    errors = {name: error for name, error in check_sites(file, out).items() if "stages.2" not in name}
    assert len(errors) == 4
    assert min(errors.values()) > 1e-2


def spoil(path: Path, what: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    what(model)
    out = path.with_name("spoilt.onnx")
    onnx.save(model, out)
    return out


def nudge(name: str, *, share: float = 0) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name.startswith(name))
        array = numpy_helper.to_array(tensor).copy()
        found = np.flatnonzero(array)
        array.ravel()[found[int(share * len(found))]] *= 1 + 1e-6
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merged"])
def test_one_weight_off_by_a_millionth_is_seen(merge: bool, file: Path, tmp_path: Path) -> None:  # noqa: FBT001
    out = tmp_path / "out.onnx"
    lower.lower_graph(file, out, all_of("dense"), channel_major=merge)
    place = "stages.1.blocks.2.large_kernel.lkb_reparam"
    for tensor in (f"{place}.weight", f"{place}.bias"):
        errors = check_sites(file, spoil(out, nudge(tensor)))
        assert errors.pop(f"{place}/Conv") > 1e-10
        assert max(errors.values()) <= EXACT
    if merge:
        errors = check_sites(file, spoil(out, nudge("stages.1.blocks.1.pw1.conv.weight")))
        assert errors.pop("stages.1.blocks.1.pw1.conv/Conv") > 1e-10
        assert max(errors.values()) <= EXACT


def test_a_file_of_something_else_is_no_lowered_one(file: Path, tmp_path: Path) -> None:
    other = foreign(tmp_path / "other.onnx", conv("x", "y", name="c"), w=(4, 1, 13, 13))
    with pytest.raises(MismatchError, match=r"stem\.0\.conv/Conv is not in"):
        check_sites(file, other)


# graphs of others


def conv(x: str, y: str, *, name: str = "", w: str = "w", b: str | None = None, **said: object) -> onnx.NodeProto:
    return helper.make_node(
        "Conv", [x, w, *([b] if b else [])], [y], name=name, **({"group": 4, "pads": [6] * 4} | said)
    )


def foreign(
    path: Path,
    *nodes: onnx.NodeProto,
    shape: tuple[object, ...] = ("n", 4, 9, 10),
    opset: int = 18,
    dtype: int = TensorProto.FLOAT,
    **tensors: tuple[int, ...],
) -> Path:
    rng = np.random.default_rng(0)
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in tensors.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    model.metadata_props.add(key="author", value="somebody")
    onnx.save(model, path)
    return path


def check_foreign(
    path: Path, choice: str, *, shape: tuple[int, ...] = (3, 4, 9, 10), merge: bool = True
) -> lower.Lowered:
    out = path.with_name("lowered.onnx")
    lowered = lower.lower_graph(path, out, all_of(choice), channel_major=merge)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    assert apart(*ask(out, x), *ask(path, x)) <= ROUND_OFF
    errors = check_sites(path, out)
    assert {site.name for site in lowered.sites if site.changed} <= errors.keys()
    assert all(error <= EXACT for error in errors.values())
    assert [(p.key, p.value) for p in onnx.load(out).metadata_props] == [("author", "somebody")]
    return lowered


@pytest.mark.parametrize("choice", CHOICES)
def test_a_foreign_block_with_residual_and_constant_nodes(choice: str, tmp_path: Path) -> None:
    """As in UniRepLKNet: two blocks of 13x13, 1x1 maps, a decomposed GELU with scalars, layer scale, a residual."""
    rng = np.random.default_rng(3)
    nodes = []
    x = "x"
    for i in range(2):
        weight = numpy_helper.from_array(rng.standard_normal((4, 1, 13, 13)).astype(np.float32))
        nodes += [
            helper.make_node("Constant", [], [f"w{i}"], value=weight),
            conv(x, f"d{i}", w=f"w{i}", b="b", auto_pad="SAME_UPPER", pads=None),  # nameless
            helper.make_node("Conv", [f"d{i}", "up", "up_b"], [f"u{i}"], name=f"up{i}"),
            helper.make_node("Div", [f"u{i}", "root"], [f"e{i}"], name=f"div{i}"),
            helper.make_node("Erf", [f"e{i}"], [f"f{i}"], name=f"erf{i}"),
            helper.make_node("Add", ["one", f"f{i}"], [f"g{i}"], name=f"add{i}"),
            helper.make_node("Mul", [f"u{i}", f"g{i}"], [f"h{i}"], name=f"mul{i}"),
            helper.make_node("Conv", [f"h{i}", "down"], [f"l{i}"], name=f"down{i}"),
            helper.make_node("Mul", [f"l{i}", "gamma"], [f"s{i}"], name=f"scale{i}"),
            helper.make_node("Add", [x, f"s{i}"], [f"o{i}"], name=f"residual{i}"),
        ]
        x = f"o{i}"
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["y"], name="pool"))
    shapes = {"b": (4,), "up": (8, 4, 1, 1), "up_b": (8,), "root": (), "one": (1, 1, 1, 1), "down": (4, 8, 1, 1)}
    path = foreign(tmp_path / "f.onnx", *nodes, **shapes, gamma=(1, 4, 1, 1))
    lowered = check_foreign(path, choice)
    assert [site.name for site in lowered.sites] == ["d0", "d1"]
    assert lowered.chains == (choice in CHAINED)
    left = operators(tmp_path / "lowered.onnx")
    assert left.count("Constant") == (2 if choice == "none" else 0)
    if choice in CHAINED:
        assert left.count("Transpose") == 2
        assert left.count("Gemm") == 4


@pytest.mark.parametrize("choice", CHOICES)
def test_a_foreign_pair_of_long_kernels(choice: str, tmp_path: Path) -> None:
    """As in SLaK: 51x5 and 5x51 of one input, added up; both are cropped in their long direction."""
    path = foreign(
        tmp_path / "f.onnx",
        conv("x", "h", name="high", w="wh", b="b", pads=[25, 2, 25, 2]),
        conv("x", "l", name="long", w="wl", pads=[2, 25, 2, 25]),
        helper.make_node("Add", ["h", "l"], ["y"], name="add"),
        wh=(4, 1, 51, 5), wl=(4, 1, 5, 51), b=(4,),
    )  # fmt: skip
    lowered = check_foreign(path, choice)
    assert [site.taps for site in lowered.sites] == [(17, 5), (5, 19)]
    assert lowered.chains == (choice in CHAINED)


@pytest.mark.parametrize("choice", CHOICES)
def test_convolutions_that_share_a_weight_share_what_it_becomes(choice: str, tmp_path: Path) -> None:
    path = foreign(
        tmp_path / "f.onnx",
        conv("x", "a", name="a", b="b"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        conv("r", "c", name="c", b="b"),
        helper.make_node("MaxPool", ["c"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        conv("p", "y", name="smaller", b="b"),
        w=(4, 1, 13, 13), b=(4,),
    )  # fmt: skip
    lowered = check_foreign(path, choice)
    assert [site.map for site in lowered.sites] == [(9, 10), (9, 10), (4, 5)]
    tensors = {t.name for t in onnx.load(tmp_path / "lowered.onnx").graph.initializer}
    grown = {name for name in tensors if name.startswith("w.")}
    assert len(grown) == (1 if choice == "none" else 2)
    assert ("w" in tensors) is (choice == "none")


@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("choice", ["grouped", "dense", "strip"])
def test_nodes_of_one_name_are_told_apart(choice: str, merge: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """Two of one name, one whose result has that name, one without a name, and one named after a part of another."""
    names = {"c": "a", "c ": "c", "d/Conv": "e", "": "d", "e/Conv": "y"}
    nodes, x = [], "x"
    for name, y in names.items():
        nodes.append(conv(x, y, name=name.strip(), w=f"w{y}", b="b", pads=[7, 3, 7, 3]))
        x = y
    path = foreign(tmp_path / "f.onnx", *nodes, **{f"w{y}": (4, 1, 15, 7) for y in names.values()}, b=(4,))
    found = lower.find(path)
    assert [site.name for site in found] == ["a", "c", "d/Conv", "d", "e/Conv"]
    wanted = iter([choice, "none", choice, choice, choice])
    forms = {site.name: next(wanted) for site in found}
    out = tmp_path / "out.onnx"
    lowered = lower.lower_graph(path, out, lambda site: forms[site.name], channel_major=merge)
    assert {site.name: site.choice for site in lowered.sites} == forms
    errors = check_sites(path, out)
    assert len(errors) == 4
    assert max(errors.values()) <= EXACT
    nameless = spoil(path, lambda model: [node.ClearField("name") for node in model.graph.node])  # or nobody opens it
    assert apart(*ask(out, images(3, (9, 10), 4)), *ask(nameless, images(3, (9, 10), 4))) <= ROUND_OFF
    errors = check_sites(path, spoil(out, nudge(f"wd.{choice}", share=0.6)))
    assert [name for name, error in errors.items() if error > EXACT] == ["d"]


@pytest.mark.parametrize("merge", [False, True])
def test_names_that_a_rewrite_would_give_may_be_taken(merge: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """By a value, a node beside and a weight; and one constant may be needed in two shapes."""
    path = foreign(
        tmp_path / "f.onnx",
        helper.make_node("Relu", ["x"], ["c/Reshape"], name="c/relu"),
        conv("c/Reshape", "a", name="c"),
        helper.make_node("Add", ["a", "w.grouped.9x10"], ["b"], name="add"),
        helper.make_node("Mul", ["b", "k"], ["a.chnw"], name="mul"),
        helper.make_node("Conv", ["a.chnw", "k"], ["e"], name="first"),
        helper.make_node("Conv", ["e", "u"], ["f"], name="second"),
        conv("f", "y", name="d", w="v"),
        **{"w": (4, 1, 13, 13), "v": (4, 1, 13, 13), "w.grouped.9x10": (4, 1, 1), "k": (1, 4, 1, 1), "u": (4, 1, 1, 1)},
    )
    assert check_foreign(path, "grouped", merge=merge).chains == merge


@pytest.mark.parametrize("choice", ["grouped", "dense", "strip"])
def test_a_result_that_leaves_the_graph_keeps_its_name(choice: str, tmp_path: Path) -> None:
    path = foreign(tmp_path / "f.onnx", conv("x", "a", name="a"), conv("a", "y", name="b"), w=(4, 1, 13, 13))
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, None))
    onnx.save(model, path)
    out = tmp_path / "out.onnx"
    lower.lower_graph(path, out, all_of(choice), channel_major=True)
    assert [o.name for o in onnx.load(out).graph.output] == ["y", "a"]
    for got, wanted in zip(ask(out, images(2, (9, 10), 4)), ask(path, images(2, (9, 10), 4)), strict=True):
        assert apart(got, wanted) <= ROUND_OFF


@pytest.mark.parametrize(
    ("said", "weight"),
    [
        ({"strides": [2, 2]}, (4, 1, 13, 13)),
        ({"dilations": [2, 2], "pads": [12] * 4}, (4, 1, 13, 13)),
        ({"pads": [5, 6, 7, 6]}, (4, 1, 13, 13)),
        ({"pads": None}, (4, 1, 7, 7)),
        ({"pads": [6, 5, 6, 6]}, (4, 1, 13, 12)),
        ({"group": 2}, (4, 2, 13, 13)),
        ({"group": 1}, (4, 4, 13, 13)),
        ({}, (8, 1, 13, 13)),
        ({"pads": [2] * 4}, (4, 1, 5, 5)),
    ],
    ids=str,
)
def test_nothing_else_is_touched(said: dict, weight: tuple[int, ...], tmp_path: Path) -> None:
    path, out = tmp_path / "f.onnx", tmp_path / "out.onnx"
    foreign(path, conv("x", "y", name="c", **said), w=weight)
    lowered = lower.lower_graph(path, out, all_of("grouped"), channel_major=True)
    assert lowered.sites == ()
    assert (lowered.changed, lowered.growth) == (False, 1.0)
    assert lower.find(path) == ()
    assert onnx.load(out) == onnx.load(path)
    assert check_sites(path, out) == {}


def test_weights_that_are_no_constants_stay_with_a_reason(tmp_path: Path) -> None:
    path = foreign(
        tmp_path / "f.onnx",
        helper.make_node("Add", ["v", "v"], ["w"], name="make"),
        conv("x", "y", name="c"),
        v=(4, 1, 13, 13),
    )
    (site,) = lower.lower_graph(path, tmp_path / "out.onnx", all_of("grouped")).sites
    assert (site.choice, site.reason) == ("none", "its weight is computed in the graph")
    model = onnx.load(foreign(path, conv("x", "y", name="c"), w=(4, 1, 13, 13)))
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (4, 1, 13, 13)))
    onnx.save(model, path)
    (site,) = lower.lower_graph(path, tmp_path / "out.onnx", all_of("grouped")).sites
    assert (site.choice, site.reason) == ("none", "its weight may be replaced at run time")
    assert onnx.load(tmp_path / "out.onnx") == model


def test_an_old_opset_is_a_reason(tmp_path: Path) -> None:
    path = foreign(tmp_path / "f.onnx", conv("x", "y", name="c"), w=(4, 1, 13, 13), opset=12)
    (site,) = lower.lower_graph(path, tmp_path / "out.onnx", all_of("strip")).sites
    assert site.reason == "the file is of opset 12, and the rewrites need 13"


@pytest.mark.parametrize("shape", [("n", 4, "h", 10), ("n", 4, 9, "w"), ("n", 4, "h", "w"), ("n", 4, None, 10)])
def test_an_unknown_map_is_an_error_where_something_is_asked_for(shape: tuple[object, ...], tmp_path: Path) -> None:
    path, out = tmp_path / "f.onnx", tmp_path / "out.onnx"
    foreign(path, conv("x", "y", name="c"), shape=shape, w=(4, 1, 13, 13))
    for ask_ in (lower.find, lambda p: lower.lower_graph(p, out, all_of("grouped"))):
        with pytest.raises(ReplkError, match="c cannot be lowered: its height or width is not fixed") as caught:
            ask_(path)
        assert "--size" in caught.value.remedy
    assert not out.exists()
    (site,) = lower.lower_graph(path, out).sites
    assert (site.choice, site.reason, site.map) == ("none", "its height or width is not fixed", None)
    assert onnx.load(out) == onnx.load(path)


def test_a_map_known_by_inference_only_is_known(tmp_path: Path) -> None:
    path = foreign(
        tmp_path / "f.onnx",
        helper.make_node("Resize", ["x", "", "", "size"], ["r"], name="resize"),
        conv("r", "y", name="c"),
        shape=("n", 4, "h", "w"),
        w=(4, 1, 13, 13),
    )
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 4, 9, 10]), "size"))
    onnx.save(model, path)
    assert lower.find(path) == (LargeConv(name="c", channels=4, kernel=(13, 13), map=(9, 10)),)
    check_foreign(path, "grouped", shape=(2, 4, 5, 5))


def test_a_file_too_large_is_refused_before_it_is_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.onnx"
    whole = lower.lower_graph(file, out, all_of("dense"))
    out.unlink()
    monkeypatch.setattr(lower, "LIMIT_BYTES", whole.bytes_after - 1)
    with pytest.raises(ReplkError, match=r"the file would hold 0\.0 GiB of weights") as caught:
        lower.lower_graph(file, out, all_of("dense"))
    assert "--precision fp16" in caught.value.remedy
    assert not out.exists()


def test_a_lowering_that_does_not_apply_is_said(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense.Dense, "refusal", classmethod(lambda _c, s: "too high" if s.map[0] > 10 else None))
    lowered = lower.lower_graph(file, tmp_path / "out.onnx", all_of("dense"))
    assert [site.choice for site in lowered.sites] == ["none", *["dense"] * 5]
    assert lowered.sites[0].reason == "dense does not apply: too high"
    with pytest.raises(ReplkError, match="there is no lowering named fft"):
        lower.lower_graph(file, tmp_path / "out.onnx", all_of("fft"))


# networks


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_lowered_network_gives_the_same_answers(choice: str, dtype: torch.dtype, network: RepLKNet) -> None:
    plain = RepLKNet.build(GEOMETRY, "folded")
    plain.load_state_dict(network.state_dict())
    plain = plain.to(dtype)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    twin, lowered = lower.lower_network(plain, SIZE, all_of(choice))
    assert isinstance(twin, RepLKNet)
    assert sum(isinstance(m, Rewritten) for m in twin.modules()) == (0 if choice == "none" else 6)
    assert {p.dtype for p in twin.parameters()} == {dtype}
    x = torch.from_numpy(images(3)).to(dtype)
    with torch.no_grad():
        wanted, got = plain(x)[0].double(), twin(x)[0].double()
    assert float((got - wanted).norm() / wanted.norm()) <= (EXACT if dtype == torch.float64 else 4e-2)
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    untouched = twin.get_submodule("stages.1.blocks.0.pw1.conv").weight
    assert untouched.data_ptr() == plain.get_submodule("stages.1.blocks.0.pw1.conv").weight.data_ptr()
    assert lowered.bytes_after == sum(p.nbytes for p in twin.parameters())
    assert lowered.bytes_before == sum(p.nbytes for p in plain.parameters())
    for site in lowered.sites:
        module = twin.get_submodule(site.name)
        assert module.weight.nbytes == site.bytes_after
        assert (module.weight.shape[-2:] == site.taps) or choice != "none"
        assert plain.get_submodule(site.name).weight.nbytes == site.bytes_before


def test_graph_and_network_agree_on_sizes(network: RepLKNet, file: Path, tmp_path: Path) -> None:
    plain = RepLKNet.build(GEOMETRY, "folded").float()
    plain.load_state_dict(network.state_dict())
    order = ["grouped", "dense", "strip", "none", "dense", "none"]
    chosen = iter(order * 2)
    by_graph = lower.lower_graph(file, tmp_path / "out.onnx", lambda _s: next(chosen))
    _, by_network = lower.lower_network(plain, SIZE, lambda _s: next(chosen))
    facts = ("channels", "kernel", "taps", "map", "choice", "reason", "bytes_before", "bytes_after")
    assert [[getattr(s, f) for f in facts] for s in by_graph.sites] == [
        [getattr(s, f) for f in facts] for s in by_network.sites
    ]


@pytest.mark.parametrize("choice", ["grouped", "dense", "strip"])
def test_a_network_of_timm_is_lowered(choice: str) -> None:
    network, _ = baseline("timm:test_convnext", size=(64, 64))
    network = network.double().eval()
    twin, lowered = lower.lower_network(network, (64, 64), all_of(choice))
    assert lowered.sites
    assert {site.choice for site in lowered.sites} == {choice}
    x = torch.from_numpy(images(2, (64, 64))).double()
    with torch.no_grad():
        torch.testing.assert_close(twin(x)[0], network(x)[0], rtol=1e-10, atol=1e-10)


def test_a_module_that_meets_two_maps_stays() -> None:
    class Twice(nn.Module):
        geometry, form = None, "folded"

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 7, padding=3, groups=3)

        @classmethod
        def empty(cls, _geometry: object, _form: object) -> nn.Module:
            return Twice().to("meta")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(nn.functional.max_pool2d(self.conv(x), 2))

    (site,) = lower.lower_network(Twice(), (16, 16), all_of("grouped"))[1].sites
    assert (site.choice, site.reason) == ("none", "it meets maps of several sizes")
    assert lower.find_network(Twice(), (16, 16)) == ()
