"""One contract for every runtime, and the wrong question as often as the right one."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from replk_deploy import backends, bench
from replk_deploy.backends import cuda
from replk_deploy.backends.base import Array, Backend, Engine, Settings
from replk_deploy.errors import ContractError, Exit, ReplkError, UnavailableError
from replk_deploy.precision import TOLERANCES, Precision
from tests import artefacts
from tests.artefacts import SIZE, Files, images

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # inside inductor
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # inside inductor
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # inside torch.export, torch 2.13
]

CASES: list[tuple[str, Precision]] = [  # each is executed wherever these tests run
    ("torch", "fp32"),
    ("torch", "tf32"),
    ("torch", "fp16"),
    ("torch", "bf16"),
    ("torch-compile", "fp32"),
    ("ort-cpu", "fp32"),
    ("ort-cpu", "tf32"),
    ("ort-cpu", "fp16"),
    ("openvino", "fp32"),
    ("openvino", "fp16"),
    ("aoti", "fp32"),
]
ON_A_GPU: list[tuple[str, Precision]] = [
    ("ort-cuda", "fp32"),
    ("ort-cuda", "fp16"),
    ("ort-trt", "fp16"),
    ("trt", "fp32"),
    ("trt", "fp16"),
    ("trt-rtx", "fp16"),
    ("native", "fp16"),
    ("native", "bf16"),
]


def refusal(name: str) -> UnavailableError | None:
    """Return why a backend cannot run here; None when it can."""
    try:
        backends.find(name).probe()
    except UnavailableError as exc:
        return exc
    return None


ABSENT = {name: why for name in dict(ON_A_GPU) if (why := refusal(name))}
HERE = [*CASES, *(case for case in ON_A_GPU if case[0] not in ABSENT)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory)


@pytest.fixture(scope="module", params=HERE, ids="-".join)
def backend(request: pytest.FixtureRequest, files: Files) -> Backend:
    with files.opened(*request.param) as found:
        yield found


def test_every_backend_is_held_to_the_contract_or_says_what_it_lacks() -> None:
    assert {name for name, _ in CASES} | {name for name, _ in ON_A_GPU} == set(backends.BACKENDS)
    for name in backends.BACKENDS:
        kind = backends.find(name)
        assert kind.name == name
        assert {p for n, p in (*CASES, *ON_A_GPU) if n == name} <= kind.precisions
        assert not issubclass(kind, Engine) or kind.suffix.startswith(".")
    for name in dict(HERE):
        assert all(isinstance(value, str) for value in backends.find(name).probe().values())


@pytest.mark.parametrize("name", dict(ON_A_GPU))
def test_what_cannot_run_here_says_what_to_install_or_to_buy(name: str, files: Files) -> None:
    if name in ABSENT:
        assert ABSENT[name].code == Exit.UNAVAILABLE
        assert any(words in ABSENT[name].remedy for words in ("pip install", "nvidia-smi", "NVIDIA")), ABSENT[name]
    else:
        assert name in {n for n, _ in HERE}, "what can run is tested"
    if name.startswith("ort") and name in ABSENT:
        with pytest.raises(UnavailableError):
            files.opened(name, "fp16")


def test_the_answer_is_that_of_the_float64_network(backend: Backend) -> None:
    answer = backend.run(images(3))  # one shape throughout: torch-compile compiles for each
    truth = artefacts.truth(3)
    assert tuple(answer) == backend.outputs == ("logits",)
    assert (answer["logits"].dtype, answer["logits"].shape) == (np.float32, truth.shape)
    assert artefacts.error(answer) < artefacts.usual_error(backend.precision)
    limit = TOLERANCES[backend.precision].limit
    assert np.linalg.norm(truth[0] - truth[1]) > 2 * limit * np.linalg.norm(truth[0])  # swapped rows would show


def test_the_precision_is_that_of_the_file(files: Files) -> None:
    for name, precision in HERE:
        with files.opened(name, precision) as found:
            assert found.precision == precision


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
    if backend.device == "cpu":  # a ratio between two of them compares no threads
        assert backend.facts["threads"] == str(torch.get_num_threads()) == "1"
    if backend.name in {"torch", "torch-compile"}:
        assert backend.facts["layout"] in {"channels_first", "channels_last"}
        assert "batch 1, 64x64" in backend.facts["layout_probe"]


def test_layers_are_timed_or_refused_with_another_way(backend: Backend) -> None:
    if backend.name not in {"torch", "ort-cpu", "openvino", "trt", "trt-rtx", "native"}:
        with pytest.raises(UnavailableError, match="profile"):
            backend.layer_times(images(3), repeats=2)
        return
    layers = backend.layer_times(images(3), repeats=2)
    assert layers
    assert all(layer.name and layer.kind and len(layer.samples_ms) == 2 for layer in layers)
    with pytest.raises(ReplkError, match="takes float32 images"):
        backend.layer_times(images(1).astype(np.float64), repeats=1)


@pytest.mark.parametrize("name", ["torch", "torch-compile", "ort-cpu", "openvino", "aoti"])
def test_a_closed_backend_does_not_answer(name: str, files: Files) -> None:
    closed = files.opened(name, "fp32")
    closed.close()
    closed.close()
    for ask in (closed.run, closed.prepare):
        with pytest.raises(ContractError, match="closed"):
            ask(images(1))


@pytest.mark.parametrize("name", ["torch", "torch-compile", "ort-cpu", "openvino"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "garbage", "the other kind", "a folder"])
def test_a_file_that_cannot_be_taken_is_refused_with_a_remedy(
    name: str, damage: str, files: Files, tmp_path: Path
) -> None:
    kind = backends.find(name).takes
    whole = files.file(kind, "fp32").read_bytes()
    path = tmp_path / "file"
    if damage == "a folder":
        path = tmp_path
    elif damage == "the other kind":
        path = files.file("onnx" if kind == "weights" else "weights", "fp32")
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut short": whole[: len(whole) // 2], "garbage": b"\x07nonsense" * 99}[damage])
    with pytest.raises(ReplkError) as caught:
        backends.find(name)(path)
    assert caught.value.code == Exit.USAGE
    assert caught.value.remedy


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine be one without a GPU."""
    monkeypatch.setattr(cuda, "available", lambda: False)


