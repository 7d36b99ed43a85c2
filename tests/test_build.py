"""An engine is vouched for by its sidecar, and opened on nothing less."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from replk_deploy import backends, files, pipeline
from replk_deploy.backends import sidecar
from replk_deploy.backends.base import DEFAULT, Array, Arrays, Engine, Launch, Made, Recipe, Settings
from replk_deploy.backends.ort import OrtCpu
from replk_deploy.batch import Batch
from replk_deploy.errors import Exit, IntegrityError, MismatchError, ReplkError, UnavailableError
from replk_deploy.metadata import Metadata
from replk_deploy.models.replknet import RepLKGeometry
from replk_deploy.progress import Progress
from replk_deploy.workspace import Workspace
from tests import networks

pytestmark = pytest.mark.usefixtures("short_timing")
TINY = RepLKGeometry(
    channels=(4, 6), depths=(1, 1), kernels=(7, 5), small=3, dw_channels=(4, 6), ffn_channels=(8, 12), classes=10
)
NAME = "copier"


class Copier(Engine):
    """A runtime whose engines are copies of the ONNX file, opened by ONNX Runtime; the tests turn its screws."""

    name: ClassVar[str] = NAME
    takes: ClassVar[str] = "onnx"
    precisions: ClassVar[frozenset[str]] = frozenset({"fp32"})
    suffix: ClassVar[str] = ".copy"
    ingredients: ClassVar[frozenset[str]] = frozenset({"batches"})

    version: ClassVar[str] = "1"
    missing: ClassVar[str] = ""
    spoil: ClassVar[bool] = False
    builds: ClassVar[int] = 0

    @classmethod
    def probe(cls) -> Mapping[str, str]:
        if cls.missing:
            raise UnavailableError(cls.missing, "buy one")
        return {"copier": cls.version}

    @classmethod
    def build(cls, source: Path, out: Path, recipe: Recipe, progress: Progress) -> Made:
        progress("copy", 0, 1)
        Copier.builds += 1
        model = onnx.load(source)
        if cls.spoil:
            bias = next(t for t in model.graph.initializer if t.name.endswith("head.bias"))
            spoilt = onnx.numpy_helper.to_array(bias)[::-1] + 1
            bias.CopyFrom(onnx.numpy_helper.from_array(spoilt, bias.name))
        onnx.save(model, out)
        with OrtCpu(source) as opened:
            return Made(opened.input, opened.outputs, recipe.batches, {"copier": cls.version}, {"size": "1"})

    def __init__(self, artefact: Path, settings: Settings = DEFAULT) -> None:
        said = sidecar.read(artefact)
        sidecar.demand(artefact, said, self.name, dict(self.probe()))
        self._inner = OrtCpu(artefact, settings)
        self.input, self.outputs, self.precision = said.input, said.outputs, said.precision
        self.batches, self.facts = said.batches, self.probe()

    def _run(self, images: Array) -> Arrays:
        return self._inner._run(images)

    def prepare(self, images: Array) -> Launch:
        return self._inner.prepare(images)

    def close(self) -> None:
        self._inner.close()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, NAME, f"{__name__}:Copier")
    monkeypatch.setattr(Copier, "builds", 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    ckpt = networks.save_as_trained(networks.trained(TINY), root / "ckpt.pth", input_size=32)
    pipeline.fuse(ckpt, root=root / "out")
    pipeline.export(root=root / "out", batch=Batch(min=1, opt=1, max=4), size=(32, 32))
    return root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "work")
    return next(p.parent for p in (tmp_path / "work" / "out").rglob("manifest.json"))


def build(run: Path, **options: Any) -> pipeline.Built:
    return pipeline.build(run, backend=NAME, **options)


def test_an_engine_in_a_run_is_judged_entered_and_described(run: Path) -> None:
    made = build(run)
    assert (made.file, made.verdict.state) == (run / NAME / "model.fp32.copy", "pass")
    said = sidecar.read(made.file)
    assert (said.sha256, said.verdict.content) == (files.sha256(made.file), sidecar.content(said))
    assert (said.source, said.source_sha256) == ("model.fp32.onnx", files.sha256(run / "model.fp32.onnx"))
    assert said.header.preprocessing.size == (32, 32)
    assert json.loads(sidecar.place(made.file).read_text())["schema"] == "replk.engine/1"
    entry = Workspace(run).entry("copier/model.fp32.copy")
    assert (entry.by, entry.verdict.state, entry.made_from) == ("build", "pass", {said.source: said.source_sha256})
    assert made.proof.agreements[0].against == "float64"


def test_bench_builds_what_it_lacks_once(run: Path) -> None:
    for _ in range(2):
        timed = pipeline.bench(run, backends=(NAME,), max_seconds=0.1)
        assert timed.artefacts == {NAME: "model.fp32.copy"}
        assert timed.agreements[NAME].passed
    assert Copier.builds == 1


def test_another_version_or_source_is_built_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.bench(run, backends=(NAME,), max_seconds=0.1)
    monkeypatch.setattr(Copier, "version", "2")
    pipeline.bench(run, backends=(NAME,), max_seconds=0.1)
    assert Copier.builds == 2
    pipeline.export(run, batch=Batch(min=1, opt=1, max=3), size=(32, 32))
    pipeline.bench(run, backends=(NAME,), max_seconds=0.1)
    assert Copier.builds == 3


def test_an_engine_of_another_version_is_refused_with_the_way_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(run).file
    monkeypatch.setattr(Copier, "version", "2")
    with pytest.raises(IntegrityError, match="built with copier 1, here 2") as caught:
        pipeline.bench(engine, backends=(NAME,), max_seconds=0.1)
    assert caught.value.code == Exit.INTEGRITY
    assert caught.value.remedy == "build it here: replk build model.fp32.onnx --backend copier"


@pytest.mark.parametrize(
    "what",
    [
        "engine",
        "verdict",
        "no sidecar",
        "other engine",
        "not json",
        "newer",
        "profiles",
        "versions",
        "precision",
        "null",
    ],
)
def test_an_engine_that_is_not_the_described_one_never_reaches_the_runtime(
    run: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(run).file
    beside = sidecar.place(engine)
    record = json.loads(beside.read_text())
    match what:
        case "engine":
            engine.write_bytes(engine.read_bytes() + b" ")
        case "verdict":
            record["verdict"] = {"state": "pass"}
        case "other engine":
            record["sha256"] = "0" * 64
        case "profiles":
            record["batches"] = [{"min": 1, "opt": 1, "max": 999}]
        case "versions":
            record["made_with"] = {}
        case "precision":
            record["precision"] = "bf16"
        case "null":
            record["made_with"] = None
        case "newer":
            record["schema"] = "replk.engine/999"
    beside.write_text("{" if what == "not json" else json.dumps(record))
    if what == "no sidecar":
        beside.unlink()
    monkeypatch.setattr(Copier, "_run", lambda *_: pytest.fail("the runtime was asked"))
    for ask in (
        lambda: pipeline.bench(engine, backends=(NAME,), max_seconds=0.1, allow_unverified=True),
        lambda: Copier(engine),
    ):
        with pytest.raises(IntegrityError):
            ask()


def test_a_wrong_engine_is_rejected_kept_apart_and_not_timed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copier, "spoil", True)
    made = build(run)
    assert made.verdict.state == "rejected"
    assert made.file == run / "rejected" / "model.fp32.copy"
    assert sidecar.read(made.file).verdict.state == "rejected"
    assert not (run / NAME).exists() or not list((run / NAME).iterdir())
    assert Workspace(run).entry("copier/model.fp32.copy") is None
    with pytest.raises(MismatchError, match="was rejected"):
        pipeline.bench(run, backends=(NAME,), max_seconds=0.1)


def test_an_engine_for_an_absent_device_is_unverified_and_says_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copier, "missing", "there is no copier in this room")
    made = build(run)
    assert (made.verdict.state, made.proof) == ("unverified", None)
    assert "there is no copier" in made.verdict.why
    monkeypatch.setattr(Copier, "missing", "")
    with pytest.raises(IntegrityError, match="is unverified"):
        pipeline.bench(made.file, backends=(NAME,), max_seconds=0.1)
    timed = pipeline.bench(made.file, backends=(NAME,), max_seconds=0.1, allow_unverified=True)
    assert timed.unverified == (NAME,)


def test_a_foreign_graph_needs_consent_and_vouches_provisionally(run: Path, tmp_path: Path) -> None:
    model = onnx.load(run / "model.fp32.onnx")
    del model.metadata_props[:]
    foreign = tmp_path / "foreign.onnx"
    onnx.save(model, foreign)
    with pytest.raises(IntegrityError, match="has no verdict"):
        pipeline.build(foreign, backend=NAME)
    made = pipeline.build(foreign, backend=NAME, allow_unverified=True)
    assert made.file == tmp_path / "foreign.copier.copy"
    assert (made.verdict.state, made.proof.agreements[0].against) == ("provisional", "the reference graph")
    assert sidecar.read(made.file).header is None


def test_an_engine_is_a_side_of_verify_like_any_other(run: Path, tmp_path: Path, finished: Path) -> None:
    engine, ckpt = build(run).file, finished / "ckpt.pth"
    for pair in ((ckpt, engine), (engine, ckpt), (run / "fused.safetensors", engine)):
        assert pipeline.verify(*pair).state == "pass"
    assert pipeline.verify(run / "model.fp32.onnx", engine).state == "provisional"
    other = networks.save_as_trained(networks.trained(TINY, seed=3), tmp_path / "other.pth", input_size=32)
    assert pipeline.verify(other, engine).state == "rejected"
    with pytest.raises(ReplkError, match="two engines"):
        pipeline.verify(engine, engine)


def test_a_wrong_question_is_refused(run: Path) -> None:
    with pytest.raises(ReplkError, match=r"opens \.onnx files as they are"):
        pipeline.build(run, backend="ort-cpu")
    with pytest.raises(ReplkError, match="knows no level, refittable"):
        build(run, recipe=Recipe(level=3, refittable=True))
    with pytest.raises(ReplkError, match=r"model\.<precision>\.onnx"):
        pipeline.build(run / "fused.safetensors", backend=NAME)
    with pytest.raises(ReplkError, match="its own"):
        pipeline.bench(run / "model.fp32.onnx", backends=(NAME,), max_seconds=0.1)
    with pytest.raises(UnavailableError, match="cannot replace the weights"):
        build(run, refit=build(run).file, output=run.parent / "new.copy")
    with pytest.raises(ReplkError, match="is the file to start from"):
        build(run, refit=run / NAME / "model.fp32.copy")
    with pytest.raises(ReplkError, match="keeps the recipe"):
        build(run, refit=run / NAME / "model.fp32.copy", recipe=Recipe(batches=(Batch(min=1, opt=1, max=1),)))


def test_an_interrupted_build_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(p for p in run.rglob("*") if p.is_file() and p.name != ".lock")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Copier, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(run)
    assert sorted(p for p in run.rglob("*") if p.is_file() and p.name != ".lock") == before


def test_batches_outside_the_profile_are_refused_and_judged_within(run: Path) -> None:
    made = build(run, recipe=Recipe(batches=(Batch(min=2, opt=2, max=3),)))
    assert made.verdict.state == "pass"
    with (
        Copier(made.file) as engine,
        pytest.raises(ReplkError, match=r"built for 2:2:3 images at a time, not 4"),
    ):
        engine.run(np.zeros((4, 3, 32, 32), np.float32))


def test_the_sidecar_returns_as_it_was_written(run: Path) -> None:
    said = build(run, recipe=Recipe(batches=(Batch(min=1, opt=2, max=4),))).sidecar
    again = sidecar.read(run / NAME / "model.fp32.copy")
    assert again == said
    assert isinstance(again.header, Metadata)
    assert again.batches == (Batch(min=1, opt=2, max=4),)
