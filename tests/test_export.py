"""The written graph computes what the network does, says what it is, and nothing else."""

import dataclasses
import getpass
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from replk_deploy import export as exporting
from replk_deploy.backends.ort import OrtCpu
from replk_deploy.batch import Batch
from replk_deploy.errors import Exit, MismatchError, ReplkError
from replk_deploy.export import Export, check, export
from replk_deploy.fuse import fuse
from replk_deploy.graph import content_hash
from replk_deploy.models.base import Network
from replk_deploy.models.replknet import RepLKGeometry, RepLKNet
from replk_deploy.precision import TOLERANCES, Precision
from replk_deploy.preprocess import HALF, Preprocessing
from replk_deploy.proof import open_onnx
from tests import networks

TINY = RepLKGeometry(
    channels=(4, 6), depths=(1, 1), kernels=(13, 7), small=3, dw_channels=(4, 8), ffn_channels=(8, 12), classes=10
)
RULES = Preprocessing(
    size=(40, 56), mean=(0.485, 0.456, 0.406), std=HALF[1], resize="warp", crop_pct=1.0, said_by="checkpoint"
)


class Case(NamedTuple):
    geometry: RepLKGeometry
    precision: Precision
    size: tuple[int, int]
    batch: Batch
    embed: Preprocessing | None = None


FIXED = Batch(min=2, opt=2, max=2)
ANY = Batch(min=1, opt=2, max=7)
CASES = {
    "fp32, any batch, not square": Case(TINY, "fp32", (40, 56), ANY),
    "fp16, fixed batch": Case(TINY, "fp16", (37, 64), FIXED),
    "bf16, any batch": Case(TINY, "bf16", (40, 40), ANY),
    "fp32, bytes, any batch": Case(TINY, "fp32", (40, 56), ANY, RULES),
    "fp16, bytes, fixed batch": Case(TINY, "fp16", (40, 56), FIXED, RULES),
    "backbone": Case(networks.BACKBONE, "fp32", (64, 96), FIXED),
    "no small kernels": Case(dataclasses.replace(TINY, small=None), "fp32", (24, 24), Batch(min=1, opt=1, max=1)),
}


class Made(NamedTuple):
    case: Case
    model: Network
    path: Path
    said: Export


def write(case: Case, path: Path) -> Made:
    model = fuse(networks.trained(case.geometry)).model
    said = export(model, path, precision=case.precision, size=case.size, batch=case.batch, embed=case.embed)
    return Made(case, model, path, said)


@pytest.fixture(scope="module")
def all_made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("exports")
    return {name: write(case, folder / f"{n}.onnx") for n, (name, case) in enumerate(CASES.items())}


@pytest.fixture(params=CASES)
def made(request: pytest.FixtureRequest, all_made: dict[str, Made]) -> Made:
    return all_made[request.param]


@pytest.fixture(scope="module")
def plain(all_made: dict[str, Made]) -> Made:
    return all_made["fp32, any batch, not square"]