@pytest.fixture
def _forgetful() -> Iterator[None]:
    """Make Dynamo forget the frames that a test has made it skip."""
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forgetful")
def test_torch_compile_that_is_switched_off_is_no_silent_eager_run(files: Files) -> None:
    with files.opened("torch-compile", "fp32") as found, torch._dynamo.config.patch(disable=True):
        with pytest.raises(UnavailableError, match=r"eagerly|no compiled frames"):
            found.run(images(3))
        with pytest.raises(UnavailableError, match="switched off"):
            files.opened("torch-compile", "fp32")


def test_a_planted_eager_fallback_is_noticed(monkeypatch: pytest.MonkeyPatch, files: Files) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    with files.opened("torch-compile", "fp32") as found, pytest.raises(UnavailableError, match="eagerly"):
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
        files.opened("torch-compile", "fp32") as found,
        pytest.raises(UnavailableError, match="planted"),
    ):
        found.run(images(1))


@pytest.mark.usefixtures("_no_gpu")
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


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["torch", "torch-compile"])
def test_a_layout_that_is_asked_for_is_not_measured(name: str, layout: str, files: Files) -> None:
    with files.opened(name, "fp32", Settings(layout=layout)) as found:
        assert found.facts["layout"] == {"nchw": "channels_first", "nhwc": "channels_last"}[layout]
        assert found.facts["layout_probe"] == "asked for"
        batch = found._copy_in(images(2))
        assert batch.is_contiguous(memory_format=torch.channels_last) == (layout == "nhwc")
        if name == "torch-compile":
            assert found.facts["layout_optimization"] == {"nchw": "off", "nhwc": "forced"}[layout]


@pytest.mark.usefixtures("_no_gpu")
def test_the_layers_of_eager_pytorch_are_its_modules(files: Files) -> None:
    with files.opened("torch", "fp32") as found:
        layers = found.layer_times(images(2), repeats=3)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in found._model.modules()), "nothing stays"
        answer = found.run(images(3))
    modules = dict(artefacts.network().named_modules())
    kinds = {layer.name: layer.kind for layer in layers}
    assert len(kinds) == len(layers)
    assert all(type(modules[name]).__name__ == kind for name, kind in kinds.items())
    assert {n for n, m in modules.items() if isinstance(m, torch.nn.Conv2d)} <= kinds.keys()
    assert "Identity" not in kinds.values()
    assert layers[0].name == "stem.0.conv"
    assert layers[-1].name == "head"
    assert all(len(layer.samples_ms) == 3 and min(layer.samples_ms) > 0 for layer in layers)
    assert artefacts.error(answer) < artefacts.usual_error("fp32")


def test_a_module_that_runs_twice_counts_once_with_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    from replk_deploy.backends import leaves

    class Clock:
        now = 0

        def perf_counter_ns(self) -> int:
            return self.now

    class Slow(torch.nn.Module):
        def __init__(self, ms: int) -> None:
            super().__init__()
            self.ms = ms

        def forward(self, x: int) -> int:
            clock.now += self.ms * 10**6 * x
            return x

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.inner, self.last = Slow(9), torch.nn.Sequential(Slow(1), Slow(2)), Slow(4)

        def forward(self, x: int) -> int:
            clock.now += 10**9  # what is no module
            return self.last(self.inner(self.inner(x)))

    clock = Clock()
    monkeypatch.setattr(leaves, "time", clock)
    model, runs = Twice(), iter((100, 1, 3))
    layers = leaves.leaf_times(model, lambda: model(next(runs)), device="cpu", repeats=2, detail="d")
    assert [(layer.name, layer.samples_ms) for layer in layers] == [
        ("inner.0", (2.0, 6.0)),
        ("inner.1", (4.0, 12.0)),
        ("last", (4.0, 12.0)),
    ]


@pytest.mark.usefixtures("_no_gpu")
def test_the_weights_held_are_told(files: Files) -> None:
    bytes_held = sum(p.numel() for p in artefacts.network().parameters()) * 4
    with files.opened("torch", "fp32") as found:
        assert found.memory_mib == {"weights": bytes_held / 2**20}
    assert found.memory_mib == {"weights": 0}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("tensorrt", "trt"),
        ("torchcompile", "torch-compile"),
        ("ortcpu", "ort-cpu"),
        ("onnxruntime-gpu", "ort-cuda"),
        ("open-vino", "openvino"),
        ("aotinductor", "aoti"),
    ],
)
def test_an_unknown_name_gets_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ReplkError, match=f"did you mean {meant}") as caught:
        backends.find(typed)
    assert caught.value.code == Exit.USAGE
    assert all(name in caught.value.remedy for name in backends.BACKENDS)
