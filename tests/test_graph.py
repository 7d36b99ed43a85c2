"""What an ONNX file says of itself, and the float32 twin of a bfloat16 one."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from replk_deploy import graph
from replk_deploy.errors import ReplkError
from replk_deploy.metadata import Metadata, Verdict
from replk_deploy.preprocess import Preprocessing

RULES = Preprocessing(
    size=(64, 96), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), resize="crop", crop_pct=0.875, said_by="checkpoint"
)
METADATA = Metadata(
    family="replknet",
    form="folded",
    geometry="{}",
    label="RepLKNet-σ",
    precision="bf16",
    preprocessing=RULES,
    source_sha256="ab" * 32,
    source_name="checkpoint best.pth",
)
VERDICT = Verdict(state="pass", content="cd" * 32, reference="ab" * 32, worst=0.31, why="normal 0: inside")
CHANNELS = 3
WEIGHT = np.array([1.2345, -0.777, 3.1], np.float32).astype(ml_dtypes.bfloat16)
KERNEL = np.random.default_rng(0).standard_normal((CHANNELS, 1, 3, 3)).astype(ml_dtypes.bfloat16)


def save(path: Path, nodes: list, outputs: list[str], initializers: dict, *, dtype: int = TensorProto.BFLOAT16) -> Path:
    shape = ["n", CHANNELS, 5, 4]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("images", dtype, shape)],
            [helper.make_tensor_value_info(o, TensorProto.BFLOAT16, shape) for o in outputs],
            [numpy_helper.from_array(a, n) for n, a in initializers.items()],
        ),
        opset_imports=[helper.make_opsetid("", 22)],
        ir_version=10,
    )
    onnx.checker.check_model(made, full_check=True)
    onnx.save(onnx.shape_inference.infer_shapes(made), path)  # the exporter states every type too
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    nodes = [helper.make_node("Mul", ["images", "w"], ["y"], name="first")]
    return save(tmp_path / "model.onnx", nodes, ["y"], {"w": WEIGHT.reshape(CHANNELS, 1, 1)})


def edited(path: Path, edit) -> Path:
    model = onnx.load(path)
    edit(model)
    out = path.with_name("edited.onnx")
    onnx.save(model, out)
    return out


def test_what_is_sealed_is_read_back(file: Path) -> None:
    assert graph.header(file) is None
    graph.seal(file, METADATA)
    assert graph.header(file) == METADATA
    said = dataclasses.replace(METADATA, verdict=VERDICT, label="another")
    graph.seal(file, said)
    assert graph.header(file) == said
    graph.seal(file, METADATA)
    assert graph.header(file) == METADATA, "a verdict that was taken back is gone"


def test_sealing_keeps_the_graph_and_what_others_wrote(file: Path) -> None:
    before = onnx.load(file)
    foreign = edited(file, lambda m: m.metadata_props.add(key="author", value="somebody"))
    graph.seal(foreign, METADATA)
    graph.seal(foreign, METADATA)
    after = onnx.load(foreign)
    assert after.graph == before.graph
    props = [(p.key, p.value) for p in after.metadata_props]
    assert len(props) == len(dict(props))
    assert dict(props)["author"] == "somebody"


def test_the_hash_ignores_the_verdict_and_nothing_else(file: Path) -> None:
    graph.seal(file, METADATA)
    content = graph.content_hash(file)
    graph.seal(file, dataclasses.replace(METADATA, verdict=VERDICT))
    assert graph.content_hash(file) == content
    graph.seal(file, dataclasses.replace(METADATA, verdict=dataclasses.replace(VERDICT, state="rejected")))
    assert graph.content_hash(file) == content
    assert len(content) == 64


OTHER_WEIGHT = numpy_helper.from_array((WEIGHT * 2).reshape(CHANNELS, 1, 1), "w")
EDITS = {
    "a weight": lambda m: m.graph.initializer[0].CopyFrom(OTHER_WEIGHT),
    "an operator": lambda m: setattr(m.graph.node[0], "op_type", "Div"),
    "a name": lambda m: setattr(m.graph.node[0], "name", "other"),
    "the opset": lambda m: setattr(m.opset_import[0], "version", 23),
    "a shape": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 6),
    "preprocessing": lambda m: next(p for p in m.metadata_props if p.key.endswith("preprocessing")).MergeFromString(
        onnx.StringStringEntryProto(value='{"mean": [0, 0, 0]}').SerializeToString()
    ),
    "the source": lambda m: next(p for p in m.metadata_props if p.key.endswith("source_sha256")).MergeFromString(
        onnx.StringStringEntryProto(value="ef" * 32).SerializeToString()
    ),
    "somebody's metadata": lambda m: m.metadata_props.add(key="author", value="somebody"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_the_hash_sees(file: Path, edit: str) -> None:
    graph.seal(file, dataclasses.replace(METADATA, verdict=VERDICT))
    before = graph.content_hash(file)
    assert graph.content_hash(edited(file, lambda _m: None)) == before
    assert graph.content_hash(edited(file, EDITS[edit])) != before


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("ask", [graph.load, graph.header, graph.content_hash])
def test_a_file_cut_short_is_refused(tmp_path: Path, file: Path, share: float, ask) -> None:
    graph.seal(file, METADATA)
    whole = file.read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ReplkError, match=r"cut\.onnx (is not a whole ONNX file|holds no ONNX graph)") as caught:
        ask(cut)
    assert caught.value.remedy == "export it again: replk export --onnx"


@pytest.mark.parametrize("content", [b"# a text file\n" * 9, b"PK\x03\x04" + bytes(50), b"\x00" * 64, b"\xff" * 64])
def test_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "else.onnx"
    path.write_bytes(content)
    with pytest.raises(ReplkError, match=r"else\.onnx"):
        graph.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReplkError, match=r"missing\.onnx"):
        graph.load(tmp_path / "missing.onnx")


@pytest.mark.parametrize("value", ["{", "[]", '{"size": 3}', "null", "fp99"])
def test_a_damaged_header_is_refused(file: Path, value: str) -> None:
    graph.seal(file, METADATA)

    def damage(model: onnx.ModelProto) -> None:
        key = "replk.precision" if value == "fp99" else "replk.preprocessing"
        next(p for p in model.metadata_props if p.key == key).value = value

    with pytest.raises(ReplkError, match="its replk header is damaged"):
        graph.header(edited(file, damage))


def images(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(2, CHANNELS, 5, 4, generator=torch.Generator().manual_seed(seed))


def twin_of(path: Path) -> Path:
    out = path.with_name("twin.onnx")
    graph.bfloat16_twin(path, out)
    onnx.checker.check_model(out, full_check=True)
    return out


def ask_twin(path: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(str(twin_of(path)), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": x.numpy()})), strict=True))


@settings(deadline=None, max_examples=15, derandomize=True)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 1e4]))
def test_the_twin_rounds_the_input_and_every_result(
    tmp_path_factory: pytest.TempPathFactory, seed: int, scale: float
) -> None:
    """Of single-rounding operators each result is known to the bit; `m` is an inner value and an output."""
    nodes = [
        helper.make_node("Mul", ["images", "w"], ["m"]),
        helper.make_node("Add", ["m", "images"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Mul", ["r", "m"], ["y"]),
    ]
    path = save(tmp_path_factory.mktemp("twin") / "b.onnx", nodes, ["y", "m"], {"w": WEIGHT.reshape(CHANNELS, 1, 1)})
    x = images(seed, scale)
    got = ask_twin(path, x)
    low, weight = x.bfloat16(), torch.tensor(WEIGHT.astype(np.float32)).bfloat16().reshape(CHANNELS, 1, 1)
    m = low * weight
    y = torch.relu(m + low) * m
    assert list(got) == ["y", "m"]
    assert {t.dtype for t in got.values()} == {torch.float32}
    assert torch.equal(got["m"], m.float())
    assert torch.equal(got["y"], y.float())
    assert not torch.equal(got["m"], x * weight.float()), "float32 all the way would show nothing"


def test_the_twin_rounds_a_convolution_once_at_its_end(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["images", "k"], ["y"], group=CHANNELS, pads=[1, 1, 1, 1])]
    path = save(tmp_path / "b.onnx", nodes, ["y"], {"k": KERNEL})
    x = images(3)
    exact = torch.nn.functional.conv2d(
        x.bfloat16().double(), torch.tensor(KERNEL.astype(np.float64)), padding=1, groups=CHANNELS
    )
    got = ask_twin(path, x)["y"]
    assert torch.equal(got, got.bfloat16().float()), "the result is a bfloat16 number"
    assert float(((got - exact) / exact).abs().max()) < 2**-8, "and the nearest one"


def test_a_network_that_normalises_bytes_inside_is_rounded_where_it_is_cast(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["images"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["n"]),
        helper.make_node("Cast", ["n"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("Mul", ["b", "w"], ["y"]),
    ]
    scale = np.array(1 / 255, np.float32)
    weights = {"s": scale, "w": WEIGHT.reshape(CHANNELS, 1, 1)}
    path = save(tmp_path / "b.onnx", nodes, ["y"], weights, dtype=TensorProto.UINT8)
    x = torch.arange(2 * CHANNELS * 20).remainder(256).to(torch.uint8).reshape(2, CHANNELS, 5, 4)
    weight = torch.tensor(WEIGHT.astype(np.float32)).bfloat16().reshape(CHANNELS, 1, 1)
    wanted = (x.float() * torch.tensor(scale)).bfloat16() * weight
    assert torch.equal(ask_twin(path, x)["y"], wanted.float())


def test_an_input_that_is_handed_through_is_rounded_too(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["images"], ["y"])]
    x = images(5)
    got = ask_twin(save(tmp_path / "b.onnx", nodes, ["y"], {}), x)["y"]
    assert torch.equal(got, x.bfloat16().float())


def test_the_twin_leaves_the_artefact_as_it_was(file: Path) -> None:
    graph.seal(file, METADATA)
    before = file.read_bytes()
    twin = twin_of(file)
    assert file.read_bytes() == before
    assert graph.header(twin) is None, "a stand-in vouches for nothing"
