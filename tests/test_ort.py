"""ONNX Runtime: its CPU provider as it is, its GPU providers with the CPU's in their place."""

import contextlib
import re
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from replk_deploy import backends, bench, machine, optional
from replk_deploy.backends import ort, ort_kernels
from replk_deploy.backends.base import Settings
from replk_deploy.backends.ort_kernels import Kernel
from replk_deploy.errors import ContractError, MismatchError, ReplkError, UnavailableError
from tests import artefacts, false_gpu
from tests.artefacts import ODD, SIZE, Files, graph, images
from tests.false_gpu import FalseGpu

GPU = {"ort-cuda": "CUDAExecutionProvider", "ort-trt": "TensorrtExecutionProvider"}
SWAP = r"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'replk-deploy\[gpu\]'"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory)


def test_a_foreign_file_says_its_precision_by_its_type(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("proto", ODD.values(), ids=ODD)
def test_a_graph_that_is_no_image_network_is_refused(proto: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    onnx.save(proto, path)
    with pytest.raises(ReplkError, match="does not map one batch of images"):
        backends.find("ort-cpu")(path)


def test_one_number_for_a_whole_batch_is_no_answer(tmp_path: Path) -> None:
    model = graph({"x": (TensorProto.FLOAT, ["n", 3, 8, 8])})
    model.graph.node.append(helper.make_node("ReduceMean", ["out"], ["y"], keepdims=0))
    model.graph.output[0].name = "y"
    onnx.save(model, tmp_path / "scalar.onnx")
    with (
        backends.find("ort-cpu")(tmp_path / "scalar.onnx") as found,
        pytest.raises(MismatchError, match="promised one row an image"),
    ):
        found.run(np.ones((1, 3, 8, 8), np.float32))


def test_there_is_no_bf16_on_the_processor(files: Files) -> None:
    with pytest.raises(UnavailableError, match=r"bf16.*--precision fp32 \(or fp16\)"):
        files.opened("ort-cpu", "bf16")


def test_the_first_words_of_the_runtime_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(b"\x07nonsense" * 99)
    with pytest.raises(ReplkError, match="Protobuf parsing failed"):
        backends.find("ort-cpu")(path)


def test_a_missing_package_names_its_install_line(monkeypatch: pytest.MonkeyPatch, files: Files) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(name=module)

    path = files.file("onnx", "fp32")
    monkeypatch.setattr(optional, "import_module", missing)
    for name, extra in (("ort-cpu", "cpu"), ("ort-cuda", "gpu"), ("ort-trt", "gpu")):
        with pytest.raises(UnavailableError, match=rf"pip install 'replk-deploy\[{extra}\]'"):
            backends.find(name)(path)


def test_a_provider_that_fails_to_start_prints_nothing_and_falls_back_to_nothing(
    capfd: pytest.CaptureFixture[str], files: Files
) -> None:
    options = ort.session_options(onnxruntime)
    with pytest.raises(ReplkError, match="cannot open"):
        ort.session_of(onnxruntime, files.file("onnx", "fp32"), options, [("CPUExecutionProvider", "no options")])
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_layers_carry_the_names_of_our_modules(files: Files, precision: str) -> None:
    with files.opened("ort-cpu", precision) as found:
        layers = found.layer_times(images(2), repeats=3)
    names = [layer.name for layer in layers]
    convolutions = [layer.name.removesuffix("/Conv") for layer in layers if layer.kind == "Conv"]
    modules = dict(artefacts.network().named_modules())
    assert len(convolutions) == sum(isinstance(m, torch.nn.Conv2d) for m in modules.values()), (
        "none missing, none twice"
    )
    assert set(convolutions) <= modules.keys()
    if precision == "fp32":  # fp16 has casts at both ends
        assert (names[0], names[-1]) == ("stem.0.conv/Conv", "head/Gemm")
    assert len(set(names)) == len(names)
    assert all(len(layer.samples_ms) == 3 and min(layer.samples_ms) >= 0 for layer in layers)
    times = {layer.name: sum(layer.samples_ms) for layer in layers}
    assert times["stages.0.blocks.0.large_kernel.lkb_reparam/Conv"] > times["stages.0.blocks.0.pw1.conv/Conv"]


EVENT = {"cat": "Node", "dur": 1000, "args": {"node_index": "1", "op_name": "Conv"}, "name": "a_kernel_time"}


@pytest.mark.parametrize(
    "trace",
    [[], [{**EVENT, "ts": 1}], [{**EVENT, "ts": n} for n in range(4)], [{**EVENT, "ts": 1, "cat": "Session"}] * 3],
    ids=["empty", "one run of three", "four of three", "no nodes"],
)
def test_a_profile_that_does_not_add_up_is_no_profile(
    trace: list[dict[str, object]], files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort.json, "loads", lambda _: trace)
    with files.opened("ort-cpu", "fp32") as found, pytest.raises(ContractError, match="profile of 3 runs"):
        found.layer_times(images(1), repeats=2)


def test_a_profile_leaves_the_warm_up_out_and_no_file_behind(
    in_empty_folder: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = [{**EVENT, "ts": n, "dur": 1000 * n} for n in (3, 1, 2)]
    with files.opened("ort-cpu", "fp32") as found:
        monkeypatch.setattr(ort.json, "loads", lambda _: trace)
        (layer,) = found.layer_times(images(1), repeats=2)
    assert (layer.name, layer.kind, layer.samples_ms) == ("a", "Conv", (2.0, 3.0))
    assert not list(in_empty_folder.iterdir())


class FalseOrt:
    """ONNX Runtime whose GPU providers are its CPU provider under another name; `options` were asked for."""

    def __init__(self, folder: Path, provider: str) -> None:
        self.__version__, self.__file__ = "1.32.0", str(folder / "__init__.py")
        (folder / "capi").mkdir(exist_ok=True)
        self.provider = self.place = provider
        self.SessionOptions, self.RunOptions = onnxruntime.SessionOptions, onnxruntime.RunOptions
        self.set_default_logger_severity = onnxruntime.set_default_logger_severity
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.twisted: dict[str, str] = {}
        self.moved: dict[str, str] = {}
        self.runs: list[str] = []
        self.built_with = [*GPU.values(), "CPUExecutionProvider"]
        self.failure: Exception | None = None
        self.starts = True
        self.opening: Exception | None = None

    def get_available_providers(self) -> list[str]:
        return self.built_with

    def InferenceSession(self, path, options, *, providers, enable_fallback) -> "FalseSession":  # noqa: N802  # theirs
        assert not enable_fallback
        if self.opening is not None:
            raise self.opening
        if not isinstance(path, bytes):  # else the probe asks
            self.asked = providers
        return FalseSession(self, onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))


class FalseSession:
    def __init__(self, home: FalseOrt, real: onnxruntime.InferenceSession) -> None:
        self._home, self._real = home, real

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return [self._home.provider if self._home.starts else "CPUExecutionProvider", "CPUExecutionProvider"]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {name: {**options, **self._home.twisted} for name, options in self._home.asked}

    def get_provider_graph_assignment_info(self) -> list[types.SimpleNamespace]:
        found = []
        for group in self._real.get_provider_graph_assignment_info():
            for node in group.get_nodes():
                where = self._home.moved.get(node.op_type, self._home.place)
                found.append(types.SimpleNamespace(ep_name=where, get_nodes=lambda node=node: [node]))
        return found

    def run_with_iobinding(self, binding: onnxruntime.IOBinding, options: onnxruntime.RunOptions) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self._home.runs.append(options.get_run_config_entry("gpu_graph_id"))
        if self._home.failure is not None:
            raise self._home.failure
        self._real.run_with_iobinding(binding)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FalseGpu:
    found = FalseGpu()
    found.install(monkeypatch)
    return found


@pytest.fixture(params=GPU)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def false_ort(name: str, gpu: FalseGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FalseOrt:
    assert not gpu.log
    found, real = FalseOrt(tmp_path, GPU[name]), optional.import_module
    monkeypatch.setattr(optional, "import_module", lambda m: found if m == "onnxruntime" else real(m))
    return found


Change = Callable[[FalseOrt], None]


def test_both_builds_at_once_are_broken_and_the_remedy_is_a_swap(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}.get)
    words = f"{name} is broken: onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are installed and both share one module"
    with pytest.raises(UnavailableError, match=words) as caught:
        backends.find(name).probe()
    assert re.fullmatch(SWAP, caught.value.remedy)


def test_the_build_for_processors_is_refused_with_a_swap(name: str, files: Files) -> None:
    for ask in (backends.find(name).probe, lambda: files.opened(name, "fp16")):
        with pytest.raises(UnavailableError, match=f"built without {GPU[name]}") as caught:
            ask()
        assert re.fullmatch(SWAP, caught.value.remedy)


def test_a_library_that_does_not_load_keeps_the_loaders_words(name: str, false_ort: FalseOrt) -> None:
    words = f"Failed to load library libonnxruntime_providers_{name}.so"
    false_ort.opening = RuntimeError(words)
    with pytest.raises(UnavailableError, match=rf"{GPU[name]} does not load: {words}") as caught:
        backends.find(name).probe()
    assert "onnxruntime-gpu[cuda,cudnn]" in caught.value.remedy
    assert ("tensorrt<11" in caught.value.remedy) == (name == "ort-trt")


def test_a_gpu_that_is_missing_is_said(name: str, false_ort: FalseOrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replk_deploy.backends.cuda.available", lambda: False)
    assert false_ort.provider == GPU[name]
    with pytest.raises(UnavailableError, match=f"{name} needs an NVIDIA GPU.*nvidia-smi"):
        backends.find(name).probe()


@pytest.mark.usefixtures("false_ort")
def test_the_gpus_answer_is_that_of_the_network(name: str, files: Files) -> None:
    with files.opened(name, "fp16") as found:
        assert found.device == "cuda"
        assert found.facts["gpu"] == false_gpu.NAME
        first = found.run(images(3))
        kept = first["logits"].copy()
        assert artefacts.error(first) < artefacts.usual_error("fp16")
        found.run(images(3, seed=1))
        assert np.array_equal(first["logits"], kept)
        with pytest.raises(ReplkError, match="takes float32 images"):
            found.prepare(images(2).astype(np.float16))
        found.close()
        found.close()
        with pytest.raises(ContractError, match="closed"):
            found.run(images(1))


def test_a_launch_is_bound_to_places_that_stay(false_ort: FalseOrt, gpu: FalseGpu, name: str, files: Files) -> None:
    with files.opened(name, "fp16") as found:
        batch = images(2)
        launch = found.prepare(batch)
        batch[:] = 0
        gpu.log.clear()
        launch.enqueue()
        launch.wait()
        place = launch.answer["logits"].data_ptr()
        assert artefacts.error({"logits": launch.answer["logits"].numpy()}) < artefacts.usual_error("fp16")
        launch.enqueue()
        assert launch.answer["logits"].data_ptr() == place
        assert launch.device_ms() == false_gpu.TICK_MS
        assert gpu.log[:5] == ["on stream 1", "event", "event", "off", "stream 1 idle"]
        assert set(false_ort.runs) == {"-1"}
        assert false_ort.asked[0][1]["user_compute_stream"] == "4097", "the stream that the events are on"


def test_each_launch_has_a_graph_of_its_own_and_answers_are_outside_any(
    false_ort: FalseOrt, name: str, files: Files
) -> None:
    with files.opened(name, "fp16", Settings(cuda_graph=True)) as found:
        assert found.facts["cuda_graph"] == "on"
        found.run(images(2))
        assert false_ort.runs == ["-1", "-1"], "to learn the shapes, and to answer"
        for launch in [found.prepare(images(2, seed=s)) for s in (1, 2)]:
            launch.enqueue()
        assert false_ort.runs[2:] == ["-1", "1", "-1", "2", "1", "2"], "each captured before its first launch counts"


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", "0"), ("tf32", "1"), ("fp16", "1")])
@pytest.mark.parametrize("name", ["ort-cuda"], indirect=True)
def test_cuda_options_say_what_is_wanted(false_ort: FalseOrt, files: Files, precision: str, tf32: str) -> None:
    settings = Settings(layout="nhwc", conv_search="heuristic", cuda_graph=True)
    with files.opened("ort-cuda", precision, settings) as found:
        ((_, options),) = false_ort.asked
        wanted = {"use_tf32": tf32, "prefer_nhwc": "1", "cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": "1"}
        assert wanted.items() <= options.items()
        assert wanted.items() <= found.facts.items()
        assert "user_compute_stream" not in found.facts
    with files.opened("ort-cuda", precision):
        ((_, options),) = false_ort.asked
        wanted = {"prefer_nhwc": "0", "cudnn_conv_algo_search": "EXHAUSTIVE", "enable_cuda_graph": "0"}
        assert wanted.items() <= options.items()


@pytest.mark.parametrize("name", ["ort-trt"], indirect=True)
def test_tensorrt_is_told_type_and_range(false_ort: FalseOrt, files: Files, tmp_path: Path) -> None:
    with files.opened("ort-trt", "fp16", Settings(cuda_graph=True)) as found:
        (first, options), (second, _) = false_ort.asked
        assert (first, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
        shapes = {
            f"trt_profile_{k}_shapes": f"images:{n}x3x{SIZE}x{SIZE}"
            for k, n in zip(("min", "opt", "max"), (1, 8, 64), strict=True)
        }
        assert {"trt_fp16_enable": "1", "trt_cuda_graph_enable": "1", **shapes}.items() <= options.items()
        assert [str(b) for b in found.batches] == ["1:8:64"]
        with pytest.raises(ReplkError, match="built for 1:8:64"):
            found.run(images(65))
    with files.opened("ort-trt", "tf32"):
        assert false_ort.asked[0][1]["trt_fp16_enable"] == "0"
    onnx.save(graph({"x": (TensorProto.FLOAT16, ["n", 3, 8, "w"])}), tmp_path / "wide.onnx")
    with pytest.raises(ReplkError, match="builds for one size"):
        backends.find("ort-trt")(tmp_path / "wide.onnx")


@pytest.mark.parametrize("name", ["ort-trt"], indirect=True)
def test_tensorrt_cannot_promise_fp32(false_ort: FalseOrt, files: Files, tmp_path: Path) -> None:
    onnx.save(graph({"x": (TensorProto.FLOAT, ["n", 3, 8, 8])}), tmp_path / "foreign.onnx")
    for ask in (lambda: files.opened("ort-trt", "fp32"), lambda: backends.find("ort-trt")(tmp_path / "foreign.onnx")):
        with pytest.raises(UnavailableError, match=r"no switch for TF32, so fp32 is not offered.*tf32 or fp16"):
            ask()
    assert not false_ort.asked, "refused before an engine is built"


def test_bf16_is_refused_with_what_to_do(name: str, false_ort: FalseOrt, files: Files) -> None:
    with pytest.raises(UnavailableError, match=r"bf16.*--precision fp16"):
        files.opened(name, "bf16")
    assert not false_ort.asked


def test_a_silent_run_on_the_processor_is_noticed(name: str, false_ort: FalseOrt, files: Files) -> None:
    false_ort.starts = False
    with pytest.raises(UnavailableError, match=f"{GPU[name]} does not load: ONNX Runtime fell back to the CPU"):
        files.opened(name, "fp16")


def test_nodes_elsewhere_are_named(name: str, false_ort: FalseOrt, files: Files) -> None:
    false_ort.moved = {"Gelu": "CPUExecutionProvider"}
    with pytest.raises(UnavailableError, match=GPU[name]) as caught:
        files.opened(name, "tf32")
    assert "stages.0.blocks.1/Gelu (Gelu) to CPUExecutionProvider" in caught.value.problem
    assert caught.value.problem.endswith(" and 1 more"), "four of them, three named"
    false_ort.moved = {"Conv": "CUDAExecutionProvider" if name == "ort-trt" else "CPUExecutionProvider"}
    with pytest.raises(UnavailableError, match="leaves nodes"):
        files.opened(name, "tf32")


def test_sizes_may_be_computed_on_the_processor(name: str, false_ort: FalseOrt, tmp_path: Path) -> None:
    model = graph({"x": (TensorProto.FLOAT16, ["n", 3, 8, 8])})
    model.graph.node.append(onnx.helper.make_node("Shape", ["x"], ["size"], name="size"))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["x", "size"], ["same"], name="same"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("same", TensorProto.FLOAT16, None))
    onnx.save(model, tmp_path / "sized.onnx")
    false_ort.moved = {"Shape": "CPUExecutionProvider"}
    with backends.find(name)(tmp_path / "sized.onnx") as found:
        assert found.run(np.ones((2, 3, 8, 8), np.float32))["same"].shape == (2, 3, 8, 8)
    false_ort.moved |= {"Reshape": "CPUExecutionProvider"}
    with pytest.raises(UnavailableError, match=r"same \(Reshape\)"):
        backends.find(name)(tmp_path / "sized.onnx")


def test_a_provider_that_took_nothing_is_refused(name: str, false_ort: FalseOrt, files: Files) -> None:
    false_ort.place = "Other"
    with pytest.raises(UnavailableError, match="takes no node"):
        files.opened(name, "fp16")


def test_an_option_that_is_not_in_force_is_refused(name: str, false_ort: FalseOrt, files: Files) -> None:
    key = "use_tf32" if name == "ort-cuda" else "trt_fp16_enable"
    false_ort.twisted = {key: "true" if name == "ort-trt" else "0"}
    if name == "ort-trt":  # another spelling of the same
        files.opened(name, "fp16").close()
        false_ort.twisted = {key: "0"}
    with pytest.raises(UnavailableError, match=f"asked for {key}="):
        files.opened(name, "fp16")


@pytest.mark.parametrize(
    ("words", "problem", "remedy"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", "too little memory", "smaller --batch"),
        ("Failed to allocate memory for requested buffer of size 9", "too little memory", "smaller --batch"),
        ("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED", "the GPU failed", "start again"),
        ("Got invalid dimensions for input", "Got invalid dimensions", "export"),
    ],
)
def test_a_failing_run_is_told_with_what_to_do(
    name: str, false_ort: FalseOrt, files: Files, words: str, problem: str, remedy: str
) -> None:
    with files.opened(name, "fp16") as found:
        launch = found.prepare(images(1))
        false_ort.failure = RuntimeError(words)
        for ask in (launch.enqueue, lambda: found.run(images(1))):
            with pytest.raises(ReplkError, match=problem) as caught:
                ask()
            assert remedy in caught.value.remedy
            assert isinstance(caught.value, UnavailableError) == ("invalid" not in words)


@pytest.mark.usefixtures("false_ort")
@pytest.mark.parametrize(
    ("name", "words"), [("ort-cuda", "cannot see kernels"), ("ort-trt", "one node")], indirect=["name"]
)
def test_launch_times_are_not_sold_as_kernel_times(
    name: str, words: str, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.profiler, "supported_activities", set)
    with files.opened(name, "fp16") as found, pytest.raises(UnavailableError, match=words):
        found.layer_times(images(1), repeats=1)


@pytest.mark.usefixtures("false_ort")
@pytest.mark.parametrize("name", ["ort-cuda"], indirect=True)
def test_nodes_lie_on_the_epochs_clock_while_kernels_are_recorded(
    name: str, files: Files, monkeypatch: pytest.MonkeyPatch, in_empty_folder: Path
) -> None:
    ends: list[int] = []

    @contextlib.contextmanager
    def recorded(folder: Path) -> Iterator[list[Kernel]]:
        assert folder.is_dir()
        ends.append(time.time_ns())
        yield [Kernel("k", 1, 2, 3.0)]
        ends.append(time.time_ns())

    given: list[Any] = []
    monkeypatch.setattr(ort_kernels, "demand", lambda _: None)
    monkeypatch.setattr(ort_kernels, "recorded", recorded)
    monkeypatch.setattr(ort_kernels, "attributed", lambda *args: given.append(args) or ())
    with files.opened(name, "fp16") as found:
        found.layer_times(images(2), repeats=3)
    ((nodes, kernels),) = given
    begun, ended = ends
    assert kernels == [Kernel("k", 1, 2, 3.0)]
    assert "head/Gemm" in {node[0].name for node in nodes}
    for turns in nodes:
        assert len(turns) == 3, "warm-ups are left out"
        assert begun - 1000 <= turns[0].start_ns <= turns[-1].end_ns <= ended, "cut down to microseconds"
    assert not list(in_empty_folder.glob("*.json"))
