"""native without a GPU: its file, what is refused and why, and all but its kernels on a false one."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from replk_deploy import backends, cli, pipeline, weights
from replk_deploy.backends import compiler, cuda, sidecar
from replk_deploy.backends.base import Recipe
from replk_deploy.backends.native import GRAPHS, TUNED, Native
from replk_deploy.batch import Batch
from replk_deploy.errors import CheckpointError, ContractError, Exit, IntegrityError, ReplkError, UnavailableError
from replk_deploy.files import sha256
from replk_deploy.kernels import layers, nvrtc, tuning
from replk_deploy.models.baselines import Timm, baseline
from replk_deploy.models.replknet import RepLKNet
from replk_deploy.precision import Precision
from replk_deploy.progress import silent
from replk_deploy.proof import cast
from tests import artefacts
from tests.artefacts import SIZE, Files, images
from tests.false_gpu import CAPABILITY, NAME, FalseGpu, without

TRITON, LAUNCH = compiler.triton, cuda.CudaLaunch  # as they are before a test plants a GPU


pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # inside inductor
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # inside inductor
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FalseGpu:
    """Plant a GPU on which layers are PyTorch's own; a graph that is replayed there runs again."""
    found = FalseGpu()
    found.install(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "triton", lambda _: {"triton": "3.7"})
    monkeypatch.setattr(cuda, "pinned", torch.clone)
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_decided", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda, "CudaLaunch", lambda run, on, **_: LAUNCH(run, graph=False, on=on))
    return found


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "available", lambda: False)


def built(files: Files, folder: Path, precision: Precision = "fp16", recipe: Recipe | None = None) -> Path:
    """Build a file with its sidecar."""
    source, path = files.file("weights", precision), folder / "m.native"
    made = Native.build(source, path, recipe or Recipe(), silent)
    sidecar.write(path, artefacts.describe_engine(Native, path, source, made, precision))
    return path


def resealed(path: Path, **changes: Any) -> Path:
    """Let the sidecar say something else, and its verdict speak of that."""
    said = dataclasses.replace(sidecar.read(path), **changes)
    sidecar.write(path, artefacts.sealed(said))
    return path