def pictures(case: Case, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if case.embed:
        return rng.integers(0, 256, (count, *case.size, 3), dtype=np.uint8)
    return rng.standard_normal((count, 3, *case.size)).astype(np.float32)


def exact(made: Made, images: np.ndarray) -> dict[str, np.ndarray]:
    """What the folded network answers in float64, one image at a time; bytes are normalised by hand."""
    if made.case.embed:
        rules = made.case.embed
        images = ((images / 255.0 - np.array(rules.mean)) / np.array(rules.std)).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        rows = [made.model(torch.from_numpy(np.ascontiguousarray(i[None])).double()) for i in images]
    columns = [torch.cat(c).numpy() for c in zip(*rows, strict=True)]
    return dict(zip(made.case.geometry.outputs, columns, strict=True))


def off(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.shape == wanted.shape
    errors = np.linalg.norm((got - wanted).reshape(len(got), -1), axis=1)
    return float((errors / np.linalg.norm(wanted.reshape(len(got), -1), axis=1)).max())


ALLOWED = {"fp32": 2e-5, "fp16": 2e-2, "bf16": 0.09}  # correct networks of this size showed a tenth of it


def test_the_file_answers_as_the_network_does(made: Made) -> None:
    images = pictures(made.case, 4)
    wanted = exact(made, images)
    assert min(off(w[:1], w[1:2]) for w in wanted.values()) > 2 * ALLOWED[made.case.precision], "images too alike"
    with open_onnx(made.path, made.case.precision) as backend:
        for step in (1, 2, 4) if made.case.batch.dynamic else (made.case.batch.max,):
            chunks = [backend.run(images[i : i + step]) for i in range(0, 4, step)]
            for name, out in wanted.items():
                assert off(np.concatenate([c[name] for c in chunks]), out) < ALLOWED[made.case.precision], (name, step)


def test_the_checker_has_nothing_to_say(made: Made) -> None:
    onnx.checker.check_model(made.path, full_check=True)


def test_opset_types_ports_and_nodes_are_those_asked_for(made: Made) -> None:
    case, graph = made.case, onnx.load(made.path)
    row = TOLERANCES[case.precision]
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", row.opset)]
    kinds = {TensorProto.DataType.Name(t.data_type) for t in graph.graph.initializer} - {"INT64"}
    assert kinds == ({row.onnx, "FLOAT"} if case.embed else {row.onnx})
    (port,) = graph.graph.input
    shape = [d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim]
    first = "batch" if case.batch.dynamic else case.batch.max
    assert shape == ([first, *case.size, 3] if case.embed else [first, 3, *case.size])
    assert port.type.tensor_type.elem_type == TensorProto.DataType.Value("UINT8" if case.embed else row.onnx)
    assert tuple(o.name for o in graph.graph.output) == case.geometry.outputs
    operators = [n.op_type for n in graph.graph.node]
    assert operators.count("Conv") == sum(isinstance(m, nn.Conv2d) for m in made.model.modules())
    assert "BatchNormalization" not in operators
    assert operators.count("Cast") <= (2 if case.embed else 0), "a typed network needs no casts inside"


def test_what_is_said_of_the_file_is_what_it_holds(made: Made) -> None:
    said, graph = made.said, onnx.load(made.path)
    assert (said.precision, said.size, said.batch) == (made.case.precision, made.case.size, made.case.batch)
    assert said.opset == TOLERANCES[made.case.precision].opset
    assert said.embeds_preprocessing == (made.case.embed is not None)
    assert sum(said.nodes.values()) == len(graph.graph.node)
    assert tuple(said.outputs) == made.case.geometry.outputs
    first = "batch" if made.case.batch.dynamic else str(made.case.batch.max)
    assert all(shape.split()[1].startswith(f"{first}x") for shape in said.outputs.values())


def test_nothing_tells_of_the_machine_it_was_written_on(made: Made) -> None:
    whole = made.path.read_bytes()
    places = {str(Path.cwd()), str(Path.home()), str(made.path.parent), str(Path(torch.__file__).parent), sys.prefix}
    for place in places:
        assert place.encode() not in whole
    graph = onnx.load(made.path)
    del graph.graph.initializer[:]
    text = graph.SerializeToString()
    for word in (b".py", b"site-packages", b"replk_deploy", b"torch.ops", b"_Deployed"):
        assert word not in text
    user = getpass.getuser().encode()
    assert len(user) < 4 or user not in text
    assert not graph.graph.doc_string
    assert not any(n.doc_string or n.metadata_props for n in graph.graph.node)


def test_nodes_are_called_after_the_modules_of_the_network(made: Made) -> None:
    modules = dict(made.model.named_modules())
    named = 0
    names = [n.name for n in onnx.load(made.path).graph.node]
    assert len(set(names)) == len(names)
    for name in names:
        module, slash, _ = name.rpartition("/")
        assert not slash or module in modules, name
        named += bool(slash)
    convs = [n.name for n in onnx.load(made.path).graph.node if n.op_type == "Conv"]
    owners = {name.rpartition("/")[0] for name in convs}
    assert owners == {name for name, m in modules.items() if isinstance(m, nn.Conv2d)}
    assert named > len(convs)


def test_each_block_s_name_is_that_of_its_last_value(all_made: dict[str, Made]) -> None:
    """Asked for by name, a block answers what a hook on it sees, so that a bisection compares the same things."""
    for made in (all_made["fp32, any batch, not square"], all_made["backbone"], all_made["no small kernels"]):
        model, blocks = onnx.load(made.path), list(made.model.blocks())
        model = onnx.shape_inference.infer_shapes(model)
        outputs = {o.name for o in model.graph.output}
        model.graph.output.extend([v for v in model.graph.value_info if v.name in blocks])
        images = pictures(made.case, min(2, made.case.batch.max))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        got = dict(zip(names, session.run(None, {"images": images}), strict=True))
        assert set(blocks) <= got.keys() | outputs
        seen: dict[str, np.ndarray] = {}
        hooks = [
            made.model.get_submodule(b).register_forward_hook(
                lambda _m, _a, out, name=b, seen=seen: seen.__setitem__(name, out.numpy())
            )
            for b in blocks
        ]
        with torch.inference_mode():
            made.model(torch.from_numpy(images).double())
        for hook in hooks:
            hook.remove()
        for block in blocks:
            assert off(got[block], seen[block]) < ALLOWED["fp32"], block


def test_a_fixed_batch_takes_no_other(all_made: dict[str, Made]) -> None:
    made = all_made["fp16, fixed batch"]
    with OrtCpu(made.path) as backend, pytest.raises(ReplkError, match="takes float32 images 2x3x37x64"):
        backend.run(pictures(made.case, 3))


def test_rows_of_a_batch_do_not_touch_each_other(plain: Made) -> None:
    images = pictures(plain.case, 5)
    with OrtCpu(plain.path) as backend:
        together = backend.run(images)["logits"]
        alone = np.concatenate([backend.run(i[None])["logits"] for i in images])
        turned = backend.run(images[::-1])["logits"][::-1]
    assert off(together, alone) < 1e-6
    assert off(turned, together) < 1e-6


def test_the_network_that_came_in_is_untouched(tmp_path: Path) -> None:
    model = fuse(networks.trained(TINY)).model
    before = {k: t.clone() for k, t in model.state_dict().items()}
    export(model, tmp_path / "a.onnx", precision="fp16", size=(24, 24), batch=FIXED)
    after = model.state_dict()
    assert all(torch.equal(after[k], t) and after[k].dtype == t.dtype for k, t in before.items())


def test_the_same_network_gives_the_same_bytes(tmp_path: Path, all_made: dict[str, Made]) -> None:
    made = all_made["fp16, fixed batch"]
    again = write(made.case, tmp_path / "again.onnx")
    assert content_hash(again.path) == content_hash(made.path)
    assert again.said == made.said


def test_a_merged_network_keeps_its_norms_and_is_still_right(tmp_path: Path) -> None:
    """The exporter folds a norm that follows a convolution; the count may fall, and never rise."""
    case = Case(TINY, "fp32", (24, 32), FIXED)
    model = fuse(networks.trained(TINY), level="merge").model
    said = export(model, tmp_path / "m.onnx", precision="fp32", size=case.size, batch=FIXED)
    made = Made(case, model, tmp_path / "m.onnx", said)
    images = pictures(case, 2)
    with OrtCpu(made.path) as backend:
        assert off(backend.run(images)["logits"], exact(made, images)["logits"]) < ALLOWED["fp32"]


@pytest.mark.parametrize("size", [(3, 64), (64, 3), (1, 1), (0, 64)])
def test_an_image_too_small_is_refused_with_a_size_that_is_not(tmp_path: Path, size: tuple[int, int]) -> None:
    model = RepLKNet.empty(TINY, "folded")
    with pytest.raises(ReplkError, match=f"{size[0]}x{size[1]} is too small") as caught:
        export(model, tmp_path / "a.onnx", precision="fp32", size=size, batch=FIXED)
    assert caught.value.remedy == "use at least --size 4, better 8"
    assert not list(tmp_path.iterdir())


def test_the_smallest_size_that_is_taken_works() -> None:
    model = fuse(networks.trained(TINY)).model
    with torch.inference_mode():
        (logits,) = model(torch.ones(1, 3, 4, 4).double())
    assert torch.isfinite(logits).all()


def test_a_file_that_onnx_cannot_hold_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RepLKNet.empty(TINY, "folded")
    count = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(exporting, "LIMIT_BYTES", 4 * count - 1)
    with pytest.raises(ReplkError, match="2 GiB"):
        export(model, tmp_path / "a.onnx", precision="fp32", size=(64, 64), batch=FIXED)

    def reached(*_args: Any, **_kwargs: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(torch.onnx, "export", reached)
    whole = fuse(networks.trained(TINY)).model
    with pytest.raises(InterruptedError):  # half the bytes fit
        export(whole, tmp_path / "a.onnx", precision="fp16", size=(64, 64), batch=FIXED)


def test_an_exporter_that_gives_nothing_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_args, **_kwargs: None)
    with pytest.raises(MismatchError, match="gave nothing"):
        export(fuse(networks.trained(TINY)).model, tmp_path / "a", precision="fp32", size=(64, 64), batch=FIXED)


def _conv(graph: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in graph.graph.node if n.name.startswith(name) and n.op_type == "Conv")


def _older_opset(graph: onnx.ModelProto) -> None:
    graph.opset_import[0].version = 21


def _norm_left(graph: onnx.ModelProto) -> None:
    conv = _conv(graph, "stem.0")
    out, channels = conv.output[0], 4
    conv.output[0] = "before_norm"
    for name in ("s", "b", "m", "v"):
        graph.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [channels], [1.0] * channels))
    norm = helper.make_node("BatchNormalization", ["before_norm", "s", "b", "m", "v"], [out], name="stem.0/norm")
    graph.graph.node.insert(1 + list(graph.graph.node).index(conv), norm)


