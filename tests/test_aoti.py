"""AOTInductor packages: what a sidecar guards, what a build refuses, and a process that has none of our code."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from replk_deploy import backends
from replk_deploy.backends import aoti, compiler, cuda, sidecar
from replk_deploy.backends.aoti import Aoti
from replk_deploy.backends.base import Made, Recipe, Settings
from replk_deploy.backends.sidecar import Sidecar
from replk_deploy.batch import DYNAMIC, Batch
from replk_deploy.errors import CheckpointError, Exit, IntegrityError, ReplkError, UnavailableError
from replk_deploy.files import sha256
from replk_deploy.progress import silent
from tests import artefacts, false_gpu
from tests.artefacts import BATCH, SIZE, Files, images
from tests.false_gpu import FalseGpu, without

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # inside inductor
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # inside inductor
]
ALONE = """
import sys
sys.modules["replk_deploy"] = None
import numpy, torch, torch._inductor
package = torch._inductor.aoti_load_package(sys.argv[1])
(logits,) = package(torch.from_numpy(numpy.load(sys.argv[2])))
numpy.save(sys.argv[3], logits.numpy())
assert not [name for name in sys.modules if name.startswith("replk_deploy.")]
"""


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine be one without a GPU, unless a test plants a false one."""
    monkeypatch.setattr(cuda, "available", lambda: False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory)


@pytest.fixture
def package(files: Files, tmp_path: Path) -> Path:
    """Return a copy of a package with its sidecar."""
    source = files.file("aoti", "fp32")
    path = tmp_path / "model.pt2"
    shutil.copy(source, path)
    shutil.copy(sidecar.place(source), sidecar.place(path))
    return path


def rewrite(package: Path, **changes: object) -> None:
    sidecar.write(package, artefacts.sealed(dataclasses.replace(sidecar.read(package), **changes)))


