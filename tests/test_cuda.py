"""What the runtimes on a GPU share, on a false GPU: the order of streams, events and graphs, switches, words."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from replk_deploy import backends
from replk_deploy.backends import compiler, cuda
from replk_deploy.backends import torch as torch_runtime
from replk_deploy.backends.base import Settings
from replk_deploy.backends.cuda import CudaLaunch
from replk_deploy.errors import ContractError, Exit, UnavailableError
from tests import artefacts, false_gpu
from tests.artefacts import Files, images
from tests.false_gpu import FalseGpu, without

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # inside inductor
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # inside inductor
]
DEFAULTS = {"conv": True, "matmul": False, "search": False}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FalseGpu:
    found = FalseGpu()
    found.install(monkeypatch)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory)


def switches() -> dict[str, bool]:
    return {
        "conv": torch.backends.cudnn.allow_tf32,
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "search": torch.backends.cudnn.benchmark,
    }


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(cuda, "available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", absent)


@pytest.mark.usefixtures("_no_gpu")
def test_without_a_gpu_the_processor_is_chosen_and_a_gpu_refused_in_pytorchs_words() -> None:
    assert cuda.choose(Settings(), "torch") == cuda.choose(Settings(device="cpu"), "torch") == "cpu"
    for settings, words in (
        (Settings(device="cuda"), "torch needs an NVIDIA GPU.*not compiled with CUDA"),
        (Settings(cuda_graph=True), "no CUDA graphs"),
        (Settings(device="cpu", cuda_graph=True), "no CUDA graphs"),
    ):
        with pytest.raises(UnavailableError, match=words) as caught:
            cuda.choose(settings, "torch")
        assert caught.value.code == Exit.UNAVAILABLE
        assert "nvidia-smi" in caught.value.remedy or "--cuda-graph" in caught.value.remedy


@pytest.mark.usefixtures("gpu")
def test_with_a_gpu_it_is_chosen_unless_the_processor_is_asked_for() -> None:
    assert cuda.choose(Settings(), "torch") == cuda.choose(Settings(device="cuda", cuda_graph=True), "torch") == "cuda"
    assert cuda.choose(Settings(device="cpu"), "torch") == "cpu"
    facts = cuda.facts()
    assert (facts["gpu"], facts["compute_capability"], facts["cuda"]) == (false_gpu.NAME, "9.0", "13.0")


@pytest.mark.parametrize("tf32", [True, False])
def test_both_kinds_of_product_obey_one_switch_which_is_put_back(tf32) -> None:
    before = switches()
    with cuda.arithmetic(tf32=tf32):
        assert switches() == {"conv": tf32, "matmul": tf32, "search": True}
        assert torch.backends.cudnn.conv.fp32_precision == ("tf32" if tf32 else "none")
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if tf32 else "ieee")
        with cuda.arithmetic(tf32=not tf32):  # another file, open at the same time
            assert switches()["conv"] is not tf32
        assert switches()["conv"] is tf32
    assert switches() == before
    with pytest.raises(RuntimeError, match="planted"), cuda.arithmetic(tf32=tf32):
        raise RuntimeError("planted")
    assert switches() == before


def counting() -> tuple[Callable[[], int], list[int]]:
    calls: list[int] = []

    def run() -> int:
        calls.append(len(calls) + 1)
        return len(calls)

    return run, calls


def test_a_launch_runs_between_two_events_on_its_stream(gpu: FalseGpu) -> None:
    run, calls = counting()
    launch = CudaLaunch(run, graph=False)
    assert not calls
    for _ in range(2):
        launch.enqueue()
    launch.wait()
    assert gpu.log == ["on stream 1", "event", "event", "off"] * 2 + ["stream 1 idle"]
    assert (launch.answer, launch.device_ms()) == (2, false_gpu.TICK_MS)


def test_a_graph_is_captured_after_uncaptured_runs_and_only_replayed_then(gpu: FalseGpu) -> None:
    run, calls = counting()
    stream = cuda.stream()
    launch = CudaLaunch(run, graph=True, on=stream)
    assert gpu.log == ["on stream 1", "off", "stream 1 idle", "on stream 1", "capture on stream 1", "captured", "off"]
    assert len(calls) == cuda.WARM_UPS + 1
    gpu.log.clear()
    for _ in range(2):
        launch.enqueue()
    launch.wait()
    assert gpu.log == ["on stream 1", "event", "replay", "event", "off"] * 2 + ["stream 1 idle"]
    assert len(calls) == cuda.WARM_UPS + 1
    assert launch.answer == cuda.WARM_UPS + 1, "the outputs are those of the capture, which each replay fills"


def test_a_buffer_of_twice_the_cache_is_written_over_and_waited_for(
    gpu: FalseGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    erase, made, zeros = cuda.Eraser(), [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: made.append(zeros(*args, **kwargs)) or made[-1])
    assert gpu.log == []
    for count in (1, 2):
        erase()
        (buffer,) = made
        assert buffer.nbytes == 2 * false_gpu.L2_BYTES
        assert set(buffer.tolist()) == {count}
    assert gpu.log == ["default idle"] * 2
    gpu.failure = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(UnavailableError, match="empty the L2 cache"):
        erase()


@pytest.mark.usefixtures("gpu")
def test_a_launch_that_never_ran_has_no_answer() -> None:
    launch = CudaLaunch(lambda: 1, graph=True)
    for ask in (lambda: launch.answer, launch.device_ms):
        with pytest.raises(ContractError, match="before it ran"):
            ask()


@pytest.mark.parametrize("calls", range(1, cuda.WARM_UPS + 2))
def test_a_capture_that_fails_leaves_the_current_stream_as_it_was(gpu: FalseGpu, calls: int) -> None:
    before, streams = gpu.current, []

    def run() -> None:
        streams.append(gpu.current)
        if len(streams) == calls:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(UnavailableError, match="capture a CUDA graph"):
        CudaLaunch(run, graph=True)
    assert gpu.current is before
    assert {stream.name for stream in streams} == {"stream 1"}
    CudaLaunch(lambda: 1, graph=True)
    assert gpu.current is before


@pytest.mark.parametrize(
    ("failure", "words", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "too little memory.*9 GiB", "--batch"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "illegal", "start again"),
        (RuntimeError("CUDA error: device-side assert triggered\nCompile with X"), "assert triggered$", "start again"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "EXECUTION_FAILED", "nvidia-smi"),
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), "captur", "--cuda-graph"),
    ],
)
def test_a_failing_gpu_is_told_with_what_to_do(gpu: FalseGpu, failure: Exception, words: str, remedy: str) -> None:
    def run() -> None:
        raise failure

    launch = CudaLaunch(run, graph=False)
    for ask in (launch.enqueue, lambda: CudaLaunch(run, graph=True)):
        with pytest.raises(UnavailableError, match=remedy) as caught:
            ask()
        assert caught.match(words.removesuffix("$"))
        assert "Compile with" not in caught.value.problem
    gpu.failure = failure  # most failures of a GPU show only when it is waited for
    with pytest.raises(UnavailableError, match=remedy):
        launch.wait()


@pytest.mark.usefixtures("gpu")
def test_what_is_no_failure_of_the_gpu_passes() -> None:
    for error in (RuntimeError("shape mismatch"), ValueError("CUDA error, says a value")):

        def run(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error), match=str(error)):
            CudaLaunch(run, graph=False).enqueue()


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_torch_answers_and_launches_through_the_gpu(
    gpu: FalseGpu, files: Files, precision: str, graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.file("weights", precision)
    artefacts.truth(3)
    seen = []
    honest = torch.nn.Conv2d.forward

    def watched(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        seen.append(switches())
        return honest(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    if precision == "fp16":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # see onednn.py: a GPU has no such stall
    with files.opened("torch", precision, Settings(cuda_graph=graph, layout="nchw")) as found:
        assert (found.device, found.facts["device"], found.facts["gpu"]) == ("cuda", "cuda", false_gpu.NAME)
        assert found.facts["tf32"] == ("allowed" if precision == "tf32" else "forbidden")
        assert found.facts["cuda_graph"] == ("on" if graph else "off")
        assert (found.facts["layout"], found.facts["layout_probe"]) == ("channels_first", "asked for")
        assert found.memory_mib["peak"] == false_gpu.PEAK_MIB
        assert artefacts.error(found.run(images(3))) < artefacts.usual_error(precision)
        launch = found.prepare(images(2))
        gpu.log.clear()
        launch.enqueue()
        launch.wait()
        assert ("replay" in gpu.log) == graph
        assert gpu.log[-1] == "stream 1 idle"
        assert launch.device_ms() == false_gpu.TICK_MS
    assert gpu.streams == 1, "inferences that follow each other share one stream"
    tf32 = precision == "tf32"
    assert all(s == {"conv": tf32, "matmul": tf32, "search": True} for s in seen)
    assert seen
    assert switches() == DEFAULTS


def test_a_launch_does_not_see_what_happens_to_its_array(gpu: FalseGpu, files: Files) -> None:
    with files.opened("torch", "fp32", Settings(layout="nchw")) as found:
        batch = images(2)
        launch = found.prepare(batch)
        batch[:] = 0
        launch.enqueue()
        assert artefacts.error({"logits": launch.answer[0].numpy()}) < artefacts.usual_error("fp32")
    assert gpu.log.index("default idle") < gpu.log.index("on stream 1"), "copied before another stream reads"


def test_layouts_are_compared_with_an_idle_gpu_at_both_ends_unless_a_kernel_is_large(
    gpu: FalseGpu, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    with files.opened("torch", "fp32") as found:
        assert (found.facts["layout"], "large" in found.facts["layout_probe"]) == ("channels_first", True)
        assert "device idle" not in gpu.log
    monkeypatch.setattr(torch_runtime, "has_large_kernels", lambda _model: False)
    with files.opened("torch", "fp32") as found:
        assert "batch 1, 64x64" in found.facts["layout_probe"]
        assert gpu.log.count("device idle") == 2 * (1 + 2 * 3), "no look at the clock between layers"


def test_layers_are_timed_between_events_behind_a_head_start(gpu: FalseGpu, files: Files) -> None:
    with files.opened("torch", "fp32", Settings(layout="nhwc")) as found:
        gpu.log.clear()
        layers = found.layer_times(images(2), repeats=4)
    assert [e for e in gpu.log if e != "event"] == [
        "default idle",
        *[f"sleep {cuda.HEAD_START_CYCLES}", "device idle"] * 5,
    ]
    assert all(layer.samples_ms == (false_gpu.TICK_MS,) * 4 for layer in layers if layer.kind == "Conv2d")
    assert {layer.detail for layer in layers} == {"channels_last"}


@pytest.mark.parametrize(("graph", "layout"), [(False, "nchw"), (True, "auto")])
def test_torch_compile_is_graphed_from_outside_and_moves_no_large_kernel_to_channels_last(
    gpu: FalseGpu, files: Files, graph, layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    from replk_deploy.backends import torch_compile

    monkeypatch.setattr(compiler, "of", lambda device, _name: {"triton": f"for {device}"})
    patches = []
    honest = torch_compile.compile_fx

    def watched(*args: object, config_patches: dict[str, object]) -> object:
        patches.append(config_patches)
        return honest(*args, config_patches=config_patches)

    monkeypatch.setattr(torch_compile, "compile_fx", watched)
    with files.opened("torch-compile", "fp32", Settings(cuda_graph=graph, layout=layout)) as found:
        assert found.facts["layout_optimization"] == "off"
        assert found.facts["triton"] == "for cuda"
        assert (found.facts["shapes"], found.facts["mode"]) == ("static", "default")
        assert artefacts.error(found.run(images(3))) < artefacts.usual_error("fp32")
        launch = found.prepare(images(3))
        gpu.log.clear()
        launch.enqueue()
        assert ("replay" in gpu.log) == graph
    assert patches == [{"triton.cudagraphs": False, "layout_optimization": False}], "compiled once, for one shape"
    assert switches() == DEFAULTS


@pytest.mark.usefixtures("gpu")
def test_inductor_chooses_the_layout_of_a_network_whose_large_kernels_are_lowered(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    from replk_deploy import lower
    from replk_deploy.models.replknet import RepLKNet

    monkeypatch.setattr(compiler, "of", lambda device, _name: {"triton": f"for {device}"})
    sites = lower.find_network(RepLKNet.empty(artefacts.GEOMETRY, "folded"), (artefacts.SIZE, artefacts.SIZE))
    forms = tuple((site.name, "grouped") for site in sites)
    for given, said in ((forms, "inductor's choice"), (forms[1:], "off")):
        with files.opened("torch-compile", "fp32", Settings(forms=given)) as found:
            assert found.facts["layout_optimization"] == said


def test_a_failure_while_a_gpu_compiles_is_the_compilers(
    gpu: FalseGpu, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "triton")
    assert gpu.log == []
    with pytest.raises(UnavailableError, match="triton is not installed") as caught:
        files.opened("torch-compile", "fp32")
    assert caught.value.remedy == "pip install 'triton'"
    with files.opened("torch-compile", "fp32", Settings(device="cpu")) as found:
        assert found.facts["compiler"], "the processor needs no triton"


def test_a_triton_that_cannot_compile_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Triton:
        __version__ = "3.7"

    monkeypatch.setattr(compiler.optional, "load", lambda *_, **__: Triton)
    with pytest.raises(UnavailableError, match=r"triton 3\.7 cannot compile for this GPU"):
        compiler.of("cuda", "torch.compile")
    monkeypatch.setattr(compiler, "has_triton", lambda: True)
    assert compiler.of("cuda", "torch.compile") == {"triton": "3.7"}


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize("name", ["torch", "torch-compile"])
def test_a_gpu_that_is_asked_for_and_missing_is_no_run_on_the_processor(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=f"{name} needs an NVIDIA GPU"):
        backends.find(name)(tmp_path / "any", Settings(device="cuda"))


@pytest.mark.usefixtures("gpu")
def test_images_are_placed_as_they_are_unless_told() -> None:
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    assert torch.equal(cuda.place(pixels), torch.from_numpy(pixels))
    there = cuda.place(images(1)[:, :, ::-1], torch.float16, torch.channels_last)
    assert there.dtype == torch.float16
    assert there.is_contiguous(memory_format=torch.channels_last)
