"""TensorRT-RTX builds real plans here; TensorRT is a double; what neither can show is held against its listings."""

import ast
import dataclasses
import errno
import functools
import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from replk_deploy import build, files, graph, optional
from replk_deploy.backends import cuda, sidecar, trt, trt_library, trt_run
from replk_deploy.backends.base import Made, Recipe, Settings
from replk_deploy.backends.trt import TensorRT, TensorRTRTX
from replk_deploy.batch import Batch
from replk_deploy.errors import ContractError, Exit, IntegrityError, ReplkError, UnavailableError
from replk_deploy.export import export
from replk_deploy.fuse import fuse
from replk_deploy.metadata import Metadata
from replk_deploy.models.base import Network
from replk_deploy.models.replknet import VARIANTS, RepLKNet
from replk_deploy.precision import PRECISIONS, Precision
from replk_deploy.preprocess import HALF, Preprocessing
from replk_deploy.progress import silent
from tests import trt_double

HERE = Path(__file__).parent
SIZE = 64
RANGE = Batch(min=1, opt=2, max=4)
SM = {"8.0": 1, "8.6": 2, "8.9": 3, "12.0": 4}  # bit in byte 32 of a plan of 1.7.1, seen and not documented
DEFAULT_TARGETS = 0x7E  # likewise


# --- files


def describe(network: Network, precision: Precision, batch: Batch) -> Metadata:
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
        batch=str(batch),
    )


Written = Callable[..., Path]