def _lost_conv(graph: onnx.ModelProto) -> None:
    conv = _conv(graph, "stem.1")  # depthwise, stride 1: its output has the shape of its input
    conv.CopyFrom(helper.make_node("Identity", conv.input[:1], list(conv.output), name=conv.name))


def _rename(graph: onnx.ModelProto, ports: Any, old: str, new: str) -> None:
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if n == old else n for n in names]
    for port in ports:
        if port.name == old:
            port.name = new


def _renamed_output(graph: onnx.ModelProto) -> None:
    _rename(graph, graph.graph.output, "logits", "scores")


def _renamed_input(graph: onnx.ModelProto) -> None:
    _rename(graph, graph.graph.input, "images", "pixels")


def _second_output(graph: onnx.ModelProto) -> None:
    inferred = onnx.shape_inference.infer_shapes(graph)
    graph.graph.output.append(next(v for v in inferred.graph.value_info if v.name == "stem.0"))


def _frozen_batch(graph: onnx.ModelProto) -> None:
    del graph.graph.value_info[:]
    for port in (*graph.graph.input, *graph.graph.output):
        dim = port.type.tensor_type.shape.dim[0]
        dim.Clear()
        dim.dim_value = 2


def _half_of_the_weights(graph: onnx.ModelProto) -> None:
    weight = next(t for t in graph.graph.initializer if t.name == "head.bias")
    half = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).astype(np.float16), "half")
    graph.graph.initializer.remove(weight)
    graph.graph.initializer.append(half)
    graph.graph.node.insert(0, helper.make_node("Cast", ["half"], ["head.bias"], to=TensorProto.FLOAT, name="cast"))