@pytest.mark.usefixtures("gpu")
def test_a_file_holds_weights_and_choices_and_says_for_which_gpu(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = layers.Large.forward

    def chosen(self: layers.Large, x: layers.Maps) -> layers.Maps:
        tuning.fastest((self.weight.shape[-1], x.images), ["the only way"], lambda _: None)
        return honest(self, x)

    monkeypatch.setattr(layers.Large, "forward", chosen)
    batches = tuple(Batch(min=1, opt=n, max=9) for n in (5, 2))
    path = built(files, tmp_path, recipe=Recipe(batches=batches))
    source = files.file("weights", "fp16")
    assert weights.header(path) == weights.header(source)
    assert weights.content_hash(weights.read(path)[0]) == weights.content_hash(weights.read(source)[0])
    answers = json.loads(weights.notes(path)[TUNED])
    assert answers == {f"({kernel}, {n})": "the only way" for kernel in (31, 29, 27, 13) for n in (2, 5)}
    said = sidecar.read(path)
    assert said.made_with == {"gpu": NAME, "compute_capability": "{}.{}".format(*CAPABILITY)}
    assert said.facts["tuned_for"] == "2, 5"
    assert said.facts["nvrtc"]
    assert (said.input.shape, said.input.dtype, said.outputs) == ((None, 3, None, None), "float16", ("logits",))
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_read", lambda _: {})
    with Native(path):
        assert tuning._known[NAME] == answers, "what was measured travels"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_it_answers_as_the_float64_network_does(precision: Precision, files: Files, tmp_path: Path) -> None:
    with Native(built(files, tmp_path, precision)) as network:
        answer = network(images(3))
        assert artefacts.error(answer) < artefacts.usual_error(precision)
        kept = answer["logits"].copy()
        assert not np.array_equal(network.run(images(3, seed=1))["logits"], kept)
        assert np.array_equal(answer["logits"], kept), "an answer is the caller's to keep"
        assert np.array_equal(network(images(3))["logits"], kept)
        launch = network.prepare(images(3))
        launch.enqueue()
        launch.wait()
        np.testing.assert_array_equal(launch.answers()[0], kept)
        assert network.precision == precision
        assert set(network.memory_mib) == {"weights", "peak"}


@pytest.mark.usefixtures("gpu")
def test_pixels_are_normalised_as_the_file_says_and_other_pixels_refused(files: Files, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    floats = artefacts.describe("fp16").preprocessing.normalise(pixels)
    with Native(built(files, tmp_path)) as network:
        expected, answer = network(floats)["logits"], network(pixels)["logits"]
        network(pixels[::-1].copy())
        assert np.abs(answer - expected).max() < 2e-3 * np.abs(expected).max(), "an answer is the caller's to keep"
        other = np.abs(network(255 - pixels)["logits"] - expected).max()
        assert other > 0.05 * np.abs(expected).max(), "the pixels decide"
        for wrong in (pixels[:0], pixels[0], pixels[..., :2], pixels.transpose(0, 3, 1, 2)):
            with pytest.raises(ReplkError, match="uint8 images are"):
                network(wrong)


@pytest.mark.usefixtures("gpu")
def test_each_way_of_asking_works_on_the_gpu_of_the_weights(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[torch.Tensor] = []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        chosen.append(tensor)
        yield
        chosen.pop()

    honest = layers.First.forward

    def forward(self: layers.First, x: torch.Tensor) -> layers.Maps:
        assert chosen, "the current GPU is of the thread, whoever opened the network"
        return honest(self, x)

    path = built(files, tmp_path)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(layers.First, "forward", forward)
    with Native(path) as network:
        network(images(1))
        network.layer_times(images(1), repeats=1)
    assert chosen == []


@pytest.mark.usefixtures("gpu")
def test_of_the_captured_graphs_the_last_used_are_kept(files: Files, tmp_path: Path) -> None:
    with Native(built(files, tmp_path)) as network:
        network(images(1))
        first = next(iter(network._captured.values()))
        for width in range(32, 32 * (GRAPHS + 1), 32):
            network(np.zeros((1, 3, 32, width), np.float32))
            network(images(1))
        assert len(network._captured) == GRAPHS
        assert first in network._captured.values(), "used again and again"
        assert {key[3] for key in network._captured} == {SIZE, *range(32 * (GRAPHS - 6), 32 * (GRAPHS + 1), 32)}
        network.close()
        network.close()
        for ask in (network, network.run, network.prepare):
            with pytest.raises(ContractError, match="closed"):
                ask(images(1))


@pytest.mark.usefixtures("gpu")
def test_a_file_that_is_not_what_its_sidecar_says_is_refused(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(files, tmp_path)
    Native(path).close()
    whole, record = path.read_bytes(), sidecar.place(path).read_bytes()
    for damage in (whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"replk.tuned", b"replk.tuneD"), whole[:999]):
        path.write_bytes(damage)
        with pytest.raises(IntegrityError, match="its hash differs"):
            Native(path)
    path.write_bytes(whole)
    sidecar.place(path).write_bytes(record.replace(b'"logits"', b'"logit5"'))
    with pytest.raises(IntegrityError, match="verdict speaks of"):
        Native(path)
    sidecar.place(path).unlink()
    with pytest.raises(IntegrityError, match="no sidecar"):
        Native(path)
    sidecar.place(path).write_bytes(record)
    with pytest.raises(IntegrityError, match="built for aoti"):
        Native(resealed(path, backend="aoti"))
    sidecar.place(path).write_bytes(record)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Another GPU")
    with pytest.raises(IntegrityError, match=f"gpu {NAME}, here Another GPU") as caught:
        Native(path)
    assert caught.value.code == Exit.INTEGRITY
    with pytest.raises(ReplkError, match="is not a file"):
        Native(tmp_path / "absent.native")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("choices", ["", "{", "[]", '{"a": 1}'])
def test_choices_that_nobody_could_have_written_are_refused(choices: str, files: Files, tmp_path: Path) -> None:
    path, other = built(files, tmp_path), tmp_path / "other.native"
    weights.annotate(path, other, {TUNED: choices})
    shutil.copy(sidecar.place(path), sidecar.place(other))
    said = dataclasses.replace(sidecar._sidecar(json.loads(sidecar.place(other).read_text())), sha256=sha256(other))
    sidecar.write(other, artefacts.sealed(said))
    with pytest.raises(IntegrityError, match="which kernels were chosen"):
        Native(other)


@pytest.mark.usefixtures("gpu")
def test_what_it_cannot_run_is_refused_before_anything_is_written(
    files: Files, tmp_path: Path, trained: RepLKNet
) -> None:
    def refused(path: Path, words: str) -> ReplkError:
        with pytest.raises(ReplkError, match=words) as caught:
            Native.build(path, tmp_path / "out.native", Recipe(), silent)
        assert not (tmp_path / "out.native").exists()
        return caught.value

    wrong = refused(files.file("weights", "fp32"), "is fp32, and native runs fp16 or bf16")
    assert wrong.remedy.endswith("replk export --weights --precision fp16")
    said = artefacts.describe("fp16")
    training = dataclasses.replace(said, form="training", geometry=trained.describe())
    weights.write(tmp_path / "training.safetensors", cast(trained, torch.float16), training)
    refused(tmp_path / "training.safetensors", "holds a training replknet, and native runs a folded RepLKNet")
    peer, rules = baseline("timm:test_resnet")
    header = dataclasses.replace(said, family="timm", geometry=peer.describe(), preprocessing=rules)
    weights.write(tmp_path / "timm.safetensors", cast(peer, torch.float16), header)
    refused(tmp_path / "timm.safetensors", "holds a folded timm")
    (tmp_path / "nonsense.safetensors").write_bytes(b"\x07" * 99)
    assert isinstance(refused(tmp_path / "nonsense.safetensors", "safetensors"), CheckpointError)


def test_it_runs_our_networks_alone_and_says_so() -> None:
    assert Native.families == {RepLKNet.family}
    assert Timm.family not in Native.families
    others = [backends.find(name) for name in backends.BACKENDS if name != Native.name]
    assert {kind.families for kind in others} == {None}


@pytest.mark.usefixtures("gpu")
def test_layers_are_named_as_in_the_network(files: Files, tmp_path: Path) -> None:
    with Native(built(files, tmp_path)) as network:
        found = network.layer_times(images(2), repeats=2)
    kinds = {layer.name: layer.kind for layer in found}
    assert kinds["stem.0.conv"] == "First"
    assert kinds["stages.0.blocks.0.large_kernel.lkb_reparam"] == "Large"
    assert list(kinds.values()).count("Pointwise") == 4 * 4 + 1 + 3  # two a block, the stem's, one a transition
    assert all(len(layer.samples_ms) == 2 for layer in found)


@pytest.mark.usefixtures("_no_gpu")
def test_without_a_gpu_it_says_so(files: Files, tmp_path: Path) -> None:
    source = files.file("weights", "fp16")
    for ask in (Native.probe, lambda: Native.build(source, tmp_path / "m.native", Recipe(), silent)):
        with pytest.raises(UnavailableError, match="native needs an NVIDIA GPU, and there is none") as caught:
            ask()
        assert caught.value.code == Exit.UNAVAILABLE
        assert "nvidia-smi" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_too_old_or_a_package_that_is_missing_is_one_sentence(
    gpu: FalseGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Native.probe() | {"gpu": NAME, "triton": "3.7"} == Native.probe()
    assert gpu.log == [], "asking takes no work"
    for package in ("cuda.core", "cuda.bindings", "triton"):
        with monkeypatch.context() as patch:
            nvrtc._cuda.cache_clear()
            without(patch, package)
            if package == "triton":
                patch.setattr(compiler, "triton", TRITON)
            with pytest.raises(UnavailableError, match="is not installed") as caught:
                Native.probe()
        assert caught.value.code == Exit.UNAVAILABLE
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UnavailableError, match=r"need compute capability 8\.0, and this GPU has 7\.5"):
        Native.probe()


@pytest.mark.usefixtures("_no_gpu", "short_timing")
def test_the_commands_explain_and_exit_with_5(checkpoint_file: Path, in_empty_folder: Path) -> None:
    pipeline.fuse(checkpoint_file)
    for command in (["build", "--backend", "native"], ["bench", "--backend", "native"]):
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == Exit.UNAVAILABLE, done.output
        assert "native needs an NVIDIA GPU" in done.output + done.stderr
        assert "Traceback" not in done.output + done.stderr
    assert not list(in_empty_folder.rglob("*.native"))