@pytest.fixture(scope="module")
def written(trained: RepLKNet, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Export the small network once for each type; tf32 and a fixed batch are other words in the same file."""
    folder, network = tmp_path_factory.mktemp("onnx"), fuse(trained).model

    @functools.cache
    def file(precision: Precision, batch: Batch = RANGE) -> Path:
        path = folder / f"model.{precision}.{str(batch).replace(':', '-')}.onnx"
        if batch == RANGE and precision != "tf32":
            export(network, path, precision=precision, size=(SIZE, SIZE), batch=batch)
        else:
            model = onnx.load(file("fp32" if precision == "tf32" else precision))
            if not batch.dynamic:
                model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch.max
            onnx.save(model, path)
        graph.seal(path, describe(network, precision, batch))
        return path

    for precision in ("fp32", "fp16", "bf16"):
        file(precision)  # now, since the exporter does not work under a false GPU
    return file


def foreign(
    path: Path,
    nodes: list[onnx.NodeProto],
    *,
    shape: list[object] = ["n", 3, 8, 8],  # noqa: B006  # never changed
    kind: int = TensorProto.FLOAT,
    out: tuple[int, list[object]] = (TensorProto.FLOAT, ["n", 3, 8, 8]),
    weights: Mapping[str, Any] | None = None,
) -> Path:
    """Write a file of somebody else, from `x` to `y`."""
    ports = helper.make_tensor_value_info("x", kind, shape), helper.make_tensor_value_info("y", *out)
    initializers = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    drawn = helper.make_graph(nodes, "foreign", [ports[0]], [ports[1]], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("odd", 1)]
    onnx.save(helper.make_model(drawn, opset_imports=opsets, ir_version=10), path)
    return path


def relu(path: Path, **changes: Any) -> Path:
    return foreign(path, [helper.make_node("Relu", ["x"], ["y"], name="only")], **changes)


# --- TensorRT-RTX itself


def rtx(source: Path, out: Path, **choices: Any) -> Made:
    return TensorRTRTX.build(source, out, Recipe(**choices), silent)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rtx_builds_each_precision_from_what_the_file_says(
    precision: Precision, written: Written, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = rtx(written(precision), tmp_path / "model.plan")
    dtype = {"fp16": "float16", "bf16": "bfloat16"}.get(precision, "float32")
    assert (made.input.name, made.input.dtype, made.input.shape) == ("images", dtype, (None, 3, SIZE, SIZE))
    assert (made.outputs, made.batches) == (("logits",), (RANGE,))
    assert made.facts["tf32"] == ("on" if precision == "tf32" else "off")
    assert made.facts["level"] == "3"
    assert set(made.made_with) == {"tensorrt_rtx", "platform"}
    assert all(isinstance(value, str) for value in (*made.facts.values(), *made.made_with.values()))
    assert made.absent == "no NVIDIA GPU here"
    plan = (tmp_path / "model.plan").read_bytes()
    assert plan[:4] == b"vtrt"
    assert plan[32] == DEFAULT_TARGETS
    weights = sum(onnx.numpy_helper.to_array(t).nbytes for t in onnx.load(written(precision)).graph.initializer)
    assert weights < len(plan)
    assert [path.name for path in tmp_path.iterdir()] == ["model.plan"]
    assert capfd.readouterr().out == ""


def test_rtx_builds_for_the_gpus_that_are_named(written: Written, tmp_path: Path) -> None:
    for targets in (("8.9",), ("8.6", "8.9", "12.0"), ("12.0", "8.0", "12.0")):
        made = rtx(written("fp16"), tmp_path / "model.plan", compute_capabilities=targets)
        assert made.facts["compute_capabilities"] == ", ".join(dict.fromkeys(targets))
        assert (tmp_path / "model.plan").read_bytes()[32] == sum(1 << SM[target] for target in set(targets))


def test_rtx_names_the_gpus_that_it_cannot_build_for(written: Written, tmp_path: Path) -> None:
    words = r"capability 9\.0, 10\.0 .*7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1.*--backend trt"
    with pytest.raises(UnavailableError, match=words):
        rtx(written("fp16"), tmp_path / "model.plan", compute_capabilities=("8.9", "9.0", "10.0"))
    assert not list(tmp_path.iterdir())


def test_rtx_says_which_type_a_gpu_lacks(written: Written, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"sm75, because the model contains HW-specific datatypes: b16"):
        rtx(written("bf16"), tmp_path / "model.plan", compute_capabilities=("7.5",))
    assert not list(tmp_path.iterdir())


def test_rtx_builds_two_profiles_into_a_larger_plan(written: Written, tmp_path: Path) -> None:
    one, two = (Batch.parse("2:4:8"),), (Batch.parse("1"), Batch.parse("2:4:8"))
    assert rtx(written("fp16"), tmp_path / "one.plan", batches=one).batches == one
    assert rtx(written("fp16"), tmp_path / "two.plan", batches=two).batches == two
    assert (tmp_path / "two.plan").stat().st_size > 1.5 * (tmp_path / "one.plan").stat().st_size


def test_rtx_builds_a_fixed_batch_and_no_other(written: Written, tmp_path: Path) -> None:
    pair = Batch.parse("2")
    for asked in ((), (pair,)):
        made = rtx(written("fp32", pair), tmp_path / "model.plan", batches=asked)
        assert (made.input.shape, made.batches) == ((2, 3, SIZE, SIZE), (pair,))
    before = (tmp_path / "model.plan").read_bytes()
    with pytest.raises(ReplkError, match=r"takes 2 images at a time .* 1:2:4 .*--batch 1:2:4"):
        rtx(written("fp32", pair), tmp_path / "model.plan", batches=(pair, RANGE))
    assert (tmp_path / "model.plan").read_bytes() == before


def test_a_foreign_file_is_built_for_the_range_that_is_given(tmp_path: Path) -> None:
    source = relu(tmp_path / "foreign.onnx")
    with pytest.raises(ReplkError, match=r"does not say its range.*--batch MIN:OPT:MAX"):
        rtx(source, tmp_path / "model.plan")
    made = rtx(source, tmp_path / "model.plan", batches=(RANGE,))
    assert (made.input.shape, made.batches, made.outputs) == ((None, 3, 8, 8), (RANGE,), ("y",))


def test_pictures_of_bytes_are_taken_when_they_are_cast_first(tmp_path: Path) -> None:
    cast = helper.make_node("Cast", ["x"], ["floats"], name="cast", to=TensorProto.FLOAT)
    turn = helper.make_node("Transpose", ["floats"], ["y"], name="turn", perm=[0, 3, 1, 2])
    source = foreign(tmp_path / "bytes.onnx", [cast, turn], shape=["n", 8, 8, 3], kind=TensorProto.UINT8)
    made = rtx(source, tmp_path / "model.plan", batches=(RANGE,))
    assert (made.input.dtype, made.input.shape) == ("uint8", (None, 8, 8, 3))


def test_settings_are_read_back(written: Written, tmp_path: Path) -> None:
    assert rtx(written("fp32"), tmp_path / "model.plan", level=5, workspace_mib=512).facts["level"] == "5"
    for level, kept in ((-1, 3), (9, 5)):
        with pytest.raises(ReplkError, match=f"refuses optimisation level {level} and keeps {kept}"):
            rtx(written("fp32"), tmp_path / "other.plan", level=level)
    with pytest.raises(UnavailableError, match="no tactics to implement the operation within workspace limit"):
        rtx(written("fp32"), tmp_path / "other.plan", workspace_mib=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.plan"]


@pytest.mark.parametrize("choice", ["timing_cache", "hardware", "version_compatible"])
def test_rtx_takes_no_choice_that_would_do_nothing(choice: str, written: Written, tmp_path: Path) -> None:
    value = {"timing_cache": tmp_path / "cache", "hardware": "ampere-plus", "version_compatible": True}[choice]
    with pytest.raises(ReplkError, match=f"trt-rtx knows no {choice}"):
        build.build(written("fp32"), tmp_path / "model.plan", TensorRTRTX, recipe=Recipe(**{choice: value}))
    assert not list(tmp_path.iterdir())


def test_every_choice_means_something_to_one_of_them() -> None:
    both = TensorRT.ingredients & TensorRTRTX.ingredients
    assert both == {"batches", "level", "workspace_mib", "refittable"}
    of_graphs = {field.name for field in dataclasses.fields(Recipe)} - {"forms"}  # those are for weights
    assert TensorRT.ingredients | TensorRTRTX.ingredients == of_graphs


def test_a_refittable_plan_needs_a_gpu_to_build(
    written: Written, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnavailableError, match="CUDA_SUCCESS"):
        rtx(written("fp32"), tmp_path / "model.plan", refittable=True)
    assert "MyelinCheckException" in capfd.readouterr().err  # the runtime's own, past its logger
    assert not list(tmp_path.iterdir())


DAMAGES: dict[str, tuple[type[ReplkError], str]] = {
    "missing": (ReplkError, "does not exist"),
    "empty": (ReplkError, "holds no ONNX graph"),
    "cut short": (ReplkError, "is not a whole ONNX file"),
    "garbage": (ReplkError, "is not a whole ONNX file"),
    "without its data": (ReplkError, "is not a whole ONNX file.*weights.bin"),
    "unknown operators": (UnavailableError, r"second \(Nonsense\).*third \(Other\)"),
    "unlike types": (ReplkError, r"not a sound ONNX file: conv \(Conv\).*must be of same type"),
    "bytes turned": (UnavailableError, r"turn \(Transpose\).*UInt8"),
    "open size": (ReplkError, "leaves more open than the batch"),
    "rank 3": (ReplkError, "does not map one batch of images"),
    "integers out": (ReplkError, "does not map one batch of images"),
}


def damaged(name: str, folder: Path, whole: bytes) -> Path:
    path, node = folder / "file.onnx", helper.make_node
    if name in {"empty", "cut short", "garbage"}:
        path.write_bytes({"empty": b"", "cut short": whole[: len(whole) // 2], "garbage": b"\x07nonsense" * 99}[name])
    elif name == "without its data":
        weights = {"w": np.ones((4, 3, 3, 3), np.float32)}
        out = (TensorProto.FLOAT, ["n", 4, 6, 6])
        model = onnx.load(foreign(path, [node("Conv", ["x", "w"], ["y"], name="conv")], out=out, weights=weights))
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        (folder / "weights.bin").unlink()
    elif name == "unknown operators":
        odd = node("Nonsense", ["a"], ["b"], name="second", domain="odd")
        odder = node("Other", ["b"], ["y"], name="third", domain="odd")
        foreign(path, [node("Relu", ["x"], ["a"], name="first"), odd, odder])
    elif name == "unlike types":
        weights, half = {"w": np.ones((4, 3, 3, 3), np.float32)}, TensorProto.FLOAT16
        convolution = node("Conv", ["x", "w"], ["y"], name="conv")
        foreign(path, [convolution], kind=half, out=(half, ["n", 4, 6, 6]), weights=weights)
    elif name == "bytes turned":
        turn, cast = node("Transpose", ["x"], ["t"], name="turn", perm=[0, 3, 1, 2]), node("Cast", ["t"], ["y"], to=1)
        foreign(path, [turn, cast], shape=["n", 8, 8, 3], kind=TensorProto.UINT8)
    elif name == "open size":
        relu(path, shape=["n", 3, "h", "w"], out=(1, ["n", 3, "h", "w"]))
    elif name == "rank 3":
        relu(path, shape=["n", 3, 8], out=(1, ["n", 3, 8]))
    elif name == "integers out":
        foreign(path, [node("Cast", ["x"], ["y"], name="cast", to=6)], out=(6, ["n", 3, 8, 8]))
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_taken_is_refused_with_its_reason(damage: str, written: Written, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = damaged(damage, tmp_path, written("fp32").read_bytes())
    kind, words = DAMAGES[damage]
    with pytest.raises(ReplkError, match=words) as caught:
        rtx(source, tmp_path / "out" / "model.plan", batches=(RANGE,))
    assert type(caught.value) is kind
    assert caught.value.remedy
    assert "/_src/" not in caught.value.problem  # the places in the runtime's own sources help nobody
    assert not list((tmp_path / "out").iterdir())


def test_progress_arrives_by_phase_and_each_phase_ends(written: Written, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    TensorRTRTX.build(written("fp32"), tmp_path / "model.plan", Recipe(), lambda *words: told.append(words))
    phases = {step for step, _, _ in told}
    assert "build trt-rtx: Optimizing graph" in phases
    assert len(phases) > 5
    assert all(0 <= done <= total for _, done, total in told)
    last = {step: (done, total) for step, done, total in told}
    assert all(done == total for done, total in last.values())
    first: dict[str, int] = {}
    for step, done, _ in told:
        first.setdefault(step, done)
    assert set(first.values()) == {0}
    assert told[-1][0] == "build trt-rtx: Building engine"


def test_a_full_disk_leaves_the_old_plan(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model.plan"
    out.write_bytes(b"old")

    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(memoryview(content)[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ReplkError, match="No space left"):
        rtx(written("fp32"), out)
    assert out.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.plan"]


def test_the_error_of_a_listener_ends_the_build(written: Written, tmp_path: Path) -> None:
    def broken(step: str, done: int, total: int | None) -> None:
        raise LookupError(step, done, total)

    with pytest.raises(LookupError, match="Building engine"):
        TensorRTRTX.build(written("fp32"), tmp_path / "model.plan", Recipe(), broken)
    assert not list(tmp_path.iterdir())


SLOW_BUILD = """
    import signal, sys, time
    from pathlib import Path
    from replk_deploy.backends.base import Recipe
    from replk_deploy.backends.trt import TensorRTRTX

    def slow(step, done, total):
        if "Optimizing graph" in step:
            print(step, done, flush=True)
            time.sleep(0.2)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        TensorRTRTX.build(Path(sys.argv[1]), Path(sys.argv[2]), Recipe(), slow)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        raise SystemExit(130)
    print("built", flush=True)
"""


def test_ctrl_c_cancels_the_build_and_leaves_nothing(written: Written, tmp_path: Path) -> None:
    code = textwrap.dedent(SLOW_BUILD)
    command = [sys.executable, "-c", code, str(written("fp32")), str(tmp_path / "model.plan")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent) as process:
        seen = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=120)
    assert "Optimizing graph" in seen
    assert rest.splitlines()[-1] == "interrupted"
    assert len(rest.splitlines()) < 15  # of 30 steps
    assert process.returncode == Exit.INTERRUPTED
    assert not list(tmp_path.iterdir())


def test_an_interrupt_waits_for_the_end_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def work(cancelled: Any) -> None:
        assert cancelled.wait(60)
        ended.append(True)

    pauses = iter([KeyboardInterrupt, KeyboardInterrupt])

    def interrupted(*_: object, **__: object) -> None:
        for pause in pauses:
            raise pause

    monkeypatch.setattr(trt_library, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trt_library.in_a_thread(work)
    assert ended == [True]


@pytest.mark.slow
def test_rtx_builds_a_full_31b(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = RepLKNet.build(VARIANTS["RepLKNet-31B"], "folded").eval()
    batch = Batch.parse("1:8:32")
    export(network, tmp_path / "31b.onnx", precision="fp16", size=(224, 224), batch=batch)
    made = rtx(tmp_path / "31b.onnx", tmp_path / "31b.plan", batches=(batch,), compute_capabilities=("8.9",))
    assert made.input.shape == (None, 3, 224, 224)
    assert (tmp_path / "31b.plan").stat().st_size > 150e6


# --- opening where nothing can be opened


def sealed(kind: type[trt._TensorRT], source: Path, folder: Path, **choices: Any) -> Path:
    """Build a plan and write its sidecar."""
    out = folder / "model.plan"
    sidecar.write(out, build.build(source, out, kind, recipe=Recipe(**choices)).sidecar)
    return out


def test_a_plan_without_a_gpu_is_built_and_not_opened(written: Written, tmp_path: Path) -> None:
    plan = sealed(TensorRTRTX, written("fp16"), tmp_path)
    said = sidecar.read(plan)
    assert (said.backend, said.precision, said.batches) == ("trt-rtx", "fp16", (RANGE,))
    for ask in (TensorRTRTX.probe, lambda: TensorRTRTX(plan)):
        with pytest.raises(UnavailableError, match="trt-rtx needs an NVIDIA GPU"):
            ask()
    with pytest.raises(UnavailableError, match="does not run on a CPU"):
        TensorRTRTX(plan, Settings(device="cpu"))
    with pytest.raises(UnavailableError, match="GPU"):
        TensorRTRTX.refit(plan, written("fp16"), tmp_path / "other.plan", silent)


def test_a_plan_is_looked_at_before_it_is_trusted(written: Written, tmp_path: Path) -> None:
    with pytest.raises(ReplkError, match="is not a file"):
        TensorRTRTX(tmp_path / "none.plan")
    plan = sealed(TensorRTRTX, written("fp16"), tmp_path)
    plan.write_bytes(plan.read_bytes()[:-1] + b"\x00")
    with pytest.raises(IntegrityError, match="its hash differs"):
        TensorRTRTX(plan)
    sidecar.place(plan).unlink()
    with pytest.raises(IntegrityError, match="no sidecar"):
        TensorRTRTX(plan)


@pytest.mark.parametrize("kind", [TensorRT, TensorRTRTX])
def test_a_missing_package_names_its_install_line(
    kind: type[trt._TensorRT], written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(name=module)

    monkeypatch.setattr(optional, "import_module", missing)
    for ask in (kind.probe, lambda: kind.build(written("fp32"), tmp_path / "model.plan", Recipe(), silent)):
        with pytest.raises(UnavailableError, match=rf"not installed.*pip install 'replk-deploy\[{kind.name}\]'"):
            ask()


@pytest.mark.parametrize(
    "failure",
    [
        ImportError("libnvinfer.so.11: cannot open shared object file: No such file or directory"),
        ModuleNotFoundError("No module named 'tensorrt_bindings'", name="tensorrt_bindings"),
    ],
)
def test_a_package_without_its_libraries_is_said_in_the_librarys_words(
    failure: ImportError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_module: str) -> None:
        raise failure

    monkeypatch.setattr(optional, "import_module", broken)
    with pytest.raises(UnavailableError, match=r"installed and does not load: .*(libnvinfer|bindings).*--force-reinst"):
        TensorRT.probe()


# --- a double of TensorRT, and of a GPU


def opens_on(monkeypatch: pytest.MonkeyPatch, version: str = "11.4.0.106", **habits: Any) -> trt_double.World:
    """Put the double where `tensorrt` is looked for."""
    world = trt_double.World(**habits)
    module = trt_double.tensorrt(world, version)
    monkeypatch.setattr(optional, "import_module", lambda _name: module)
    monkeypatch.setattr(trt, "_driver", lambda: "580.1")
    trt_double.pretend_gpu(monkeypatch, world)
    return world


def doubled(source: Path, folder: Path, **choices: Any) -> Made:
    return TensorRT.build(source, folder / "model.plan", Recipe(**choices), silent)


def flags(world: trt_double.World) -> set[str]:
    return {flag.name for flag in world.config.flags}


@pytest.mark.parametrize("version", ["10.12.0.36", "11.4.0.106"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_networks_are_strongly_typed_and_tf32_is_allowed_only_by_name(
    precision: Precision, version: str, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = opens_on(monkeypatch, version)
    made = doubled(written(precision), tmp_path)
    assert world.told("create_network") == [("create_network", 1)]
    assert flags(world) == ({"TF32"} if precision == "tf32" else set())
    assert made.facts["tf32"] == ("on" if precision == "tf32" else "off")
    assert world.config.profiling_verbosity.name == "DETAILED"
    assert world.told("set_shape") == [("set_shape", "images", *((n, 3, SIZE, SIZE) for n in (1, 2, 4)))]


def test_a_foreign_float32_file_is_no_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = opens_on(monkeypatch)
    doubled(relu(tmp_path / "foreign.onnx"), tmp_path, batches=(RANGE,))
    assert flags(world) == set()


def test_each_range_is_a_profile_and_a_fixed_batch_is_none(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = opens_on(monkeypatch)
    doubled(written("fp32"), tmp_path, batches=(Batch.parse("1"), Batch.parse("2:4:8")))
    image = (3, SIZE, SIZE)
    assert world.profiles == [[(n, *image) for n in (1, 1, 1)], [(n, *image) for n in (2, 4, 8)]]
    world = opens_on(monkeypatch)
    doubled(written("fp32", Batch.parse("2")), tmp_path)
    assert world.profiles == []


@pytest.mark.parametrize(
    ("choices", "needed"),
    [
        ({}, {"platform", "tensorrt", "compute_capability", "gpu"}),
        ({"hardware": "same-compute-capability"}, {"platform", "tensorrt", "compute_capability"}),
        ({"hardware": "ampere-plus"}, {"platform", "tensorrt"}),
        ({"hardware": "ampere-plus", "version_compatible": True}, {"platform"}),
    ],
)
def test_a_plan_demands_what_it_needs_and_no_more(
    choices: dict[str, Any], needed: set[str], written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = opens_on(monkeypatch)
    plan = sealed(TensorRT, written("fp32"), tmp_path, **choices)
    assert set(sidecar.read(plan).made_with) == needed
    assert world.config.hardware_compatibility_level.name == choices.get("hardware", "none").upper().replace("-", "_")
    assert ("VERSION_COMPATIBLE" in flags(world)) == choices.get("version_compatible", False)
    TensorRT(plan).close()
    assert world.host_code is choices.get("version_compatible", False)
    other = {"gpu": "Another GPU", "compute_capability": "9.0"}
    for key, value in other.items():
        monkeypatch.setattr(cuda, "facts", lambda key=key, value=value: trt_double.GPU | {key: value})
        if key in needed:
            with pytest.raises(IntegrityError, match=value):
                TensorRT(plan)
        else:
            TensorRT(plan).close()
    world = opens_on(monkeypatch, "11.5.0.1")
    if "tensorrt" in needed:
        with pytest.raises(IntegrityError, match=r"11\.4\.0\.106, here 11\.5\.0\.1"):
            TensorRT(plan)
        assert world.told("deserialize") == []
    else:
        TensorRT(plan).close()


def test_a_setting_that_the_runtime_drops_in_silence_is_noticed(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for habits, choices, words in (
        ({}, {"level": 7}, "refuses optimisation level 7 and keeps 3"),
        ({"stuck": ("TF32",)}, {}, "refuses flag TF32"),
        ({"stuck": ("REFIT",)}, {"refittable": True}, "refuses flag REFIT"),
        ({"one_gpu": True}, {"hardware": "ampere-plus"}, "refuses hardware compatibility level"),
        ({"no_profile": True}, {}, "takes no profile 1:2:4"),
    ):
        opens_on(monkeypatch, **habits)
        with pytest.raises(ReplkError, match=words):
            doubled(written("fp32"), tmp_path, **choices)
    assert not list(tmp_path.iterdir())


def test_a_plan_that_is_not_built_names_the_node(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [
        ("WARNING", "a warning is no cause"),
        ("ERROR", "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35)"),
        ("ERROR", "Error Code 10: (Could not find any implementation for node a/Conv. In build at /_src/x.cpp:1)"),
        ("ERROR", "and what follows from it"),
    ]
    opens_on(monkeypatch, builds_nothing=True, says=said)
    with pytest.raises(UnavailableError, match=r"any implementation for node a/Conv\.\)") as caught:
        doubled(written("fp32"), tmp_path)
    assert "/_src/" not in caught.value.problem
    assert not list(tmp_path.iterdir())
    opens_on(monkeypatch, builds_nothing=True)
    with pytest.raises(UnavailableError, match="it gives no reason"):
        doubled(written("fp32"), tmp_path)


def test_bindings_over_empty_libraries_are_unavailable(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens_on(monkeypatch, stub=True)
    with pytest.raises(UnavailableError, match=r"tensorrt cannot build here: .*returned nullptr"):
        doubled(written("fp32"), tmp_path)


def test_the_timing_cache_is_kept_by_version_gpu_and_driver(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = opens_on(monkeypatch)
    folder = tmp_path / "cache"
    first = doubled(written("fp32"), tmp_path, timing_cache=folder).facts
    second = doubled(written("fp32"), tmp_path, timing_cache=folder).facts
    (path,) = folder.iterdir()
    assert path.name == "tensorrt-11.4.0.106-Pretended-GPU-580.1.timing".replace("tensorrt-", "")
    assert path.read_bytes() == b"+measured+measured"
    assert [blob for _, blob in world.told("create_timing_cache")] == [b"", b"+measured"]
    assert (first["timing_cache_before"], second["timing_cache"]) == ("none", path.name)
    assert first["timing_cache_after"] == second["timing_cache_before"] != second["timing_cache_after"]
    assert second["timing_cache_after"] == files.sha256(path)
    opens_on(monkeypatch, "11.5.0.1")
    assert doubled(written("fp32"), tmp_path, timing_cache=folder).facts["timing_cache_before"] == "none"
    opens_on(monkeypatch, cache_of_another=True)
    with pytest.raises(UnavailableError, match=r"cannot use .*rm '.*timing'"):
        doubled(written("fp32"), tmp_path, timing_cache=folder)


def images(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((n, 3, SIZE, SIZE), dtype=np.float32)


def expected(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the double answers."""
    return np.stack([batch.mean(axis=(1, 2, 3), dtype=np.float64), batch[:, 0, 0, 0]], axis=1)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A file of somebody else with two outputs an image."""
    pool = helper.make_node("GlobalAveragePool", ["x"], ["p"])
    shape = helper.make_node("Flatten", ["p"], ["f"])
    gemm = helper.make_node("Gemm", ["f", "w"], ["y"], name="gemm")
    weights = {"w": np.ones((3, 2), np.float32)}
    out = (TensorProto.FLOAT, ["n", 2])
    return foreign(tmp_path / "two.onnx", [pool, shape, gemm], shape=["n", 3, SIZE, SIZE], out=out, weights=weights)


PROFILES = (Batch.parse("1"), Batch.parse("2:4:8"))


@pytest.fixture(params=[False, True], ids=["enqueued", "graph"])
def opened(
    request: pytest.FixtureRequest, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TensorRT, trt_double.World]]:
    world = opens_on(monkeypatch)
    plan = sealed(TensorRT, two, tmp_path, batches=PROFILES)
    world.calls.clear()
    with TensorRT(plan, Settings(cuda_graph=request.param)) as found:
        yield found, world


def test_the_answer_comes_from_the_addresses_that_were_bound(opened: tuple[TensorRT, trt_double.World]) -> None:
    backend, world = opened
    for seed, n in enumerate((3, 1, 3, 8)):
        batch = images(n, seed=seed)
        np.testing.assert_allclose(backend.run(batch)["y"], expected(batch), rtol=1e-5, atol=1e-6)
    assert {call[1] for call in world.told("execute")} == {7}  # the stream
    assert [call[1:] for call in world.told("profile")] == [(1, 7), (0, 7), (1, 7)]  # one context for each size
    assert [call[2][0] for call in world.told("shape")] == [3, 1, 8]
    names = [call[0] for call in world.calls if call[0] != "deserialize"]
    assert names[:6] == ["create_execution_context", "profile", "shape", "scratch", "address", "address"]
    assert world.told("scratch") == [("scratch", trt_double.SCRATCH)] * 3
    assert world.told("create_execution_context") == [("create_execution_context", "USER_MANAGED")] * 3


def test_a_graph_is_captured_after_warm_ups_and_then_only_replayed(opened: tuple[TensorRT, trt_double.World]) -> None:
    backend, world = opened
    graphs = backend.facts["cuda_graph"] == "on"
    first, second = (backend.prepare(images(2, seed=seed)) for seed in (1, 2))
    prepared = len(world.told("execute"))
    assert prepared == (2 * (cuda.WARM_UPS + 1) if graphs else 0)
    for launch in (first, second, first):
        launch.enqueue()
        launch.wait()
        assert launch.device_ms() == 1.5
    assert len(world.told("replay")) == (3 if graphs else 0)
    assert len(world.told("execute")) == prepared + (0 if graphs else 3)
    for launch, seed in ((first, 1), (second, 2)):  # each launch has buffers of its own
        np.testing.assert_allclose(launch.answer["y"].numpy(), expected(images(2, seed=seed)), rtol=1e-5, atol=1e-6)


def test_a_launch_keeps_its_images(opened: tuple[TensorRT, trt_double.World]) -> None:
    backend, _ = opened
    batch = images(2)
    launch, wanted = backend.prepare(batch), expected(batch)
    batch[:] = 0
    launch.enqueue()
    launch.wait()
    np.testing.assert_allclose(launch.answer["y"].numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_an_open_plan_says_what_it_is(opened: tuple[TensorRT, trt_double.World]) -> None:
    backend, _ = opened
    assert (backend.device, backend.precision, backend.batches) == ("cuda", "fp32", PROFILES)
    assert backend.facts["gpu"] == trt_double.GPU["gpu"]
    assert backend.facts["driver"] == "580.1"
    assert backend.facts["tf32"] == "off"
    mib = {name: round(size * 2**20) for name, size in backend.memory_mib.items()}
    assert mib.pop("plan") > 0
    assert mib == {"workspace": 4096, "workspace 1": 2048, "workspace 2:4:8": 4096}
    for n in (0, 9):
        with pytest.raises(ReplkError):
            backend.prepare(images(n))
    backend.close()
    backend.close()
    for ask in (backend.run, backend.prepare, lambda batch: backend.layer_times(batch, repeats=1)):
        with pytest.raises(ContractError, match="closed"):
            ask(images(1))


def test_half_precision_goes_through_its_own_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens_on(monkeypatch)
    half = TensorProto.FLOAT16
    source = relu(tmp_path / "half.onnx", shape=["n", 3, SIZE, SIZE], kind=half, out=(half, ["n", 2]))
    with TensorRT(sealed(TensorRT, source, tmp_path, batches=(RANGE,))) as backend:
        assert backend.precision == "fp16"
        batch = images(2)
        np.testing.assert_allclose(backend.run(batch)["y"], expected(batch), rtol=2e-3, atol=1e-3)


def test_failures_of_the_runtime_become_errors(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens_on(monkeypatch)
    plan = sealed(TensorRT, two, tmp_path, batches=PROFILES)
    opens_on(monkeypatch, does_not_open=True)
    with pytest.raises(UnavailableError, match=r"does not open .*Version tag does not match.*replk build two.onnx"):
        TensorRT(plan)
    opens_on(monkeypatch, does_not_run=True)
    with TensorRT(plan) as backend, pytest.raises(UnavailableError, match="tensorrt does not run"):
        backend.run(images(1))
    said = sidecar.read(plan)
    sidecar.write(plan, dataclasses.replace(said, outputs=("z",)))
    with pytest.raises(IntegrityError, match="holds x, y, not what its sidecar says"):
        TensorRT(plan)
    sidecar.write(plan, dataclasses.replace(said, backend="trt-rtx"))
    with pytest.raises(IntegrityError, match="built for trt-rtx"):
        TensorRT(plan)


def test_refitting_replaces_the_weights_of_a_copy(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = opens_on(monkeypatch)
    plan = sealed(TensorRT, two, tmp_path, batches=PROFILES, refittable=True)
    before, told = plan.read_bytes(), []
    made = TensorRT.refit(plan, two, tmp_path / "new.plan", lambda *words: told.append(words))
    assert json.loads((tmp_path / "new.plan").read_text())["weights"] == "two.onnx"
    assert plan.read_bytes() == before
    assert (made.batches, made.outputs) == (PROFILES, ("y",))
    assert made.facts["refitted_from"] == files.sha256(plan)
    assert (told[0], told[-1]) == (("refit trt", 0, 1), ("refit trt", 1, 1))
    world.habits["weights_missing"] = True
    with pytest.raises(UnavailableError, match="cannot refit"):
        TensorRT.refit(plan, two, tmp_path / "third.plan", silent)
    assert not (tmp_path / "third.plan").exists()


def test_refitting_refuses_what_does_not_fit(
    two: Path, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = opens_on(monkeypatch)
    plan = sealed(TensorRT, two, tmp_path, batches=PROFILES)
    with pytest.raises(ReplkError, match=r"was not built to be refitted.*--refittable"):
        TensorRT.refit(plan, two, tmp_path / "new.plan", silent)
    with pytest.raises(ReplkError, match=r"is fp16, .* is fp32"):
        TensorRT.refit(plan, written("fp16"), tmp_path / "new.plan", silent)
    assert world.told("refit") == []
    assert not (tmp_path / "new.plan").exists()


# --- what profiler and inspector say

TEN = {
    "Layers": [
        {
            "Name": "first/Conv",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Dimensions": [2, 3, 8, 8], "Format/Datatype": "Row major linear FP32"}],
            "Outputs": [{"Name": "t", "Dimensions": [2, 4, 8, 8], "Format/Datatype": "Channel major FP16"}],
            "TacticName": "sm80_conv",
        },
        "head/Gemm",
    ],
    "Bindings": ["x", "y"],
}
ELEVEN = {
    "Layers": [
        {
            "Name": "first/Conv",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Dimensions": [2, 3, 8, 8], "Format": "Row major linear", "DataType": "FP32"}],
            "Outputs": [{"Name": "t", "Dimensions": [2, 4, 8, 8], "Format": "Channel major", "DataType": "FP16"}],
            "TacticName": "sm80_conv",
        },
        "head/Gemm",
    ],
    "I/O Tensors": [{"Name": "x", "IOMode": "Input", "ProfileInfo": [{"MinShape": [1, 3, 8, 8]}]}],
}


@pytest.mark.parametrize("schema", [TEN, ELEVEN], ids=["10", "11"])
def test_layers_are_timed_and_described(
    schema: dict[str, Any], two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = opens_on(monkeypatch, inspects=json.dumps(schema))
    with TensorRT(sealed(TensorRT, two, tmp_path, batches=PROFILES), Settings(cuda_graph=True)) as backend:
        first, head = backend.layer_times(images(2), repeats=3)
        assert world.told("replay") == []
        assert len(world.told("execute")) == 4  # one goes before
    assert (first.name, first.kind, first.samples_ms) == ("first/Conv", "CaskConvolution", (2.0, 2.0, 2.0))
    assert first.detail == "sm80_conv; 2x3x8x8 Row major linear FP32 -> 2x4x8x8 Channel major FP16"
    assert (head.name, head.kind, head.samples_ms, head.detail) == ("head/Gemm", "", (0.5, 0.5, 0.5), "")


def test_one_layer_for_the_whole_network_is_no_profile(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens_on(monkeypatch, inspects='{"Layers": []}')
    monkeypatch.setattr(trt_double, "LAYERS", [("{ForeignNode[a...b]}", 1.0)])
    with (
        TensorRT(sealed(TensorRT, two, tmp_path, batches=PROFILES)) as backend,
        pytest.raises(UnavailableError, match=r"one layer of the whole network: \{ForeignNode"),
    ):
        backend.layer_times(images(1), repeats=1)


def test_runs_through_other_layers_are_not_joined() -> None:
    with pytest.raises(ContractError):
        trt_run.joined([[("a", 1.0)], [("b", 1.0)]], {})


def test_the_profile_tuned_closest_is_taken() -> None:
    profiles = (Batch.parse("1:1:8"), Batch.parse("1:8:64"), Batch.parse("4"))
    assert [trt_run.nearest(profiles, n) for n in (1, 3, 4, 7, 8, 64)] == [0, 0, 2, 1, 1, 1]
    with pytest.raises(ContractError):
        trt_run.nearest(profiles, 65)


# --- TensorRT-RTX on a GPU, as far as a double tells


@pytest.mark.parametrize(
    ("verdict", "bits", "here", "kind", "words"),
    [
        ("VALID", 0, "8.9", None, ""),
        ("SUBOPTIMAL", 0, "8.9", None, ""),
        ("INVALID", 2, "8.6", IntegrityError, r"not for compute capability 8\.6.*--compute-capability 8\.6"),
        ("INVALID", 2, "9.0", UnavailableError, r"does not run on compute capability 9\.0, only on 8\.6, 8\.9"),
        ("INVALID", 5, "8.9", UnavailableError, "version mismatch, old cuda driver"),
        ("INVALID", 0, "8.9", UnavailableError, "cannot ask the driver"),
    ],
)
def test_rtx_explains_why_a_plan_does_not_fit(
    verdict: str, bits: int, here: str, kind: type[ReplkError] | None, words: str
) -> None:
    asked = []

    class Runtime:
        engine_header_size = 64

        def __init__(self, logger: Any) -> None:
            del logger

        def get_engine_validity(self, header: memoryview) -> tuple[object, int]:
            asked.append(bytes(header))
            return validity[verdict], bits

    validity = trt_double.members("EngineValidity", "VALID", "SUBOPTIMAL", "INVALID")
    module: Any = ModuleType("tensorrt_rtx")
    module.Runtime, module.EngineValidity = Runtime, validity
    module.EngineInvalidityDiagnostics = trt_double.enum.IntEnum(
        "EngineInvalidityDiagnostics", {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "OLD_CUDA_DRIVER": 4}
    )
    module.ComputeCapability = trt_double.members("ComputeCapability", "NONE", "CURRENT", "SM86", "SM89", "SM120")

    class Log:
        lines: tuple[()] = ()

    lib = trt_library.Library(module, Log(), "tensorrt_rtx")
    found = TensorRTRTX._unfit(lib, memoryview(bytes(range(100))), {"compute_capability": here})
    assert asked == [bytes(range(64))]
    if kind is None:
        assert found is None
    else:
        assert type(found) is kind
        with pytest.raises(kind, match=words):
            raise found


def test_rtx_compiles_the_kernel_for_a_shape_before_it_answers() -> None:
    class Config:
        def set_execution_context_allocation_strategy(self, strategy: object) -> None:
            self.strategy = strategy

    class Engine:
        def create_runtime_config(self) -> Config:
            return Config()

        def create_execution_context(self, config: Config) -> Config:
            return config

    module: Any = ModuleType("tensorrt_rtx")
    module.DynamicShapesKernelSpecializationStrategy = trt_double.members("Strategy", "LAZY", "EAGER", "NONE")
    module.ExecutionContextAllocationStrategy = trt_double.members("Allocation", "STATIC", "USER_MANAGED")
    backend = object.__new__(TensorRTRTX)
    made = backend._context(trt_library.Library(module, None, "tensorrt_rtx"), Engine())
    assert made.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    assert made.strategy.name == "USER_MANAGED"


# --- names, held against the listings of real bindings

ADAPTER = ("trt", "trt_library", "trt_run")
LISTINGS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (HERE / "listings").glob("*.json")}
VARIABLES = {  # name of a variable or attribute in the adapter → what it holds
    "trt": "module",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "tensor": "ITensor",
    "dtype": "DataType",
    "config": "IBuilderConfig",
    "flag": "BuilderFlag",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "parser": "OnnxParser",
    "error": "ParserError",
    "code": "ErrorCode",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "opened": "ICudaEngine",
    "context": "IExecutionContext",
    "runtime_config": "IRuntimeConfig",
    "inspector": "EngineInspector",
    "refitter": "Refitter",
    "reader": "OnnxParserRefitter",
    "severity": "Severity",
}
FOR = {"TensorRT": "tensorrt", "TensorRTRTX": "tensorrt_rtx"}  # class of the adapter → the package it is for


@dataclasses.dataclass(frozen=True)
class Use:
    """A member of a class of TensorRT that the adapter names; `args` None where it is not called there."""

    cls: str
    member: str
    args: tuple[int, tuple[str, ...]] | None
    package: str | None
    line: int


def holds(node: ast.expr) -> str | None:
    """Name the class of what an expression stands for: `trt`, `lib.trt`, `trt.X`, `builder`, `self._engine`."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    if isinstance(node, ast.Attribute) and holds(node.value) == "module":
        return name
    return VARIABLES.get(name.lstrip("_"))


def uses(tree: ast.AST, package: str | None = None) -> Iterator[Use]:
    """Find every member of TensorRT that is named, and how it is called, directly or through `partial`."""
    called: dict[ast.expr, tuple[int, tuple[str, ...]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            through = isinstance(node.func, ast.Name) and node.func.id == "partial"
            target, args = (node.args[0], node.args[1:]) if through else (node.func, node.args)
            if not any(isinstance(arg, ast.Starred) for arg in args):
                called[target] = (len(args), tuple(str(keyword.arg) for keyword in node.keywords))
    inside = {child: FOR[cls.name] for cls in classes(tree) if cls.name in FOR for child in ast.walk(cls)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (cls := holds(node.value)) and not node.attr.startswith("__"):
            yield Use(cls, node.attr, called.get(node), inside.get(node, package), node.lineno)


def classes(tree: ast.AST) -> list[ast.ClassDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def overrides(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Find class, method and parameters of what the runtime calls."""
    for cls in classes(tree):
        for base in cls.bases:
            if isinstance(base, ast.Attribute) and holds(base.value) == "module":
                for method in cls.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        names = [arg.arg for arg in method.args.args[1:]]
                        yield base.attr, method.name, ", ".join(names)


def unknown(tree: ast.AST, listing: Mapping[str, Any]) -> list[str]:
    """Say what the adapter names and a version lacks, or calls with other arguments than it takes."""
    found = []
    for use in uses(tree):
        if use.package not in {None, listing["package"]}:
            continue
        members = listing["classes"].get(use.member if use.cls == "module" else use.cls)
        if members is None:
            found.append(f"line {use.line}: no class {use.member if use.cls == 'module' else use.cls}")
        elif use.cls != "module" and use.member not in members:
            found.append(f"line {use.line}: no {use.cls}.{use.member}")
        elif use.args is not None:
            overloads = members["__init__" if use.cls == "module" else use.member]
            if overloads is None or not any(accepts(overload, *use.args) for overload in overloads):
                found.append(f"line {use.line}: {use.cls}.{use.member}{use.args} is none of {overloads}")
    return found


def accepts(overload: str, given: int, keywords: tuple[str, ...]) -> bool:
    names = [name for name in overload.split(", ") if name]
    rest = names[given:]
    return (
        given <= len(names)
        and all(any(name.rstrip("=") == keyword for name in rest) for keyword in keywords)
        and all(name.endswith("=") or name in keywords for name in rest)
    )


def adapter() -> Mapping[str, ast.Module]:
    folder = Path(trt.__file__).parent
    return {name: ast.parse((folder / f"{name}.py").read_text(encoding="utf-8")) for name in ADAPTER}


@pytest.mark.parametrize("listing", sorted(LISTINGS))
@pytest.mark.parametrize("name", ADAPTER)
def test_every_name_exists_in_every_version(name: str, listing: str) -> None:
    assert unknown(adapter()[name], LISTINGS[listing]) == []


def test_the_listings_are_of_these_packages_and_the_walk_finds_what_is_used() -> None:
    packages = [listing["package"] for listing in LISTINGS.values()]
    assert sorted(packages) == ["tensorrt", "tensorrt", "tensorrt", "tensorrt_rtx"]
    assert {listing["version"].split(".")[0] for listing in LISTINGS.values()} == {"10", "11", "1"}
    found = [use for tree in adapter().values() for use in uses(tree)]
    assert {use.cls for use in found} - {"module"} >= set(VARIABLES.values()) - {"module"}
    named = {use.member for use in found}
    assert len(named) > 60
    assert {"set_compute_capability", "hardware_compatibility_level", "execute_async_v3", "set_timing_cache"} <= named
    assert {use.package for use in found if use.member == "set_compute_capability"} == {"tensorrt_rtx"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("config.set_falg(x)", "no IBuilderConfig.set_falg"),
        ("self._engine.num_io", "no ICudaEngine.num_io"),
        ("trt.BuilderFlag.FP16", "no BuilderFlag.FP16"),
        ("lib.trt.IInt8Calibrator()", "no class IInt8Calibrator"),
        ("context.execute_async_v3()", "is none of"),
        ("partial(config.set_timing_cache, cache)", "is none of"),
        ("config.set_timing_cache(cache, ignore=False)", "is none of"),
        ("builder.platform_has_fast_fp16", "no Builder.platform_has_fast_fp16"),
        ("config.set_compute_capability(x, 0)", "no IBuilderConfig.set_compute_capability"),
        ("class TensorRT:\n    def f(self, config): config.num_compute_capabilities = 1", "num_compute_capabilities"),
        ("runtime_config.dynamic_shapes_kernel_specialization_strategy = x", "no IRuntimeConfig"),
    ],
)
def test_a_planted_wrong_name_is_seen(code: str, words: str) -> None:
    assert any(words in problem for problem in unknown(ast.parse(code), LISTINGS["tensorrt-11.4"]))


def test_a_name_of_one_package_is_allowed_in_the_class_for_it() -> None:
    code = "class TensorRTRTX:\n    def f(self, config): config.set_compute_capability(x, 0)"
    assert all(unknown(ast.parse(code), listing) == [] for listing in LISTINGS.values())


@pytest.mark.parametrize("name", ADAPTER)
def test_every_object_of_the_runtime_has_a_name_that_the_walk_knows(name: str) -> None:
    """A chain such as `network.get_input(0).name` would hide its last member from the walk."""
    tree = adapter()[name]
    known = {member for listing in LISTINGS.values() for members in listing["classes"].values() for member in members}
    hidden = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            under = node.value.func if isinstance(node.value, ast.Call) else node.value
            chained = isinstance(under, ast.Attribute) and holds(under.value) not in {None, "module"}
            if chained and node.attr in known:
                hidden.append(ast.unparse(node))
    assert hidden == []


def test_what_the_runtime_calls_has_its_names() -> None:
    found = list(overrides(adapter()["trt_library"]))
    assert {cls for cls, _, _ in found} == {"ILogger", "IProgressMonitor", "IProfiler"}
    extra = {"cause", "tell"}
    for listing in LISTINGS.values():
        for cls, method, parameters in found:
            if method not in extra:
                assert listing["classes"][cls][method] == [parameters], (cls, method)
        for cls in ("IProgressMonitor", "IProfiler"):
            offered = {member for member in listing["classes"][cls] if not member.startswith("_")}
            assert offered <= {method for owner, method, _ in found if owner == cls}


def test_the_double_offers_what_the_real_one_offers() -> None:
    module = trt_double.tensorrt(trt_double.World())
    listing = LISTINGS["tensorrt-11.4"]["classes"]
    for name, cls in vars(module).items():
        if name.startswith("_"):
            continue
        members = {member for member in vars(cls) if not member.startswith("_")}
        assert members - {"num_errors"} <= set(listing[name]) | {"num_errors"}, name