def _source_path(graph: onnx.ModelProto) -> None:
    graph.graph.node[3].doc_string = 'File "model.py", line 3, in forward'


def _home(graph: onnx.ModelProto) -> None:
    graph.metadata_props.add(key="trace", value=f"{Path.home()}/work")


TAMPERED = {
    _older_opset: "opset 21, asked for 20",
    _norm_left: "1 BatchNorms left",
    _lost_conv: r"\d+ convolutions, the network has",
    _renamed_output: r"outputs \['scores'\], asked for \['logits'\]",
    _renamed_input: "input {'pixels'",
    _second_output: r"outputs \['logits', 'stem.0'\]",
    _frozen_batch: "2x3x40x56",
    _half_of_the_weights: "weights of type",
    _source_path: "notes of the exporter's machine",
    _home: "notes of the exporter's machine",
}


def checked(made: Made, path: Path, **changes: Any) -> Export:
    case = made.case
    asked = {"precision": case.precision, "size": case.size, "batch": case.batch, "embed": case.embed} | changes
    return check(path, made.model, **asked)


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda t: t.__name__.strip("_"))
def test_a_graph_that_is_not_the_one_asked_for_is_refused(tmp_path: Path, plain: Made, tamper) -> None:
    assert checked(plain, plain.path) == plain.said
    graph = onnx.load(plain.path)
    tamper(graph)
    onnx.save(graph, tmp_path / "tampered.onnx")
    onnx.checker.check_model(tmp_path / "tampered.onnx", full_check=True)  # onnx itself sees nothing wrong
    with pytest.raises(MismatchError, match=TAMPERED[tamper]) as caught:
        checked(plain, tmp_path / "tampered.onnx")
    assert caught.value.code == Exit.MISMATCH


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp16"},
        {"precision": "bf16"},
        {"size": (56, 40)},
        {"batch": FIXED},
        {"batch": Batch(min=7, opt=7, max=7)},
        {"embed": RULES},
    ],
)
def test_a_right_graph_is_refused_for_another_request(plain: Made, changes: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match="not the one asked for"):
        checked(plain, plain.path, **changes)


def test_batches_read_as_they_are_written() -> None:
    for low, high in itertools.combinations_with_replacement((1, 2, 9), 2):
        batch = Batch(min=low, opt=low, max=high)
        assert batch.dynamic == (low < high)
        assert str(batch) == (f"{low}:{low}:{high}" if low < high else str(high))
