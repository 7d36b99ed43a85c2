"""One contract for every runtime, and the wrong question as often as the right one."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from replk_deploy import backends, bench, optional, weights
from replk_deploy.backends.base import Array, Backend, Engine
from replk_deploy.errors import ContractError, Exit, ReplkError, UnavailableError
from replk_deploy.fuse import fuse
from replk_deploy.metadata import Metadata
from replk_deploy.models.base import Network
from replk_deploy.models.replknet import RepLKGeometry, RepLKNet
from replk_deploy.poison import poison, randomise
from replk_deploy.precision import TOLERANCES, Precision
from replk_deploy.preprocess import HALF, Preprocessing

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # inside inductor
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # inside inductor
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # inside torch.export, torch 2.13
]

SIZE = 64
GEOMETRY = RepLKGeometry(
    channels=(8, 16, 24, 32),
    depths=(1, 1, 1, 1),
    kernels=(31, 29, 27, 13),
    small=5,
    dw_channels=(8, 16, 24, 32),
    ffn_channels=(32, 64, 96, 128),
    classes=10,
)
CASES: list[tuple[str, Precision]] = [
    ("torch", "fp32"),
    ("torch", "fp16"),
    ("torch", "bf16"),
    ("torch-compile", "fp32"),
    ("ort-cpu", "fp32"),
    ("ort-cpu", "fp16"),
]
Files = Callable[[str, Precision], Path]


@pytest.fixture(scope="module")
def network() -> Network:
    """A folded float64 network whose norms have lived."""
    return fuse(poison(randomise(RepLKNet.build(GEOMETRY, "training")), size=SIZE)).model


def images(n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((n, 3, SIZE, SIZE), dtype=np.float32)


def describe(network: Network, precision: Precision) -> Metadata:
    preprocessing = Preprocessing(
        size=(SIZE, SIZE), mean=HALF[0], std=HALF[1], resize="crop", crop_pct=0.875, said_by="default"
    )
    return Metadata(
        family="replknet",
        form="folded",
        geometry=network.describe(),
        label=network.geometry.label,
        precision=precision,
        preprocessing=preprocessing,
        source_sha256="0" * 64,
        source_name="a test",
    )


@pytest.fixture(scope="module")
def files(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Write each file once, when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("files"), {}

    def file(kind: str, precision: Precision) -> Path:
        if (kind, precision) not in made:
            path = folder / f"model.{precision}.{kind}"
            twin = RepLKNet.build(GEOMETRY, "folded")
            twin.load_state_dict(network.state_dict())
            twin = twin.to(TOLERANCES[precision].torch_dtype).requires_grad_(requires_grad=False)
            if kind == "weights":
                weights.write(path, twin, describe(twin, precision))
            else:
                export(twin, path, precision)
            made[kind, precision] = path
        return made[kind, precision]

    return file


def export(model: Network, path: Path, precision: Precision) -> None:
    row = TOLERANCES[precision]
    program = torch.onnx.export(
        model,
        (torch.from_numpy(images(2)).to(row.torch_dtype),),
        dynamo=True,
        opset_version=row.opset,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        verbose=False,
    )
    program.save(path)
    proto = onnx.load(path)
    helper.set_model_props(proto, describe(model, precision).to_strings())
    onnx.save(proto, path)


def opened(name: str, precision: Precision, files: Files) -> Backend:
    return backends.find(name)(files(backends.takes(name), precision))


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def backend(request: pytest.FixtureRequest, files: Files) -> Backend:
    with opened(*request.param, files) as found:
        yield found


def test_every_usable_backend_is_held_to_the_contract() -> None:
    assert all(backends.find(name).name == name for name in backends.BACKENDS)
    engines = {name for name in backends.BACKENDS if issubclass(backends.find(name), Engine)}  # tested one by one
    assert {name for name, _ in CASES} == set(backends.BACKENDS) - engines
    for name in set(backends.BACKENDS) - engines:
        assert {p for n, p in CASES if n == name} <= backends.find(name).precisions
        assert all(isinstance(value, str) for value in backends.find(name).probe().values())


@pytest.fixture(scope="module")
def truth(network: Network) -> Array:
    return network(torch.from_numpy(images(3)).double())[0].numpy()


def test_the_answer_is_that_of_the_float64_network(backend: Backend, truth: Array) -> None:
    answer = backend.run(images(3))  # one shape throughout: torch-compile compiles for each
    assert tuple(answer) == backend.outputs == ("logits",)
    assert (answer["logits"].dtype, answer["logits"].shape) == (np.float32, truth.shape)
    error = np.linalg.norm(answer["logits"] - truth, axis=1) / np.linalg.norm(truth, axis=1)
    row = TOLERANCES[backend.precision]
    assert error.max() < min(10 * row.typical, row.limit)
    assert np.linalg.norm(truth[0] - truth[1]) > 2 * row.limit * np.linalg.norm(truth[0])  # swapped rows would show


def test_the_first_answer_is_intact_after_a_second(backend: Backend) -> None:
    first = backend.run(images(3, seed=1))["logits"]
    kept = first.copy()
    second = backend.run(images(3, seed=2))["logits"]
    assert np.array_equal(first, kept)
    assert not np.allclose(first, second)
    assert first.flags.owndata


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("float64", images(1).astype(np.float64)),
        ("uint8", images(1).astype(np.uint8)),
        ("batch 0", images(0)),
        ("rank 3", images(1)[0]),
        ("4 channels", np.zeros((1, 4, SIZE, SIZE), np.float32)),
        ("channels last", images(1).transpose(0, 2, 3, 1)),
    ],
)
def test_the_wrong_batch_is_refused(backend: Backend, what: str, wrong: Array) -> None:
    for ask in (backend.run, backend.prepare):
        with pytest.raises(ReplkError, match="takes float32 images"):
            ask(wrong)
    assert what


def test_odd_memory_is_taken(backend: Backend) -> None:
    batch = images(3)
    frozen = batch.copy()
    frozen.flags.writeable = False
    backwards = np.ascontiguousarray(batch[:, :, ::-1])[:, :, ::-1]
    expected = backend.run(batch)["logits"]
    assert np.array_equal(backend.run(frozen)["logits"], expected)
    assert np.array_equal(backend.run(backwards)["logits"], expected)


def test_a_launch_can_be_repeated_and_timed(backend: Backend) -> None:
    launch = backend.prepare(images(3))
    for _ in range(2):
        launch.enqueue()
        launch.wait()
    contestant = bench.enter(backend, [images(3, seed=s) for s in (1, 2)], load_s=1.0)
    assert contestant.contract.batch == 3
    assert contestant.contract.precision == backend.precision
    assert contestant.contract.rotate == len(contestant.launches) == 2
    assert contestant.contract.dynamic_shapes
    assert contestant.first_inference_ms > 0


def test_facts_say_how_it_ran(backend: Backend) -> None:
    assert all(isinstance(value, str) for value in backend.facts.values())
    assert any("threads" in key for key in backend.facts)
    if backend.takes == "weights":
        assert backend.facts["layout"] in {"channels_first", "channels_last"}
        assert "batch 1, 64x64" in backend.facts["layout_probe"]


@pytest.mark.parametrize("name", ["torch", "torch-compile", "ort-cpu"])
def test_a_closed_backend_does_not_answer(name: str, files: Files) -> None:
    closed = opened(name, "fp32", files)
    closed.close()
    closed.close()
    for ask in (closed.run, closed.prepare):
        with pytest.raises(ContractError, match="closed"):
            ask(images(1))


@pytest.mark.parametrize("name", ["torch", "torch-compile", "ort-cpu"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "garbage", "the other kind", "a folder"])
def test_a_file_that_cannot_be_taken_is_refused_with_a_remedy(
    name: str, damage: str, files: Files, tmp_path: Path
) -> None:
    kind = backends.takes(name)
    whole = files(kind, "fp32").read_bytes()
    path = tmp_path / "file"
    if damage == "a folder":
        path = tmp_path
    elif damage == "the other kind":
        path = files("onnx" if kind == "weights" else "weights", "fp32")
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut short": whole[: len(whole) // 2], "garbage": b"\x07nonsense" * 99}[damage])
    with pytest.raises(ReplkError) as caught:
        backends.find(name)(path)
    assert caught.value.code == Exit.USAGE
    assert caught.value.remedy


def graph(inputs: Mapping[str, tuple[int, list[object]]], output: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A file of somebody else: adds its inputs' casts up over H and W."""
    ports = [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in inputs.items()]
    first = ports[0].name
    nodes = [
        helper.make_node("Cast", [first], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["cast"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["out"], to=output),
    ]
    out = helper.make_tensor_value_info("out", output, None)
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(helper.make_graph(nodes, "foreign", ports, [out]), opset_imports=opset, ir_version=10)


def test_a_foreign_onnx_file_says_its_precision_by_its_type(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    for dtype, precision in ((TensorProto.FLOAT, "fp32"), (TensorProto.FLOAT16, "fp16")):
        onnx.save(graph({"x": (dtype, ["n", 3, 8, "w"])}), path)
        with backends.find("ort-cpu")(path) as found:
            assert (found.precision, found.input.shape) == (precision, (None, 3, 8, None))
            assert found.run(np.ones((2, 3, 8, 5), np.float32))["out"].tolist() == [[1, 1, 1]] * 2


def test_pictures_of_bytes_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "bytes.onnx"
    onnx.save(graph({"x": (TensorProto.UINT8, ["n", 8, 8, 3])}), path)
    with backends.find("ort-cpu")(path) as found:
        assert (found.input.dtype, found.precision) == ("uint8", "fp32")
        assert found.run(np.full((2, 8, 8, 3), 9, np.uint8))["out"].max() == 9
        assert bench.enter(found, [np.full((2, 8, 8, 3), 9, np.uint8)]).contract.layout == "nhwc"
        with pytest.raises(ReplkError, match="takes uint8 images"):
            found.run(np.ones((2, 8, 8, 3), np.float32))


@pytest.mark.parametrize(
    "proto",
    [
        graph({"x": (TensorProto.FLOAT, ["n", 3, 8, 8]), "y": (TensorProto.FLOAT, [1])}),
        graph({"x": (TensorProto.FLOAT, ["n", 3, 8])}),
        graph({"x": (TensorProto.INT64, ["n", 3, 8, 8])}),
        graph({"x": (TensorProto.FLOAT, ["n", 3, 8, 8])}, output=TensorProto.INT64),
    ],
    ids=["two inputs", "rank 3", "integers", "integers out"],
)
def test_a_graph_that_is_no_image_network_is_refused(proto: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    onnx.save(proto, path)
    with pytest.raises(ReplkError, match="does not map one batch of images"):
        backends.find("ort-cpu")(path)


def test_ort_says_that_it_has_no_bf16(files: Files) -> None:
    with pytest.raises(UnavailableError, match=r"bf16.*--precision fp32 \(or fp16\)"):
        opened("ort-cpu", "bf16", files)


def test_ort_keeps_the_first_words_of_the_runtime(tmp_path: Path) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(b"\x07nonsense" * 99)
    with pytest.raises(ReplkError, match="Protobuf parsing failed"):
        backends.find("ort-cpu")(path)


def test_ort_that_is_missing_names_its_install_line(monkeypatch: pytest.MonkeyPatch, files: Files) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(name=module)

    monkeypatch.setattr(optional, "import_module", missing)
    with pytest.raises(UnavailableError, match=r"pip install 'replk-deploy\[cpu\]'"):
        opened("ort-cpu", "fp32", files)


@pytest.fixture
def _forgetful() -> Iterator[None]:
    """Make Dynamo forget the frames that a test has made it skip."""
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forgetful")
def test_torch_compile_that_is_switched_off_is_no_silent_eager_run(files: Files) -> None:
    with opened("torch-compile", "fp32", files) as found, torch._dynamo.config.patch(disable=True):
        with pytest.raises(UnavailableError, match=r"eagerly|no compiled frames"):
            found.run(images(3))
        with pytest.raises(UnavailableError, match="switched off"):
            opened("torch-compile", "fp32", files)


def test_a_planted_eager_fallback_is_noticed(monkeypatch: pytest.MonkeyPatch, files: Files) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    with opened("torch-compile", "fp32", files) as found, pytest.raises(UnavailableError, match="eagerly"):
        found.prepare(images(1))


@pytest.mark.usefixtures("_forgetful")
def test_a_compiler_that_fails_is_said_though_errors_are_suppressed(
    monkeypatch: pytest.MonkeyPatch, files: Files
) -> None:
    from replk_deploy.backends import torch_compile

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(torch_compile, "compile_fx", broken)
    with (
        torch._dynamo.config.patch(suppress_errors=True),
        opened("torch-compile", "fp32", files) as found,
        pytest.raises(UnavailableError, match="planted"),
    ):
        found.run(images(1))


def test_torch_compile_without_a_compiler_says_what_to_install() -> None:
    found = backends.find("torch-compile")
    words = pytest.raises(UnavailableError, match=r"apt-get install g\+\+")
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), words:
        found.probe()


def test_the_faster_layout_is_kept_and_a_hopeless_one_given_up() -> None:
    from replk_deploy.backends.torch import faster_layout

    class Layouts(torch.nn.Module):
        """A network on a fake clock: seconds depend on the layout of what comes in."""

        def __init__(self, seconds: Mapping[bool, float]) -> None:
            super().__init__()
            self.now, self.seconds = 0.0, seconds
            self.parts = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(10)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                self.now += self.seconds[x.is_contiguous(memory_format=torch.channels_last)] / 10
                x = part(x)
            return x

    for seconds, faster in (({True: 0.1, False: 0.5}, "channels_last"), ({True: 0.5, False: 0.1}, "channels_first")):
        model = Layouts(seconds)
        name, words = faster_layout(model, torch.float32, (8, 8), clock=lambda m=model: int(m.now * 1e9))
        assert name == faster
        assert "100.0 ms" in words
        assert "500.0 ms" in words
    model = Layouts({True: 1.0, False: 1000.0})
    name, words = faster_layout(model, torch.float32, (8, 8), clock=lambda: int(model.now * 1e9))
    assert (name, "channels_first given up" in words) == ("channels_last", True)
    assert model.now < 300  # not ten hundred seconds, thrice


@pytest.mark.parametrize("name", backends.PLANNED)
def test_a_planned_backend_says_so_and_how_to_get_it(name: str) -> None:
    planned = backends.PLANNED[name]
    with pytest.raises(UnavailableError) as caught:
        backends.find(name)
    assert caught.value.code == Exit.UNAVAILABLE
    assert "no adapter" in caught.value.problem
    extra = f"[{planned.extra}]" if planned.extra else ""
    assert f"pip install --upgrade 'replk-deploy{extra}'" in caught.value.remedy
    assert "torch, torch-compile, ort-cpu" in caught.value.remedy
    assert backends.takes(name) == ("weights" if name in {"aoti", "native"} else "onnx")


def test_a_planned_backend_tells_whether_its_package_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "version", lambda _: None)
    for there, words in ((object(), "though openvino is installed"), (None, "and openvino is not installed")):
        monkeypatch.setattr(backends, "find_spec", lambda _, there=there: there)
        with pytest.raises(UnavailableError, match=words):
            backends.find("openvino")
    with pytest.raises(UnavailableError, match="onnxruntime-gpu is not installed"):
        backends.find("ort-cuda")  # though the CPU build brings a module of that name


@pytest.mark.parametrize(
    ("typed", "meant"), [("tensorrt", "trt"), ("torchcompile", "torch-compile"), ("ortcpu", "ort-cpu")]
)
def test_an_unknown_name_gets_the_nearest(typed: str, meant: str) -> None:
    for ask in (backends.find, backends.takes):
        with pytest.raises(ReplkError, match=f"did you mean {meant}") as caught:
            ask(typed)
        assert caught.value.code == Exit.USAGE
        assert all(name in caught.value.remedy for name in (*backends.BACKENDS, *backends.PLANNED))