def test_a_package_answers_where_none_of_our_code_is(package: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", images(3))
    script = tmp_path / "alone.py"
    script.write_text(ALONE, encoding="utf-8")
    command = [sys.executable, "-I", script, package, tmp_path / "images.npy", tmp_path / "logits.npy"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    logits = np.load(tmp_path / "logits.npy")
    assert artefacts.error({"logits": logits}) < artefacts.usual_error("fp32")
    with Aoti(package) as found:
        assert np.array_equal(found.run(images(3))["logits"], logits)


def test_what_a_package_would_misread_is_refused(package: Path) -> None:
    with Aoti(package) as found:
        assert found.batches == (BATCH,)
        assert found.input.shape == (None, 3, SIZE, SIZE)
        assert artefacts.error(found.run(images(BATCH.max))) < artefacts.usual_error("fp32")
        for wrong, words in (
            (images(BATCH.max + 1), f"built for {BATCH} images"),
            (images(2)[:, :, :32], "takes float32 images"),
            (images(2).astype(np.float64), "takes float32 images"),
        ):
            for ask in (found.run, found.prepare):
                with pytest.raises(ReplkError, match=words):
                    ask(wrong)


@pytest.mark.parametrize(
    ("key", "value"),
    [("torch", "2.9.0"), ("processor", "Another CPU"), ("instructions", "NEON"), ("unheard", "of")],
)
def test_a_package_that_was_built_elsewhere_is_not_opened(
    package: Path, key: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(package, made_with={**sidecar.read(package).made_with, key: value})
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(IntegrityError, match=f"built with {key} {value}, here ") as caught:
        Aoti(package)
    assert "replk build model.fp32.safetensors --backend aoti" in caught.value.remedy


def test_a_package_for_a_gpu_needs_one(package: Path) -> None:
    rewrite(package, made_with={"torch": torch.__version__, "device": "cuda", "compute_capability": "9.0"})
    with pytest.raises(UnavailableError, match="aoti needs an NVIDIA GPU"):
        Aoti(package)


@pytest.mark.parametrize("damage", ["missing", "no sidecar", "changed", "of another backend"])
def test_a_package_that_nothing_vouches_for_is_not_opened(
    damage: str, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_, **__: pytest.fail("it was opened"))
    if damage == "missing":
        package.unlink()
    elif damage == "no sidecar":
        sidecar.place(package).unlink()
    elif damage == "changed":
        package.write_bytes(package.read_bytes() + b"!")
    else:
        rewrite(package, backend="trt")
    with pytest.raises(ReplkError) as caught:
        Aoti(package)
    assert caught.value.code == (Exit.USAGE if damage == "missing" else Exit.INTEGRITY)
    assert "--backend" in caught.value.remedy


def test_a_package_that_does_not_open_is_told_in_pytorchs_words(package: Path) -> None:
    package.write_bytes(b"no package")
    record = sidecar.place(package).read_text(encoding="utf-8")
    said = sidecar._sidecar(json.loads(record))
    sidecar.write(package, artefacts.sealed(dataclasses.replace(said, sha256=sha256(package))))
    with pytest.raises(UnavailableError, match=r"cannot open .*zip archive") as caught:
        Aoti(package)
    assert caught.value.remedy == "build it again: replk build --backend aoti"


def test_a_package_without_its_ending_opens_without_a_word(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    part = package.with_name(".model.pt2.1.part")
    package.rename(part)
    sidecar.place(package).rename(sidecar.place(part))
    with Aoti(part) as found:
        assert artefacts.error(found.run(images(2))) < artefacts.usual_error("fp32")
    assert not caplog.records


def test_more_than_one_range_is_refused_before_anything_is_compiled(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aoti, "_package", lambda *_: pytest.fail("it was compiled"))
    recipe = Recipe(batches=(Batch.parse("1"), Batch.parse("8:64")))
    with pytest.raises(ReplkError, match="one range of batches, not 1, 8:64:64"):
        Aoti.build(files.file("weights", "fp32"), tmp_path / "out.pt2", recipe, silent)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Aoti.build(files.file("onnx", "fp32"), tmp_path / "out.pt2", Recipe(), silent)
    assert not list(tmp_path.iterdir())


def built(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str = "fp32", recipe: Recipe | None = None
) -> tuple[Made, Any, list[tuple[str, int, int | None]], list[bool]]:
    """Build all but the machine code; return also what would be compiled, the progress, and oneDNN's switch."""
    programs, told, onednn = [], [], []

    def package(program: torch.export.ExportedProgram, _out: Path) -> None:
        programs.append(program)
        onednn.append(torch.backends.mkldnn.enabled)

    monkeypatch.setattr(aoti, "_package", package)
    made = Aoti.build(
        files.file("weights", precision),
        tmp_path / "out.pt2",
        recipe or Recipe(),
        lambda step, done, total: told.append((step, done, total)),
    )
    return made, programs[0], told, onednn


@pytest.mark.parametrize(("batch", "taken"), [(None, DYNAMIC), ("2:3:9", "2:3:9"), ("5", "5")])
def test_the_program_takes_the_range_that_was_asked_for(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch: str | None, taken: object
) -> None:
    recipe = Recipe(batches=(Batch.parse(batch),)) if batch else Recipe()
    made, program, told, _ = built(files, monkeypatch, tmp_path, recipe=recipe)
    assert [str(b) for b in made.batches] == [str(taken)]
    assert made.input.shape == (5 if batch == "5" else None, 3, SIZE, SIZE)
    assert made.outputs == ("logits",)
    ranges = [(int(r.lower), int(r.upper)) for r in program.range_constraints.values()]
    assert ranges == ([] if batch == "5" else [(made.batches[0].min, made.batches[0].max)])
    assert told == [("build aoti", n, 2) for n in (0, 1, 2)]
    assert made.made_with["torch"] == torch.__version__
    assert made.made_with["device"] == "cpu"
    assert made.facts["compiler"]


def test_networks_that_stall_in_onednn_are_built_and_run_without_it(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: Path
) -> None:
    for precision, on in (("fp16", False), ("fp32", True)):
        made, _, _, switch = built(files, monkeypatch, tmp_path, precision)
        assert switch == [on]
        assert made.facts["onednn"] == ("on" if on else "off")
        rewrite(package, facts=made.facts)
        with Aoti(package) as found:
            found._loader = type("Loader", (), {"boxed_run": lambda _, x: [x[0] + torch.backends.mkldnn.enabled]})()
            assert found.run(np.zeros((1, 3, SIZE, SIZE), np.float32))["logits"].max() == on


def test_a_compiler_that_fails_is_told_and_nothing_is_left(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, package_path: str) -> None:
        Path(package_path).write_bytes(b"half")
        raise RuntimeError("planted\nand more")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", broken)
    with pytest.raises(UnavailableError, match="AOTInductor cannot compile: planted"):
        Aoti.build(files.file("weights", "fp32"), tmp_path / "out.pt2", Recipe(), silent)
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_it_says_what_to_install(files: Files, tmp_path: Path) -> None:
    for ask in (Aoti.probe, lambda: Aoti.build(files.file("weights", "fp32"), tmp_path / "o.pt2", Recipe(), silent)):
        words = pytest.raises(UnavailableError, match=r"AOTInductor needs a C\+\+ compiler.*apt-get install g\+\+")
        with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), words:
            ask()


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        ('g++ -static-libstdc++ "$@"', r"crashes beside PyTorch \(SIG(ABRT|SEGV)\)"),
        ('g++ "$@" -Dkernel=other', "does not open: AttributeError: .*kernel"),
    ],
)
def test_a_compiler_whose_work_takes_the_process_down_is_refused(
    plant: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "g++"
    script.write_text(f"#!/bin/sh\nexec {plant}\n", encoding="utf-8")
    script.chmod(0o755)
    with torch._inductor.config.patch({"cpp.cxx": (str(script),)}):
        with pytest.raises(UnavailableError, match=rf"AOTInductor: what the C\+\+ compiler builds {words}") as caught:
            Aoti.probe()
        assert compiler.of("cpu", "torch.compile"), "its kernels use nothing of the kind"
    assert caught.value.remedy.startswith("use torch-compile")
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FalseGpu:
    found = FalseGpu()
    found.install(monkeypatch)
    return found


def for_gpu(package: Path, **changes: str) -> Sidecar:
    made_with = {"torch": torch.__version__, "device": "cuda", "compute_capability": "9.0", **changes}
    rewrite(package, made_with=made_with)
    return sidecar.read(package)


@pytest.mark.parametrize("graph", [False, True])
def test_a_package_for_a_gpu_is_launched_as_eager_pytorch_is(
    package: Path, gpu: FalseGpu, graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    for_gpu(package)
    alone = []
    honest = torch._inductor.aoti_load_package

    def watched(path: str, *, run_single_threaded: bool) -> object:
        alone.append(run_single_threaded)
        return honest(path, run_single_threaded=run_single_threaded)

    monkeypatch.setattr(torch._inductor, "aoti_load_package", watched)
    with Aoti(package, Settings(cuda_graph=graph)) as found:
        assert (found.device, found.facts["gpu"]) == ("cuda", false_gpu.NAME)
        assert artefacts.error(found.run(images(3))) < artefacts.usual_error("fp32")
        launch = found.prepare(images(2))
        gpu.log.clear()
        launch.enqueue()
        launch.wait()
        assert ("replay" in gpu.log) == graph
        assert launch.device_ms() == false_gpu.TICK_MS
    assert alone == [True], "locks wait for the last inference, and cannot be captured"


def test_a_package_for_another_gpu_or_for_the_processor_is_told_apart(package: Path, gpu: FalseGpu) -> None:
    with Aoti(package) as found:
        assert found.device == "cpu", "a GPU that is there changes nothing for a package for the processor"
        assert not gpu.log
    with pytest.raises(UnavailableError, match="no CUDA graphs"):
        Aoti(package, Settings(cuda_graph=True))
    for_gpu(package, compute_capability="8.6")
    with pytest.raises(IntegrityError, match=r"compute_capability 8.6, here 9.0"):
        Aoti(package)


@pytest.mark.usefixtures("gpu")
def test_a_build_on_a_gpu_is_for_it(files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        without(patch, "triton")
        with pytest.raises(UnavailableError, match="triton is not installed"):
            built(files, monkeypatch, tmp_path)
    monkeypatch.setattr(compiler, "triton", lambda _: {"triton": "3.7"})
    made, _, _, _ = built(files, monkeypatch, tmp_path, "fp16")
    assert made.made_with == {"torch": torch.__version__, "device": "cuda", "compute_capability": "9.0"}
    assert made.facts["triton"] == "3.7"
    assert made.facts["compiler"]


def test_the_registry_knows_it() -> None:
    assert backends.find("aoti") is Aoti
