"""`replk lower`, and lowering inside export, build and bench: what is used was judged, and the plan was followed."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from replk_deploy import backends, calibrate, costs, files, graph, machine, pipeline, publish, weights
from replk_deploy import lower as lowered_by
from replk_deploy.backends import aoti, sidecar
from replk_deploy.backends.base import Recipe, Settings
from replk_deploy.backends.ort import OrtCpu
from replk_deploy.backends.torch import Torch
from replk_deploy.batch import Batch
from replk_deploy.cli import app
from replk_deploy.costs import Calibration, Cost
from replk_deploy.errors import IntegrityError, MismatchError, ReplkError
from replk_deploy.lowerings import dense, grouped
from replk_deploy.lowerings.base import LargeConv, Rewritten
from replk_deploy.lowerings.grouped import Grouped
from replk_deploy.models.replknet import RepLKGeometry
from replk_deploy.pipeline import exporting
from replk_deploy.pipeline import lowering as lowering_
from replk_deploy.progress import silent
from replk_deploy.workspace import Workspace
from tests import networks, test_build
from tests.test_lower import conv, foreign
from tests.test_lowerings import BUGS

pytestmark = pytest.mark.usefixtures("short_timing")
WIDE = RepLKGeometry(  # so many other weights that `grouped` is within what weights may grow
    channels=(4, 6), depths=(1, 1), kernels=(13, 7), small=3, dw_channels=(4, 6), ffn_channels=(400, 600), classes=10
)
SIZE = (64, 64)  # maps of 16x16 and 8x8
SITES = [f"stages.{s}.blocks.0.large_kernel.lkb_reparam" for s in (0, 1)]
NAME = "lowered/model.fp32.grouped.onnx"
AUTO = "lowered/model.fp32.ort-cpu-b1.onnx"
MS = {"none": (4.0, 4.0), "grouped": (2.0, 2.0), "dense": (3.0, 3.0)}  # of the two large convolutions
ALL_GROUPED, SECOND_DENSE = "grouped 2 of 2", "dense 1, grouped 1 of 2"


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the package come without calibrations; a test writes what it needs."""
    monkeypatch.setattr(costs, "resources", SimpleNamespace(files=lambda _package: tmp_path / "no package"))
    monkeypatch.setattr(lowering_.cuda, "available", lambda: False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A root with one run, fused and exported, and its checkpoint; never changed by a test."""
    folder = tmp_path_factory.mktemp("finished")
    ckpt = networks.save_as_trained(networks.trained(WIDE), folder / "ckpt.pth")
    pipeline.fuse(ckpt, root=folder / "replk-out")
    made = pipeline.export(root=folder / "replk-out", batch=Batch(min=1, opt=1, max=8))
    assert made.verdict.state == "pass"
    return folder, made.file.parent


@pytest.fixture
def run(finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run; the current folder is the one that holds its root, replk-out, and ckpt.pth."""
    folder, made = finished
    shutil.copytree(folder, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work" / made.relative_to(folder)


def ask(*line: str):
    return CliRunner().invoke(app, list(line), prog_name="replk", catch_exceptions=False)


def last(text: str) -> str:
    return text.rstrip("\n").rpartition("\n")[2]


def said(text: str) -> str:
    return " ".join(text.split())


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def know(
    run: Path, ms: Mapping[str, tuple[float, float]] = MS, batches: tuple[int, ...] = (1,), runtime: str = "ort-cpu"
) -> None:
    """Write what each form of the two convolutions would have cost here."""
    layers = [(4, (13, 13), (16, 16)), (6, (7, 7), (8, 8))]
    rows = [
        Cost(
            runtime=runtime,
            device=calibrate.device_name("cpu"),
            precision="fp32",
            batch=batch,
            channels=channels,
            taps=taps,
            map=size,
            form=form,
            ms=times[index],
        )
        for index, (channels, taps, size) in enumerate(layers)
        for form, times in ms.items()
        for batch in batches
    ]
    costs.add(run.parent / costs.FILE, Calibration(environment={"cpu": "written by hand"}, costs=tuple(rows)))


def unverified(run: Path) -> Path:
    """Write the run's ONNX file as `export --no-verify` would have."""
    loose = Path(shutil.copy(run / "model.fp32.onnx", "loose.onnx"))
    metadata = graph.header(loose)
    graph.seal(loose, dataclasses.replace(metadata, verdict=publish.judged(None, graph.content_hash(loose), "")))
    return loose


def off(path: Path, run: Path, *, count: int = 3) -> float:
    """Return how far a file's answers are from those of the run's float64 network."""
    model, _ = weights.read(run / "fused.safetensors")
    x = np.random.default_rng(0).standard_normal((count, 3, *SIZE), dtype=np.float32)
    with torch.inference_mode():
        wanted = model.double()(torch.from_numpy(x).double())[0].numpy()
    with OrtCpu(path) as backend:
        got = backend.run(x)["logits"]
    return float((np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())


def lowered_now(run: Path, form: str, **options: Any) -> tuple[Path, Any]:
    workspace = Workspace.open(run)
    source = workspace.take("model.fp32.onnx")
    given = {"form": form, "batch": 1, "folder": run / "none", "root": run.parent} | options
    return lowering_.needed(lowering_.survey(source, given.pop("form")), OrtCpu, workspace, **given)


# --- lower --------------------------------------------------------------------------------------------------------


def test_a_run_is_lowered_proved_and_entered(run: Path) -> None:
    done = ask("lower", "--lower", "grouped", "--json", "out.json")
    assert done.exit_code == 0, done.output
    assert last(done.stdout).startswith(f"PASS lower {ALL_GROUPED} · worst ")
    assert "2 places alone, in float64: worst" in said(done.stdout)
    file = run / NAME
    metadata = graph.header(file)
    assert metadata.lowered == ALL_GROUPED
    assert (metadata.verdict.state, metadata.verdict.content) == ("pass", graph.content_hash(file))
    before = graph.header(run / "model.fp32.onnx")
    assert dataclasses.replace(metadata, lowered="", verdict=before.verdict) == before
    entry = Workspace.open(run).entry(NAME)
    assert (entry.by, entry.verdict) == ("lower", metadata.verdict)
    assert entry.made_from == {"model.fp32.onnx": files.sha256(run / "model.fp32.onnx")}
    record = json.loads((run / f"results/{NAME}.json").read_text())
    assert record["schema"] == "replk.lowered-file/1"
    assert record == json.loads(Path("out.json").read_text())
    assert record["lowered"]["growth"] == pytest.approx(
        sum(t.nbytes for t in tensors(file)) / sum(t.nbytes for t in tensors(run / "model.fp32.onnx"))
    )
    assert [site["choice"] for site in record["lowered"]["sites"]] == ["grouped", "grouped"]
    assert sorted(record["errors"]) == [f"{site}/Conv" for site in SITES]
    assert max(record["errors"].values()) <= 1e-12
    assert off(file, run) < 1e-5
    assert not list(run.rglob("*.part"))


def tensors(path: Path) -> list[np.ndarray]:
    return [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]


def test_a_lowered_file_is_never_taken_for_the_portable_one(run: Path) -> None:
    made = pipeline.lower(run, form="grouped")
    workspace = Workspace.open(run)
    assert workspace.artefacts(".onnx")[0] == NAME
    for precision, any_verdict in ((None, False), ("fp32", True)):
        found = exporting.needed(workspace, OrtCpu, precision, silent, any_verdict=any_verdict)
        assert found == run / "model.fp32.onnx"
    again = pipeline.lower(run, form="grouped")
    assert (again.lowered, again.file) == (made.lowered, made.file)


def test_what_was_lowered_is_taken_again_until_the_plan_changes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    know(run)
    calls: list[Path] = []
    honest = lowered_by.lower_graph
    monkeypatch.setattr(lowered_by, "lower_graph", lambda *a, **k: calls.append(a[1]) or honest(*a, **k))
    for _ in range(2):
        path, plan = lowered_now(run, "auto")
        assert (path, plan.words, len(calls)) == (run / AUTO, ALL_GROUPED, 1)
    know(run, MS | {"dense": (3.0, 1.0)})
    path, plan = lowered_now(run, "auto")
    assert (path, plan.words, len(calls)) == (run / AUTO, SECOND_DENSE, 2)
    assert graph.header(path).lowered == SECOND_DENSE
    assert {d.why for d in plan.decisions} == {"measured"}
    assert plan.source == f"fp32 on {calibrate.device_name('cpu')}"
    pipeline.lower(run, root=run.parent, prove=False)
    assert graph.header(path).verdict.state == "unverified"
    path, _ = lowered_now(run, "auto")
    assert graph.header(path).verdict.state == "provisional", "what nobody judged is judged before it is used"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError, match="its hash differs"):
        lowered_now(run, "auto")


def test_times_of_a_gpu_are_for_backends_that_use_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering_.cuda, "facts", lambda: {"gpu": "one of ours"})
    cpu = calibrate.device_name("cpu")
    assert cpu.startswith(f"cpu {machine.environment()['cpu']} ")
    for there, device in ((True, "one of ours"), (False, cpu)):
        monkeypatch.setattr(lowering_.cuda, "available", lambda there=there: there)
        found = {name: lowering_._device(backends.find(name)) for name in ("ort-cpu", "openvino", "ort-cuda", "torch")}
        assert found == {"ort-cpu": cpu, "openvino": cpu, "ort-cuda": device, "torch": device}


def test_auto_knows_nothing_changes_nothing_and_says_so(run: Path) -> None:
    done = ask("lower")
    assert done.exit_code == 0, done.output
    assert "nothing like it was measured" in said(done.stdout)
    assert last(done.stdout).startswith("PASS lower nothing · ")
    assert onnx.load(run / AUTO).graph == onnx.load(run / "model.fp32.onnx").graph
    assert lowered_now(run, "auto") == (run / "model.fp32.onnx", None)


def off_by_a_millionth(cls: type, site: LargeConv, kernel: np.ndarray) -> np.ndarray:
    del cls
    return HONEST(site, kernel) * kernel.dtype.type(1 + 1e-6)


HONEST = Grouped.placed


@pytest.mark.parametrize("bug", ["P + 1 in rows", "a channel off", "a millionth"])
def test_a_wrong_lowering_is_rejected_and_kept_apart(run: Path, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a millionth is below float32's round-off: only the places alone, in float64, show it."""
    good = pipeline.lower(run, form="grouped").file.read_bytes()
    if bug in BUGS:
        monkeypatch.setattr(grouped, "centre", BUGS[bug])
    else:
        monkeypatch.setattr(Grouped, "placed", classmethod(off_by_a_millionth))
    done = ask("lower", "--lower", "grouped")
    assert done.exit_code == 3, done.output
    assert last(done.stdout).startswith("FAIL lower grouped 2 of 2 · ")
    apart = run / "rejected" / "model.fp32.grouped.onnx"
    assert graph.header(apart).verdict.state == "rejected"
    record = json.loads((run / f"rejected/{NAME}.json").read_text())
    assert record["proof"]["state"] == "rejected"
    assert min(record["errors"].values()) > 1e-8
    agreed = all(float(a["worst"]) <= 1 for a in record["proof"]["agreements"])
    assert agreed is (bug == "a millionth")
    assert Workspace.open(run).entry(NAME).verdict.state == "pass"
    assert (run / NAME).read_bytes() == good
    shutil.rmtree(run / "lowered")
    with pytest.raises(MismatchError, match=r"model\.fp32\.grouped\.onnx was rejected"):
        pipeline.bench(run, backends=("ort-cpu",), forms=("grouped",), max_seconds=0.01)
    with pytest.raises(ReplkError, match="is rejected"):
        pipeline.lower(apart, form="dense", max_growth=100)


def test_a_file_of_somebody_else_is_judged_by_what_it_was(in_empty_folder: Path) -> None:
    foreign(Path("f.onnx"), conv("x", "y", name="c", group=3), shape=("n", 3, 9, 10), w=(3, 1, 13, 13))
    done = ask("lower", "f.onnx", "--lower", "grouped", "--max-weight-growth", "10")
    assert done.exit_code == 0, done.output
    assert last(done.stdout).startswith("PASS (provisional) lower grouped 1 of 1 · ")
    assert names(in_empty_folder) == {"f.onnx", "f.grouped.onnx"}
    made = onnx.load("f.grouped.onnx")
    assert [node.op_type for node in made.graph.node] == ["Reshape", "Conv", "Reshape"]
    assert [(p.key, p.value) for p in made.metadata_props] == [("author", "somebody")]
    x = np.random.default_rng(0).standard_normal((2, 3, 9, 10), dtype=np.float32)
    with OrtCpu(Path("f.onnx")) as before, OrtCpu(Path("f.grouped.onnx")) as after:
        np.testing.assert_allclose(after.run(x)["y"], before.run(x)["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("in_empty_folder")
@pytest.mark.parametrize("form", ["auto", "none", "dense"])
def test_a_file_without_weights_has_nothing_to_lower(form: str) -> None:
    foreign(Path("f.onnx"), onnx.helper.make_node("Relu", ["x"], ["y"]))
    assert last(ask("lower", "f.onnx", "--lower", form).stdout).startswith("UNVERIFIED lower nothing · f.onnx")


@pytest.mark.usefixtures("in_empty_folder")
@pytest.mark.parametrize("channels", [1, 5])
def test_a_file_of_somebody_else_may_take_other_than_three_channels(channels: int) -> None:
    shape, w = ("n", channels, 9, 10), (channels, 1, 13, 13)
    foreign(Path("f.onnx"), conv("x", "y", name="c", group=channels), shape=shape, w=w)
    made = pipeline.lower(Path("f.onnx"), form="grouped", max_growth=10)
    assert (made.verdict.state, made.lowered.changed) == ("provisional", True)
    timed = pipeline.bench(
        Path("f.onnx"), backends=("ort-cpu",), forms=("none",), max_seconds=0.01, allow_unverified=True
    )
    assert [row.facts["lowering"] for row in timed.bench.rows] == ["none"]
    model = onnx.load(made.file)
    del model.metadata_props[:]
    weight = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight)[::-1], weight.name))
    onnx.save(model, "wrong.onnx")
    assert pipeline.verify(Path("wrong.onnx"), Path("f.onnx")).state == "rejected"


def test_a_file_that_nothing_vouches_for_vouches_for_nothing(run: Path) -> None:
    loose = unverified(run)
    with pytest.raises(IntegrityError, match=r"loose\.onnx is unverified"):
        pipeline.lower(loose, form="grouped")
    assert pipeline.lower(loose, form="grouped", prove=False).verdict.state == "unverified"
    shutil.copy(run / "model.fp32.onnx", "changed.onnx")
    model = onnx.load("changed.onnx")
    model.graph.node[0].name = "changed"
    onnx.save(model, "changed.onnx")
    with pytest.raises(IntegrityError, match="not the file that its verdict"):
        pipeline.lower(Path("changed.onnx"), form="grouped")
    assert names(Path()) & {"loose.grouped.onnx", "changed.grouped.onnx"} == {"loose.grouped.onnx"}


def test_weights_that_grow_too_much_are_refused_by_name_and_bounded_by_auto(run: Path) -> None:
    done = ask("lower", "--lower", "dense")
    assert done.exit_code == 2
    assert "times as large, and 6 are allowed" in said(done.stderr)
    assert "raise --max-weight-growth" in said(done.stderr)
    assert not (run / "lowered").exists() or not names(run / "lowered")
    know(run, MS | {"dense": (1.0, 1.0)})
    free = pipeline.lower(run, root=run.parent, max_growth=1000)
    assert (free.plan.words, free.lowered.growth > 6) == ("dense 2 of 2", True)
    for growth, words in ((6, SECOND_DENSE), (free.lowered.growth + 1e-9, "dense 2 of 2"), (1, "")):
        made = pipeline.lower(run, root=run.parent, max_growth=growth)
        assert made.plan.words == words
        assert made.lowered.growth <= growth + 1e-3  # biases are repeated, too
        assert made.verdict.state == "pass"


@pytest.mark.parametrize(
    ("line", "words", "remedy"),
    [
        (("lower", "RUN/fused.safetensors"), "is no ONNX file", "replk export --onnx"),
        (("lower", "--backend", "torch"), "lowers weights when it opens them", "replk bench --backend torch"),
        (("lower", "--backend", "ort"), "there is no backend 'ort'", "ort-cpu"),
        (("lower", "--batch", "0"), "a batch of 0 images is none", "give --batch 1 or more"),
        (("lower", "--batch", "1", "--batch", "2"), "lowered for one batch", "--calibrate"),
        (("lower", "--max-weight-growth", "0.5"), "cannot become 0.5 times as large", "1 or more"),
        (("lower", "--precision", "int8"), "--precision int8 is not known", "choose from fp32"),
        (("lower", "dynamic.onnx", "--lower", "grouped"), "its height or width is not fixed", "--size"),
        (("lower", "dynamic.onnx"), "its height or width is not fixed", "--size"),
        (("lower", "--calibrate", "--backend", "aoti"), "builds engines", "calibrate another backend"),
        (("lower", "--calibrate", "dynamic.onnx"), "no large convolution on a map of known size", "another file"),
        (("lower", "-o", "x.safetensors"), "does not end in .onnx", "-o"),
        (("lower", "-o", "RUN/model.fp32.onnx"), "is the file to start from", "-o"),
        (("export", "--onnx", "--lower", "auto"), "--lower auto and --backend go together", "name both"),
        (("export", "--onnx", "--lower", "dense", "--backend", "ort-cpu"), "go together", "name both"),
        (("export", "--lower", "grouped"), "belong to ONNX", "add --onnx"),
        (("bench", "--backend", "ort-cpu", "--lower", "fft"), "--lower fft is not known", "choose from auto, none"),
    ],
)
def test_what_cannot_be_lowered_is_2_and_says_what_can(
    run: Path, line: tuple[str, ...], words: str, remedy: str
) -> None:
    foreign(Path("dynamic.onnx"), conv("x", "y", name="c", group=3), shape=("n", 3, "h", "w"), w=(3, 1, 13, 13))
    before = names(Path())
    done = ask(*(word.replace("RUN", str(run)) for word in line))
    assert done.exit_code == 2, done.output
    assert words in said(done.stderr)
    assert remedy in said(done.stderr)
    assert last(done.stderr).startswith(f"ERROR {line[0]}: ")
    assert names(Path()) == before


# --- calibrate ----------------------------------------------------------------------------------------------------


def test_a_calibration_is_kept_where_auto_looks_first(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.lowering.calibrating, "STRETCH_MS", 0.01)
    done = ask("lower", "--calibrate", "--batch", "1", "--batch", "2", "--json", "-")
    assert done.exit_code == 0, done.output
    path = run.parent / costs.FILE
    found = costs.read(path)
    assert json.loads(done.stdout) == json.loads(path.read_text())
    assert last(done.stderr) == "PASS lower --calibrate ort-cpu: 12 times · replk-out/calibration.json"
    assert {(c.channels, c.taps, c.map) for c in found.costs} == {(4, (13, 13), (16, 16)), (6, (7, 7), (8, 8))}
    assert {(c.batch, c.form) for c in found.costs} == {(b, f) for b in (1, 2) for f in MS}
    assert found.environment["cpu"] == machine.environment()["cpu"]
    assert not (run / "lowered").exists()
    for batch in (1, 2):
        best: dict[tuple[int, ...], Cost] = {}
        for cost in (c for c in found.costs if c.batch == batch):
            best[cost.map] = min(cost, best.get(cost.map, cost), key=lambda c: c.ms)
        decided = pipeline.lower(run, root=run.parent, batch=batch, max_growth=1000, prove=False).plan.decisions
        for decision in decided:
            fastest = best[decision.site.map]
            assert decision.measured
            assert decision.ms[fastest.form] == fastest.ms
            assert decision.ms[decision.form] <= decision.ms["none"]
    know(run)
    assert ask("lower").exit_code == 0
    assert graph.header(run / AUTO).lowered == ALL_GROUPED


# --- export -------------------------------------------------------------------------------------------------------


def test_an_export_may_be_lowered_at_once(run: Path) -> None:
    done = ask("export", "--onnx", "--lower", "grouped", "--batch", "1:2:4", "--no-verify")
    assert done.exit_code == 0, done.output
    assert last(done.stdout).startswith(f"UNVERIFIED export fp32, {ALL_GROUPED} · replk-out/")
    workspace = Workspace.open(run)
    assert graph.header(workspace.take(NAME)).batch == "1:2:4"
    assert workspace.entry(NAME).made_from == {"model.fp32.onnx": files.sha256(workspace.take("model.fp32.onnx"))}


def test_a_checkpoint_becomes_a_lowered_file_judged_by_the_checkpoint(run: Path) -> None:
    know(run, batches=(2,))
    line = ("export", "ckpt.pth", "--onnx", "--lower", "auto", "--backend", "ort-cpu", "--batch", "1:2:4")
    done = ask(*line, "-o", "deep/c.onnx")
    assert done.exit_code == 0, done.output
    assert names(Path("deep")) == {"c.onnx", "c.fused.safetensors"}
    made = Path("deep/c.onnx")
    metadata = graph.header(made)
    assert metadata.lowered == ALL_GROUPED
    assert (metadata.verdict.state, metadata.verdict.content) == ("pass", graph.content_hash(made))
    assert metadata.verdict.reference == files.sha256(Path("ckpt.pth"))
    assert off(made, run) < 1e-5
    assert not (run / "lowered").exists()


def test_a_fused_file_outside_of_a_run_is_lowered_itself(run: Path) -> None:
    """The latest run is that of another network."""
    other = networks.save_as_trained(networks.trained(WIDE, seed=5), Path("other.pth"))
    fused = pipeline.fuse(other, output=Path("apart/fused.safetensors"), prove=False).file
    made = pipeline.export_lowered(fused, form="grouped", backend=None, batch=Batch(min=1, opt=1, max=1), prove=False)
    assert made.file == Path("model.fp32.grouped.onnx")
    assert graph.header(made.file).source_sha256 == files.sha256(other)
    assert not (run / "lowered").exists()


# --- bench --------------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch, home: Any, name: str) -> list[tuple[Any, ...]]:
    calls, honest = [], getattr(home, name)
    monkeypatch.setattr(home, name, lambda *args, **options: calls.append(args) or honest(*args, **options))
    return calls


def test_bench_times_a_network_as_it_is_and_lowered_side_by_side(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    know(run, batches=(1, 3))
    looked = [counted(monkeypatch, lowered_by, name) for name in ("find", "weight_bytes")]
    timed = pipeline.bench(
        run, backends=("ort-cpu",), batches=(1, 3), forms=("none", "auto"), max_seconds=0.01, root=run.parent
    )
    rows = {(r.model, r.batch): r for r in timed.bench.rows}
    assert set(rows) == {(m, n) for m in ("", "lowered") for n in (1, 3)}
    for batch in (1, 3):
        plain, lowered = rows["", batch], rows["lowered", batch]
        assert (plain.facts["lowering"], lowered.facts["lowering"]) == ("none", ALL_GROUPED)
        assert plain.facts["sha256"] != lowered.facts["sha256"]
        assert plain.ratio is None
        assert lowered.ratio.baseline == f"ort-cpu b{batch}"
        assert lowered.ratio.rounds
    assert {n: a.passed for n, a in timed.agreements.items()} == {"ort-cpu": True, "lowered ort-cpu": True}
    assert {a.against for a in timed.agreements.values()} == {"float64"}
    assert Workspace.open(run).entry(AUTO).verdict.state == "pass"
    assert looked == [[(run / "model.fp32.onnx",)]] * 2, "once a file, whatever the batches"


def test_bench_lowers_on_its_own_where_that_is_known_to_gain(run: Path) -> None:
    know(run, MS | {"grouped": (3.9, 2.0), "dense": (3.9, 3.9)})
    for form, words in (("auto", "grouped 1 of 2"), ("none", "none"), ("grouped", ALL_GROUPED)):
        done = ask("bench", "--backend", "ort-cpu", "--max-seconds", "0.01", "--json", "-", "--lower", form)
        assert done.exit_code == 0, done.output
        (row,) = json.loads(done.stdout)["rows"]
        assert (row["model"], row["facts"]["lowering"]) == ("", words)
    know(run, {"none": (1.0, 1.0), "grouped": (2.0, 2.0)})
    timed = pipeline.bench(run, backends=("ort-cpu",), forms=("none", "auto"), max_seconds=0.01, root=run.parent)
    assert [(row.model, row.facts["lowering"]) for row in timed.bench.rows] == [("", "none")]


def test_a_file_that_is_timed_alone_is_lowered_beside_nobody(run: Path) -> None:
    shutil.copy(run / "model.fp32.onnx", "alone.onnx")
    before = names(Path())
    timed = pipeline.bench(Path("alone.onnx"), backends=("ort-cpu",), forms=("none", "grouped"), max_seconds=0.01)
    assert [(row.model, row.facts["lowering"]) for row in timed.bench.rows] == [("", "none"), ("grouped", ALL_GROUPED)]
    assert {n: a.against for n, a in timed.agreements.items()} == {"grouped ort-cpu": "the reference graph"}
    assert names(Path()) == before


# --- PyTorch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["grouped", "dense"])
def test_pytorch_lowers_weights_when_it_opens_them(run: Path, form: str) -> None:
    fused = run / "fused.safetensors"
    x = np.random.default_rng(0).standard_normal((3, 3, *SIZE), dtype=np.float32)
    as_it_is = Settings(
        layout="nchw"
    )  # the faster layout may be another each time, and dense is equal to the bit in nhwc
    taken = dataclasses.replace(as_it_is, forms=tuple((s, form) for s in SITES))
    with Torch(fused, as_it_is) as plain, Torch(fused, taken) as lowered:
        wanted, got = plain.run(x)["logits"], lowered.run(x)["logits"]
        made = {n: type(m) for n, m in lowered._model.named_modules() if isinstance(m, Rewritten)}
        assert sorted(made) == SITES
        assert not [m for m in plain._model.modules() if isinstance(m, Rewritten)]
    assert 0 < np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 1e-5


def test_pytorch_is_timed_as_the_calibration_says_and_judged_by_float64(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(run, MS | {"dense": (3.0, 1.0)}, runtime="torch")

    def bench(form: str) -> Any:
        return pipeline.bench(run, backends=("torch",), forms=("none", form), max_seconds=0.01, root=run.parent)

    looked, opened = (
        counted(monkeypatch, home, name) for home, name in ((lowered_by, "find_network"), (weights, "read"))
    )
    timed = bench("auto")
    assert (len(looked), len(opened)) == (1, 3), "by the float64 network and the two rows; not to find what to lower"
    assert [(r.model, r.facts["lowering"]) for r in timed.bench.rows] == [("", "none"), ("lowered", SECOND_DENSE)]
    assert timed.bench.rows[1].ratio.baseline == "torch b1"
    assert timed.agreements["lowered torch"].passed
    assert timed.agreements["lowered torch"].against == "float64"
    assert timed.agreements["lowered torch"].worst != timed.agreements["torch"].worst
    for home in (grouped, dense):
        monkeypatch.setattr(home, "centre", BUGS["P + 1 in rows"])
    with pytest.raises(MismatchError, match="lowered torch answers wrongly"):
        bench("auto")


# --- build --------------------------------------------------------------------------------------------------------


def test_a_package_is_compiled_from_the_forms_of_its_recipe(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def rewritten(_model: Any, size: tuple[int, int], forms: dict[str, str]) -> Any:
        seen.append((size, forms))
        raise InterruptedError

    monkeypatch.setattr(aoti, "_compilers", lambda _device: {})
    monkeypatch.setattr(aoti.modules, "rewritten", rewritten)
    know(run, MS | {"dense": (3.0, 1.0)}, runtime="torch")
    for options, forms in (
        ({"form": "none"}, {}),
        ({"form": "grouped"}, dict.fromkeys(SITES, "grouped")),
        ({"recipe": Recipe(batches=(Batch(min=1, opt=1, max=4),))}, {SITES[0]: "grouped", SITES[1]: "dense"}),
    ):
        with pytest.raises(ReplkError):  # the interruption, as an error of writing
            pipeline.build(run, backend="aoti", root=run.parent, **options)
        assert seen.pop() == (SIZE, forms)


@pytest.fixture
def copier(monkeypatch: pytest.MonkeyPatch) -> type[test_build.Copier]:
    monkeypatch.setitem(backends.BACKENDS, test_build.NAME, f"{test_build.__name__}:Copier")
    monkeypatch.setattr(test_build.Copier, "builds", 0)
    return test_build.Copier


def test_an_engine_is_built_of_the_lowered_file_and_kept(run: Path, copier: type[test_build.Copier]) -> None:
    know(run, runtime=copier.name)
    for _ in range(2):
        timed = pipeline.bench(run, backends=(copier.name,), max_seconds=0.01)
        assert timed.agreements[copier.name].passed
        assert copier.builds == 1
    made = sidecar.read(run / copier.name / "model.fp32.copy")
    lowered = Workspace.open(run).take("lowered/model.fp32.copier-b1.onnx")
    assert (made.source_sha256, made.header.lowered) == (files.sha256(lowered), ALL_GROUPED)
    built = pipeline.build(run, backend=copier.name, form="none")
    assert (copier.builds, built.sidecar.source, built.sidecar.header.lowered) == (2, "model.fp32.onnx", "")


def test_bench_times_an_engine_as_the_form_that_it_holds_and_as_no_other(
    run: Path, copier: type[test_build.Copier]
) -> None:
    know(run, runtime=copier.name)

    def bench(*forms: str) -> tuple[list[str], set[str]]:
        done = pipeline.bench(run, backends=(copier.name,), forms=forms, max_seconds=0.01, root=run.parent)
        return [row.facts["lowering"] for row in done.bench.rows], set(done.bench.failures)

    assert bench("none") == (["none"], set()), "built as asked"
    assert bench("auto") == (["none"], set()), "taken as it is"
    with pytest.raises(ReplkError, match="copy was built with large convolutions as none, not as grouped") as caught:
        bench("grouped")
    assert f"replk build --backend {copier.name} --lower grouped" in caught.value.remedy
    pipeline.build(run, backend=copier.name, form="grouped")
    assert bench("grouped") == ([ALL_GROUPED], set())
    assert bench("auto", "none", "dense") == ([ALL_GROUPED], {f"{copier.name} --lower {f}" for f in ("none", "dense")})
    assert copier.builds == 2
    with pytest.raises(ReplkError, match="as grouped 2 of 2, not as none"):
        pipeline.bench(run / copier.name / "model.fp32.copy", backends=(copier.name,), forms=("none",))


def test_without_a_proof_of_the_engine_the_lowered_file_has_none_either(
    run: Path, copier: type[test_build.Copier], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("prove_file", "prove_graphs", "prove_backend", "prove_by_graph"):
        monkeypatch.setattr(lowering_.proving, name, lambda *_a, **_k: pytest.fail("it was judged"))
    name = "lowered/model.fp32.grouped.onnx"
    built = pipeline.build(run, backend=copier.name, form="grouped", prove=False)
    assert (built.verdict.state, built.sidecar.header.lowered) == ("unverified", ALL_GROUPED)
    assert Workspace.open(run).entry(name).verdict.state == "unverified"
    monkeypatch.undo()
    monkeypatch.setitem(backends.BACKENDS, test_build.NAME, f"{test_build.__name__}:Copier")
    assert pipeline.build(run, backend=copier.name, form="grouped").verdict.state == "pass"
    assert Workspace.open(run).entry(name).verdict.state == "pass", "what nobody judged is judged before it is used"
    again = pipeline.build(run, backend=copier.name, form="grouped", prove=False)
    assert (again.verdict.state, Workspace.open(run).entry(name).verdict.state) == ("unverified", "pass")


def test_a_file_that_nothing_vouches_for_is_not_built_because_it_was_lowered(
    run: Path, copier: type[test_build.Copier]
) -> None:
    loose = unverified(run)
    with pytest.raises(IntegrityError, match=r"loose\.onnx is unverified"):
        pipeline.build(loose, backend=copier.name, form="grouped")
    assert copier.builds == 0


def test_nothing_passes_by_answers_that_are_all_alike(run: Path, copier: type[test_build.Copier]) -> None:
    """Its last norm lets next to nothing through: a body of anything would answer the same."""
    dull = networks.trained(WIDE)
    dull.norm.weight.data.mul_(1e-9)
    pipeline.fuse(networks.save_as_trained(dull, Path("dull.pth")), root=run.parent)
    assert pipeline.export(root=run.parent).verdict.state == "pass", "proved with other norms, too"
    for line in (
        "lower --lower grouped",
        f"build --backend {copier.name}",
        "bench --backend torch --max-seconds 0.01",
        "bench --backend ort-cpu --lower grouped --max-seconds 0.01",
        "deploy dull.pth --backend torch --max-seconds 0.01",
    ):
        done = ask(*line.split())
        assert done.exit_code == 7, (line, done.output)
        assert "the proof would be blind" in said(done.output)
