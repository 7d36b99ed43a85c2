"""The chain as a user drives it: what is called proved was proved, and what failed is kept apart."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replk_deploy import checkpoint, files, graph, pipeline, proof, records, sources, weights
from replk_deploy import export as exporting
from replk_deploy import fuse as fusing
from replk_deploy.backends import BACKENDS, cuda, find
from replk_deploy.backends.base import Settings
from replk_deploy.backends.ort import OrtCpu
from replk_deploy.backends.torch import Torch
from replk_deploy.batch import Batch
from replk_deploy.bench import Bench
from replk_deploy.checkpoint import Loaded
from replk_deploy.errors import Exit, IntegrityError, MismatchError, ReplkError, UnavailableError
from replk_deploy.models import baselines, reparam
from replk_deploy.models.replknet import RepLKGeometry, RepLKNet
from replk_deploy.preprocess import Preprocessing
from replk_deploy.workspace import Workspace
from tests import networks

pytestmark = pytest.mark.usefixtures("short_timing")
TINY = RepLKGeometry(
    channels=(4, 6), depths=(1, 1), kernels=(13, 7), small=3, dw_channels=(4, 6), ffn_channels=(8, 12), classes=10
)
ONE = Batch(min=1, opt=1, max=1)
SIZE = (64, 64)


@pytest.fixture(scope="module")
def net() -> RepLKNet:
    return networks.trained(TINY)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory, net: RepLKNet) -> Path:
    """A training checkpoint with two sets of weights."""
    path = tmp_path_factory.mktemp("ckpt") / "checkpoint-best.pth"
    networks.save_as_trained(net, path)
    saved = torch.load(path, weights_only=False)
    torch.save(saved | {"model_ema": networks.trained(TINY, seed=1).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def opened(ckpt: Path) -> Loaded:
    return checkpoint.load(ckpt)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run of the same training."""
    return networks.save_as_trained(networks.trained(TINY, seed=2), tmp_path_factory.mktemp("other") / "other.pth")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ckpt: Path) -> tuple[Path, Path]:
    """A root with one run: fused, exported in fp32, both passed; never changed by a test."""
    root = tmp_path_factory.mktemp("finished") / "replk-out"
    fused = pipeline.fuse(ckpt, root=root)
    made = pipeline.export(root=root)
    assert (fused.verdict.state, made.verdict.state) == ("pass", "pass")
    return root, fused.file.parent


@pytest.fixture
def run(finished: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the finished run; its root is its parent folder."""
    root, folder = finished
    shutil.copytree(root, tmp_path / "replk-out")
    return tmp_path / "replk-out" / folder.name


@pytest.fixture(scope="module")
def unverified(tmp_path_factory: pytest.TempPathFactory, ckpt: Path) -> Path:
    made = pipeline.fuse(ckpt, output=tmp_path_factory.mktemp("unverified") / "fused.safetensors", prove=False)
    assert made.verdict.state == "unverified"
    return made.file


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def images(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    return float(((got.double() - wanted.double()).norm(dim=1) / wanted.double().norm(dim=1)).max())


def answer(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        (logits,) = proof.cast(model, torch.float64)(x.double())
    return logits


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the small kernel of the first stage come to lie one pixel off."""
    honest = reparam.embed_kernel
    monkeypatch.setattr(
        reparam,
        "embed_kernel",
        lambda small, size: honest(small, size).roll(1, -1) if size == 13 else honest(small, size),
    )


def perturbed(monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    """Let the exporter spoil one weight of one node of the file it writes."""
    honest = exporting.export

    def export(model: Any, path: Path, **options: Any) -> Any:
        made = honest(model, path, **options)
        spoilt = onnx.load(path)
        name = next(n for n in spoilt.graph.node if n.name.startswith(node) and n.op_type == "Conv").input[1]
        tensor = next(t for t in spoilt.graph.initializer if t.name == name)
        values = onnx.numpy_helper.to_array(tensor).copy()
        values.flat[values.size // 2] += 1
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
        onnx.save(spoilt, path)
        return made

    monkeypatch.setattr(exporting, "export", export)


# --- fuse ---------------------------------------------------------------------------------------------------------


def test_fuse_to_a_path_writes_that_file_alone_and_it_computes_the_same(
    in_empty_folder: Path, ckpt: Path, net: RepLKNet
) -> None:
    made = pipeline.fuse(ckpt, output=Path("out") / "fused.safetensors")
    assert names(in_empty_folder) == {"out/fused.safetensors"}
    model, metadata = weights.read(made.file)
    assert off(answer(model, images()), answer(net, images())) < 1e-5
    assert (model.form, metadata.precision, metadata.source_name) == ("folded", "fp32", "checkpoint-best.pth")
    assert metadata.source_sha256 == files.sha256(ckpt)
    assert metadata.verdict == made.verdict
    assert (made.verdict.state, made.verdict.content) == ("pass", weights.judged_hash(model, made.metadata))
    assert made.verdict.reference == metadata.source_sha256
    assert 0 < made.verdict.worst < 1


def test_a_path_may_be_text(tmp_path: Path, ckpt: Path) -> None:
    assert records.plain(pipeline.inspect(str(ckpt))) == records.plain(pipeline.inspect(ckpt))
    out = str(tmp_path / "fused.safetensors")
    assert pipeline.fuse(str(ckpt), output=out, prove=False).file == Path(out)
    assert pipeline.verify(str(ckpt), out).state == "pass"


def test_fuse_into_a_run_is_entered_and_becomes_the_latest(finished: tuple[Path, Path], ckpt: Path) -> None:
    root, folder = finished
    run = Workspace.latest(root)
    assert run.folder == folder
    entry = run.entry("fused.safetensors")
    assert entry.made_from == {"checkpoint-best.pth": files.sha256(ckpt)}
    assert (entry.by, entry.verdict.state) == ("fuse", "pass")
    assert run.take("fused.safetensors").is_file()
    record = json.loads(run.path("results/fused.safetensors.json").read_text())
    assert record["schema"] == "replk.fused/1"
    assert record["verdict"]["content"] == entry.verdict.content
    assert not list(root.rglob("*.part"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_merged_form_loads_strictly_into_the_reference_layout(
    tmp_path: Path, ckpt: Path, net: RepLKNet, suffix: str
) -> None:
    made = pipeline.fuse(ckpt, level="merge", output=tmp_path / f"merged{suffix}")
    if suffix == ".pth":
        state = torch.load(made.file, weights_only=True)
        assert list(state) == list(RepLKNet.empty(TINY, "merged").state_dict())
    else:
        state = weights.read(made.file)[0].state_dict()
    reference = RepLKNet.build(TINY, "merged")
    reference.load_state_dict(state, strict=True)
    assert not [k for k in state if "lkb_origin" in k or "small_conv" in k]
    assert state["stages.0.blocks.0.large_kernel.lkb_reparam.weight"].shape == (4, 1, 13, 13)
    assert {"stages.0.blocks.0.large_kernel.lkb_reparam.bias", "stem.0.bn.running_mean", "norm.weight"} <= state.keys()
    assert off(answer(reference, images()), answer(net, images())) < 1e-5
    assert (made.verdict.state, made.fusion.merged) == (
        "pass",
        tuple(f"stages.{s}.blocks.0.large_kernel" for s in (0, 1)),
    )
    assert made.fusion.left


def test_fusing_a_fused_file_changes_nothing_and_keeps_its_verdict(tmp_path: Path, run: Path) -> None:
    first = run / "fused.safetensors"
    again = pipeline.fuse(first, output=tmp_path / "again.safetensors")
    assert not again.fusion.changed
    assert again.proof is None
    assert weights.header(again.file) == weights.header(first)
    assert weights.content_hash(weights.read(again.file)[0]) == weights.content_hash(weights.read(first)[0])


def test_fusing_an_unverified_file_again_vouches_for_nothing(tmp_path: Path, unverified: Path, ckpt: Path) -> None:
    again = pipeline.fuse(unverified, output=tmp_path / "again.safetensors")
    assert again.verdict.state == "unverified"
    merged = pipeline.fuse(ckpt, level="merge", output=tmp_path / "merged.safetensors", prove=False)
    full = pipeline.fuse(merged.file, output=tmp_path / "full.safetensors")
    assert full.verdict.state == "provisional", "it was proved by a file that nothing vouches for"
    with pytest.raises(IntegrityError):
        pipeline.export(full.file, output=tmp_path / "m.onnx")


def test_fusing_a_proved_merged_file_to_the_end_is_proved(tmp_path: Path, ckpt: Path, net: RepLKNet) -> None:
    merged = pipeline.fuse(ckpt, level="merge", output=tmp_path / "merged.safetensors")
    full = pipeline.fuse(merged.file, output=tmp_path / "full.safetensors")
    assert (full.verdict.state, full.fusion.left) == ("pass", ())
    assert weights.header(full.file).source_sha256 == files.sha256(ckpt)
    assert off(answer(weights.read(full.file)[0], images()), answer(net, images())) < 1e-5


@given(label=st.text(max_size=40), selected=st.text(max_size=20))
def test_the_name_of_a_run_is_one_word_whatever_the_file_says(opened: Loaded, label: str, selected: str) -> None:
    name = sources.run_name(dataclasses.replace(opened, label=label, selected=selected))
    assert re.fullmatch("[a-z0-9_-]+", name)
    assert opened.sha256[:8] in name


def test_a_header_cannot_name_a_folder_or_a_command(tmp_path: Path, run: Path) -> None:
    path = tmp_path / "fused.safetensors"
    root = tmp_path / "deep" / "out"
    for selected in ("/../../../evil", "$(id>pwned)", "a\nb=c"):
        model, metadata = weights.read(run / "fused.safetensors")
        weights.write(path, model, dataclasses.replace(metadata, selected=selected, verdict=None))
        with pytest.raises(ReplkError, match="header is damaged: selected"):
            pipeline.fuse(path, prove=False, root=root)
        assert not list(tmp_path.rglob("evil*"))
        assert not root.exists()


@pytest.mark.parametrize("output", ["fused.bin", "fused", "fused.onnx", "fused.safetensors.gz"])
def test_an_unknown_ending_is_refused_before_anything_is_written(
    in_empty_folder: Path, ckpt: Path, output: str
) -> None:
    with pytest.raises(ReplkError, match=r"no known ending|does not end in"):
        pipeline.fuse(ckpt, output=Path(output))
    assert names(in_empty_folder) == set()


def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_left(in_empty_folder: Path, ckpt: Path) -> None:
    Path("file").write_text("in the way")
    for output in (Path("file") / "fused.safetensors", Path("/dev/null/fused.safetensors")):
        with pytest.raises(ReplkError, match="cannot be written"):
            pipeline.fuse(ckpt, output=output)
    Path("fused.safetensors").mkdir()
    with pytest.raises(ReplkError, match="cannot be written"):
        pipeline.fuse(ckpt, output=Path("fused.safetensors"), prove=False)
    assert names(in_empty_folder) == {"file"}


def test_a_rejected_file_goes_beside_its_name_and_the_good_one_stays(
    tmp_path: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = pipeline.fuse(ckpt, output=tmp_path / "fused.safetensors").file
    before = good.read_bytes()
    plant(monkeypatch)
    made = pipeline.fuse(ckpt, output=good)
    assert made.verdict.state == "rejected"
    assert "stages.0.blocks.0" in made.verdict.why
    assert made.file == tmp_path / "fused.rejected.safetensors"
    assert weights.header(made.file).verdict.state == "rejected"
    assert good.read_bytes() == before
    assert names(tmp_path) == {"fused.safetensors", "fused.rejected.safetensors"}
    with pytest.raises(IntegrityError):
        pipeline.export(made.file, output=tmp_path / "m.onnx")


def test_a_rejected_file_in_a_run_is_kept_apart_and_never_exported(
    tmp_path: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    root = tmp_path / "out"
    made = pipeline.fuse(ckpt, root=root)
    assert made.file == made.file.parent.parent / "rejected" / "fused.safetensors"
    run = Workspace.latest(root)
    assert run.entry("fused.safetensors") is None
    assert not run.path("fused.safetensors").exists()
    assert json.loads(run.path("rejected/fused.safetensors.json").read_text())["proof"]["state"] == "rejected"
    with pytest.raises(IntegrityError, match="is missing"):
        pipeline.export(root=root)
    with pytest.raises(MismatchError, match=r"the fusion was rejected: .*stages\.0\.blocks\.0"):
        pipeline.export(ckpt, root=root)


def test_a_run_keeps_the_good_file_when_a_later_one_is_rejected(
    run: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "fused.safetensors").read_bytes()
    plant(monkeypatch)
    assert pipeline.fuse(ckpt, root=run.parent, size=(72, 64)).verdict.state == "rejected"
    assert (run / "fused.safetensors").read_bytes() == before
    kept = Workspace.open(run)
    assert kept.entry("fused.safetensors").verdict.state == "pass"
    assert kept.take("fused.safetensors")
    assert (run / "rejected" / "fused.safetensors").is_file()


def interrupted(calls: int) -> Any:
    count = 0

    def listen(_step: str, _done: int, _total: int | None) -> None:
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt

    return listen


@pytest.mark.parametrize("calls", [1, 5, 17, 24])
def test_an_interrupted_fuse_leaves_nothing(tmp_path: Path, ckpt: Path, calls: int) -> None:
    for options in ({"root": tmp_path / "out"}, {"output": tmp_path / "out" / "f.safetensors"}):
        with pytest.raises(KeyboardInterrupt):
            pipeline.fuse(ckpt, progress=interrupted(calls), **options)
    assert names(tmp_path) == set()


# --- export -------------------------------------------------------------------------------------------------------


def test_the_exported_file_says_what_it_is_and_what_vouches_for_it(finished: tuple[Path, Path], ckpt: Path) -> None:
    root, folder = finished
    path = folder / "model.fp32.onnx"
    metadata = graph.header(path)
    assert (metadata.family, metadata.form, metadata.precision) == ("replknet", "folded", "fp32")
    assert metadata.source_sha256 == files.sha256(ckpt)
    assert metadata.preprocessing.size == SIZE
    assert (metadata.verdict.state, metadata.verdict.content) == ("pass", graph.content_hash(path))
    entry = Workspace.open(folder).entry("model.fp32.onnx")
    assert entry.made_from == {"fused.safetensors": files.sha256(folder / "fused.safetensors")}
    assert entry.verdict == metadata.verdict
    text = path.read_bytes()
    for place in (root, ckpt, Path.cwd(), Path.home()):
        assert str(place).encode() not in text


def test_every_way_to_name_the_source_gives_the_same_graph(
    run: Path, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"prove": False, "batch": ONE, "size": (32, 48), "root": run.parent}
    wanted = None
    sources = {
        "latest": None,
        "a run folder": run,
        "a fused file": run / "fused.safetensors",
        "a checkpoint": ckpt,
    }
    for name, source in sources.items():
        made = pipeline.export(source, output=Path(name) / "m.onnx", **options)
        assert made.file == Path(name) / "m.onnx"
        model = onnx.load(made.file)
        assert graph.header(made.file).preprocessing.size == (32, 48)
        assert (made.verdict.state, graph.header(made.file).verdict.state) == ("unverified", "unverified")
        wanted = wanted or model.graph
        assert model.graph == wanted, name
    assert names(tmp_path / "a checkpoint") == {"m.onnx", "m.fused.safetensors"}
    assert weights.header(Path("a checkpoint/m.fused.safetensors")).verdict.state == "unverified"


def test_an_export_of_a_checkpoint_fuses_into_a_run_first(tmp_path: Path, ckpt: Path, net: RepLKNet) -> None:
    made = pipeline.export(ckpt, root=tmp_path, batch=Batch(min=2, opt=2, max=2))
    run = Workspace.latest(tmp_path)
    assert {run.entry(n).verdict.state for n in ("fused.safetensors", "model.fp32.onnx")} == {"pass"}
    assert made.file == run.path("model.fp32.onnx")
    assert [a.name for a in made.proof.agreements] == ["checkpoint", "poisoned"]
    with OrtCpu(made.file) as backend:
        got = torch.from_numpy(backend.run(images(2).numpy())["logits"])
    assert off(got, answer(net, images(2))) < 1e-5


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-6), ("fp16", 1e-2), ("bf16", 1e-1)])
def test_cast_weights_are_proved_and_keep_their_type(
    run: Path, tmp_path: Path, net: RepLKNet, precision, allowed: float
) -> None:
    made = pipeline.export(run, onnx=False, precision=precision, output=tmp_path / "w.safetensors")
    model, metadata = weights.read(made.file)
    assert (made.export, made.verdict.state, metadata.precision) == (None, "pass", precision)
    assert metadata.verdict.content == weights.judged_hash(model, metadata)
    assert off(answer(model, images()), answer(net, images())) < allowed
    if precision != "fp32":
        with pytest.raises(ReplkError, match=f"holds {precision} weights"):
            pipeline.export(made.file, output=tmp_path / "m.onnx")


def test_unverified_weights_prove_nothing_and_are_not_timed(unverified: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="no passing verdict") as caught:
        pipeline.export(unverified, output=tmp_path / "m.onnx")
    assert caught.value.code == Exit.INTEGRITY
    with pytest.raises(IntegrityError, match="is unverified"):
        pipeline.bench(unverified, backends=("torch",))
    made = pipeline.export(unverified, output=tmp_path / "m.onnx", prove=False, batch=ONE)
    assert made.verdict.state == "unverified"
    with pytest.raises(IntegrityError, match="is unverified"):
        pipeline.bench(made.file, backends=("ort-cpu",))
    timed = pipeline.bench(made.file, backends=("ort-cpu",), allow_unverified=True, max_seconds=0.01)
    assert timed.bench.rows[0].n > 0
    assert names(tmp_path) == {"m.onnx"}


def test_weights_altered_under_their_verdict_are_refused(run: Path, tmp_path: Path) -> None:
    model, metadata = weights.read(run / "fused.safetensors")
    with torch.no_grad():
        model.head.bias[0] += 1e-6
    forged = tmp_path / "forged.safetensors"
    weights.write(forged, model, metadata)
    with pytest.raises(IntegrityError, match="not those its verdict speaks of"):
        pipeline.export(forged, output=tmp_path / "m.onnx")
    with pytest.raises(IntegrityError, match="not those its verdict speaks of"):
        pipeline.bench(forged, backends=("torch",))
    with pytest.raises(IntegrityError, match="not those its verdict speaks of"):
        pipeline.verify(forged, run / "model.fp32.onnx")


def test_a_spoilt_export_is_rejected_and_the_block_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (run / "model.fp32.onnx").read_bytes()
    perturbed(monkeypatch, "stages.1.blocks.0.large_kernel")
    made = pipeline.export(run, size=(48, 64))
    assert made.verdict.state == "rejected"
    assert [a.passed for a in made.proof.agreements] == [False, True]
    assert "first wrong block: stages.1.blocks.0," in made.verdict.why
    assert made.file == run / "rejected" / "model.fp32.onnx"
    assert graph.header(made.file).verdict.state == "rejected"
    assert (run / "model.fp32.onnx").read_bytes() == good
    assert Workspace.open(run).entry("model.fp32.onnx").verdict.state == "pass"
    with pytest.raises(IntegrityError, match="is rejected"):
        pipeline.bench(made.file, backends=("ort-cpu",))


def test_an_exporter_that_is_always_wrong_is_caught_beside_o(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = torch.onnx.export

    def export(*args: Any, **kwargs: Any) -> Any:
        program = honest(*args, **kwargs)
        value = program.model.graph.initializers["network.transitions.0.0.conv.bias"]
        value.const_value = exporting.ir.tensor(value.const_value.numpy() * 1.5)
        return program

    monkeypatch.setattr(torch.onnx, "export", export)
    (tmp_path / "m.onnx").write_text("an earlier file")
    made = pipeline.export(run, output=tmp_path / "m.onnx", precision="fp16", batch=ONE)
    assert (made.verdict.state, made.file.name) == ("rejected", "m.rejected.onnx")
    assert [a.passed for a in made.proof.agreements] == [False, False]
    assert "first wrong block: transitions.0.0," in made.verdict.why
    assert (tmp_path / "m.onnx").read_text() == "an earlier file"


@pytest.mark.parametrize("calls", [1, 3, 4])
def test_an_interrupted_export_leaves_the_run_as_it_was(run: Path, calls: int) -> None:
    before = {n: (run / n).read_bytes() for n in names(run)}
    with pytest.raises(KeyboardInterrupt):
        pipeline.export(run, precision="fp16", batch=ONE, progress=interrupted(calls))
    assert {n: (run / n).read_bytes() for n in names(run)} == before


def test_bfloat16_is_provisional_and_not_timed_without_consent(run: Path) -> None:
    made = pipeline.export(run, precision="bf16", batch=ONE)
    assert made.verdict.state == "provisional"
    assert "float32 twin" in made.verdict.why
    assert Workspace.open(run).entry("model.bf16.onnx").verdict.state == "provisional"
    with pytest.raises(IntegrityError, match="is provisional"):
        pipeline.bench(made.file, backends=("ort-cpu",))
    with pytest.raises(UnavailableError, match="no CPU kernels for bf16"):
        pipeline.bench(made.file, backends=("ort-cpu",), allow_unverified=True)


@pytest.mark.parametrize(
    ("onnx_", "output"), [(True, "m.safetensors"), (True, "m"), (False, "m.onnx"), (False, "m.pth")]
)
def test_the_ending_says_what_is_written(run: Path, in_empty_folder: Path, onnx_: bool, output: str) -> None:  # noqa: FBT001
    with pytest.raises(ReplkError, match=r"no known ending|does not end in"):
        pipeline.export(run, onnx=onnx_, output=Path(output))
    assert not (in_empty_folder / output).exists()
    assert not list(in_empty_folder.rglob("*.part"))


# --- verify -------------------------------------------------------------------------------------------------------


def test_files_of_one_network_agree_in_any_order(run: Path, ckpt: Path) -> None:
    fused, model = run / "fused.safetensors", run / "model.fp32.onnx"
    before = names(run)
    for pair in ((ckpt, fused), (fused, ckpt), (ckpt, model), (model, ckpt), (fused, model), (model, fused)):
        found = pipeline.verify(*pair)
        assert (found.state, found.structure) == ("pass", ()), pair
        assert 0 < found.worst < 1, pair
    assert names(run) == before
    found = pipeline.verify(model, model)
    assert found.state == "provisional"
    assert "no float64 network" in found.doubt


def test_a_file_of_another_network_is_rejected_in_any_order(run: Path, other: Path) -> None:
    fused, model = run / "fused.safetensors", run / "model.fp32.onnx"
    for pair in ((other, fused), (fused, other), (other, model), (model, other)):
        found = pipeline.verify(*pair)
        assert found.state == "rejected", pair
        assert found.worst > 100, pair


def test_half_precision_weights_are_judged_as_such(run: Path, ckpt: Path, other: Path, tmp_path: Path) -> None:
    half = pipeline.export(run, onnx=False, precision="fp16", output=tmp_path / "w.safetensors").file
    assert pipeline.verify(ckpt, half).state == "pass"
    assert pipeline.verify(other, half).state == "rejected"


def test_a_reference_that_nothing_vouches_for_gives_a_provisional_verdict(run: Path, unverified: Path) -> None:
    for candidate in (run / "fused.safetensors", run / "model.fp32.onnx"):
        found = pipeline.verify(unverified, candidate)
        assert found.state == "provisional"
        assert "no passing verdict" in found.doubt


def test_the_average_of_a_training_is_another_network(run: Path, ckpt: Path, tmp_path: Path) -> None:
    average = pipeline.fuse(ckpt, source="ema", output=tmp_path / "ema.safetensors").file
    for pair in ((ckpt, average), (average, ckpt)):
        assert pipeline.verify(*pair, source="ema").state == "pass"
        assert pipeline.verify(*pair).state == "rejected"
    assert pipeline.verify(ckpt, run / "fused.safetensors", source="ema").state == "rejected"


def test_outputs_of_unlike_shape_are_a_mismatch(run: Path, tmp_path: Path) -> None:
    backbone = networks.save_as_trained(networks.trained(networks.BACKBONE), tmp_path / "backbone.pth")
    found = pipeline.verify(backbone, run / "fused.safetensors")
    assert (found.state, found.agreements) == ("rejected", ())
    assert "'logits': (9, 10)}, the reference {'stage0': (9, 8, 16, 16)" in found.sentence


# --- bench --------------------------------------------------------------------------------------------------------


def test_a_run_is_timed_on_what_each_backend_starts_from(run: Path) -> None:
    timed = pipeline.bench(run, backends=("torch", "ort-cpu"), batches=(1, 3), max_seconds=0.01)
    assert timed.artefacts == {"torch": "fused.safetensors", "ort-cpu": "model.fp32.onnx"}
    assert [(r.backend, r.batch) for r in timed.bench.rows] == [(b, n) for b in ("torch", "ort-cpu") for n in (1, 3)]
    assert {n: a.passed for n, a in timed.agreements.items()} == {"torch": True, "ort-cpu": True}
    assert json.loads((run / "results" / "bench.json").read_text())["schema"] == "replk.bench/2"


def test_a_missing_export_is_built_proved_and_entered(run: Path) -> None:
    (run / "model.fp32.onnx").unlink()
    manifest = run / "manifest.json"
    record = json.loads(manifest.read_text())
    del record["artefacts"]["model.fp32.onnx"]
    manifest.write_text(json.dumps(record))
    timed = pipeline.bench(run, backends=("ort-cpu",), max_seconds=0.01)
    assert timed.artefacts == {"ort-cpu": "model.fp32.onnx"}
    assert Workspace.open(run).entry("model.fp32.onnx").verdict.state == "pass"


def test_a_backend_that_answers_wrongly_is_not_timed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = OrtCpu._run
    monkeypatch.setattr(OrtCpu, "_run", lambda self, x: {k: v[:, ::-1] for k, v in honest(self, x).items()})
    before = names(run)
    with pytest.raises(MismatchError, match="ort-cpu answers wrongly: normal"):
        pipeline.bench(run, backends=("ort-cpu",), max_seconds=0.01)
    assert names(run) == before


def test_a_wrong_answer_ends_a_deploy_as_rejected(
    copied: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, root, folder = copied
    honest = Torch._run
    monkeypatch.setattr(Torch, "_run", lambda self, x: {k: v[:, ::-1] for k, v in honest(self, x).items()})
    with pytest.raises(MismatchError, match="torch answers wrongly"):
        deploy(path, root, backends=("torch",))
    report = json.loads((folder / "report.json").read_text())
    assert report["state"] == "rejected"
    assert "torch answers wrongly" in report["runs"][0]["problem"]
    assert "rejected" in (folder / "report.md").read_text().splitlines()[0]


@pytest.mark.parametrize("artefact", ["run", "file"])
def test_an_answer_that_is_wrong_at_the_timed_batch_only_is_seen(
    run: Path, artefact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = find("openvino")
    honest = openvino._run
    where = run if artefact == "run" else run / "model.fp32.onnx"
    assert pipeline.bench(where, backends=("openvino",), batches=(12,), max_seconds=0.01).bench.rows

    def spoilt(self: Any, x: Any) -> Any:
        return {k: v * (0 if len(x) == 12 else 1) for k, v in honest(self, x).items()}

    monkeypatch.setattr(openvino, "_run", spoilt)
    with pytest.raises(MismatchError, match="answers wrongly"):
        pipeline.bench(where, backends=("openvino",), batches=(12,), max_seconds=0.01)


@pytest.mark.parametrize("name", ["torch", "ort-cpu", "openvino"])
def test_a_launch_that_gives_another_answer_than_was_judged_is_not_timed(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = find(name)
    honest = kind.prepare
    monkeypatch.setattr(kind, "prepare", lambda self, x: honest(self, np.zeros_like(x)))
    with pytest.raises(MismatchError, match=f"{name} times something else than it answers"):
        pipeline.bench(run, backends=(name,), max_seconds=0.01)


def test_a_backend_that_fails_on_the_way_leaves_the_others_in_the_race(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise UnavailableError("the device is gone", "find it")

    with monkeypatch.context() as patch:
        patch.setattr(Torch, "_run", broken)
        timed = pipeline.bench(run, backends=("torch", "ort-cpu"), max_seconds=0.01)
    assert [row.backend for row in timed.bench.rows] == ["ort-cpu"]
    assert (timed.bench.baseline, timed.bench.rows[0].ratio) == ("torch", None)
    assert "the device is gone" in timed.bench.failures["torch"]
    monkeypatch.setattr(Torch, "_run", broken)
    with pytest.raises(UnavailableError, match="the device is gone"):
        pipeline.bench(run, backends=("torch",), max_seconds=0.01)


class Ours(Torch):
    """A backend that runs no network of anybody else."""

    name = "ours"
    families = frozenset({RepLKNet.family})


def test_a_backend_of_our_networks_alone_leaves_another_to_the_others(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(*backends: str) -> Bench:
        settings = Settings(layout="nchw")
        return pipeline.bench(
            run, backends=backends, baselines=("timm:test_resnet",), settings=settings, max_seconds=0.01
        ).bench

    sized = functools.partial(baselines.baseline, size=SIZE)
    monkeypatch.setattr(baselines, "baseline", sized)
    monkeypatch.setitem(BACKENDS, "ours", f"{__name__}:Ours")
    both = timed("ours", "torch")
    peer = "test_resnet torch b1"
    divided = {row.name: row.ratio and row.ratio.baseline for row in both.rows}
    assert divided == {"ours b1": peer, "torch b1": peer, peer: None}
    assert (both.baseline, both.failures) == ("torch", {})
    alone = timed("ours")
    assert [(row.name, row.ratio) for row in alone.rows] == [("ours b1", None)]
    assert alone.failures == {"test_resnet": "ours cannot run it: name another --backend beside"}


def test_the_caches_of_a_processor_are_not_emptied(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for there, words in ((False, "there is none here"), (True, "ort-cpu runs on the CPU")):
        monkeypatch.setattr(cuda, "available", lambda there=there: there)
        with pytest.raises(ReplkError, match=f"--cold-l2 empties the cache of a GPU, and {words}") as caught:
            pipeline.bench(run, backends=("ort-cpu",), cold_l2=True, max_seconds=0.01)
        assert caught.value.code == Exit.USAGE


def test_the_file_that_takes_the_batch_comes_before_a_newer_one_that_does_not(run: Path) -> None:
    pipeline.export(run, precision="fp16", batch=ONE)
    for batch, file in ((1, "model.fp16.onnx"), (3, "model.fp32.onnx")):
        timed = pipeline.bench(run, backends=("ort-cpu",), batches=(batch,), max_seconds=0.01)
        assert timed.artefacts == {"ort-cpu": file}
        assert timed.bench.rows[0].facts["sha256"] == files.sha256(run / file)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_file_with_the_preprocessing_inside_goes_all_the_way(run: Path, ckpt: Path, precision: str) -> None:
    made = pipeline.export(run, precision=precision, embed=True, batch=Batch(min=2, opt=2, max=2))
    assert made.verdict.state == "pass"
    assert pipeline.verify(ckpt, made.file).state == "pass"
    timed = pipeline.bench(run, backends=("ort-cpu",), batches=(2,), precision=precision, max_seconds=0.01)
    assert timed.agreements["ort-cpu"].passed


def test_nothing_is_written_over_what_a_run_vouches_for(run: Path) -> None:
    before = {name: files.sha256(run / name) for name in names(run)}
    for output, onnx_ in ((run / "fused.safetensors", False), (run / "model.fp32.onnx", True)):
        for artefact in (None, run, run / "fused.safetensors"):
            with pytest.raises(ReplkError, match=r"belongs to the run|is the file to start from"):
                pipeline.export(artefact, onnx=onnx_, output=output, prove=False, root=run.parent)
    assert before == {name: files.sha256(run / name) for name in names(run)}


def test_an_unproved_export_leaves_the_proved_fusion_in_place(run: Path, ckpt: Path) -> None:
    before = files.sha256(run / "fused.safetensors")
    assert pipeline.export(ckpt, prove=False, root=run.parent).verdict.state == "unverified"
    assert files.sha256(run / "fused.safetensors") == before


def test_a_merged_run_cannot_be_exported_and_says_what_to_do(tmp_path: Path, ckpt: Path) -> None:
    pipeline.fuse(ckpt, level="merge", prove=False, root=tmp_path)
    with pytest.raises(ReplkError, match=r"has no fused\.safetensors") as caught:
        pipeline.export(root=tmp_path)
    assert (caught.value.code, caught.value.remedy) == (
        Exit.USAGE,
        "fuse to the end: replk fuse CHECKPOINT --level full",
    )


def test_tf32_is_exact_where_it_does_not_exist(run: Path, ckpt: Path) -> None:
    made = pipeline.export(run, precision="tf32", batch=ONE)
    assert made.verdict.state == "pass"
    assert made.proof.agreements[0].precision == "fp32"
    assert graph.header(made.file).precision == "tf32"
    assert pipeline.verify(ckpt, made.file).agreements[0].rel_l2 < 1e-4


def test_an_altered_artefact_is_never_opened(run: Path) -> None:
    model = onnx.load(run / "model.fp32.onnx")
    model.graph.node[0].name = "changed"
    onnx.save(model, run / "model.fp32.onnx")
    for artefact, words in ((run, "its hash differs"), (run / "model.fp32.onnx", "not the file that its verdict")):
        with pytest.raises(IntegrityError, match=words):
            pipeline.bench(artefact, backends=("ort-cpu",))


@pytest.mark.parametrize(
    ("artefact", "backend", "words"),
    [
        ("model.fp32.onnx", "torch", "torch starts from fused.safetensors"),
        ("fused.safetensors", "ort-cpu", r"ort-cpu starts from model\.<precision>\.onnx"),
        ("missing.onnx", "ort-cpu", "does not exist"),
        ("results", "ort-cpu", "is not a run folder"),
        (".", "ort-gpu", "there is no backend 'ort-gpu'"),
    ],
)
def test_a_wrong_question_is_refused_with_a_way_out(run: Path, artefact: str, backend: str, words: str) -> None:
    with pytest.raises(ReplkError, match=words) as caught:
        pipeline.bench(run / artefact, backends=(backend,))
    assert caught.value.code == Exit.USAGE
    assert caught.value.remedy


# --- deploy -------------------------------------------------------------------------------------------------------

RULES = Preprocessing(
    size=SIZE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize="crop", crop_pct=1.0, said_by="checkpoint"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, net: RepLKNet) -> tuple[Path, int]:
    """Labelled pictures and how many of them the trained network has right, counted by hand in float64."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    shown = coarse.repeat(8, axis=1).repeat(8, axis=2)
    x = ((shown / 255.0 - np.array(RULES.mean)) / np.array(RULES.std)).transpose(0, 3, 1, 2)
    said = answer(net, torch.from_numpy(x)).argmax(dim=1).numpy()
    labels = np.where(np.arange(40) % 3 == 0, (said + 1) % 10, said)  # a third is made wrong
    path = tmp_path_factory.mktemp("data") / "pictures.npz"
    np.savez(path, images=shown, labels=labels)
    right = int((said == labels).sum())
    assert right == 26
    assert len(set(said.tolist())) > 1, "a network that always says the same shows nothing"
    return path, right


@pytest.fixture(scope="module")
def deployed(
    tmp_path_factory: pytest.TempPathFactory, data: tuple[Path, int]
) -> tuple[Path, Path, pipeline.Deployment]:
    root = tmp_path_factory.mktemp("deployed")
    path = networks.save_as_trained(networks.trained(TINY), root / "best.pth", crop_pct=1.0)
    with pytest.MonkeyPatch.context() as patch:
        networks.shorten_timing(patch)
        done = deploy(path, root / "out", data=data[0])
    return root, path, done


def deploy(path: Path, root: Path, **options: Any) -> pipeline.Deployment:
    return pipeline.deploy(path, root=root, **({"backends": ("ort-cpu",), "max_seconds": 0.01} | options))


@pytest.fixture
def copied(deployed: tuple[Path, Path, pipeline.Deployment], tmp_path: Path) -> tuple[Path, Path, Path]:
    """A copy of the deployed run: checkpoint, root, run folder."""
    source, path, done = deployed
    shutil.copytree(source / "out", tmp_path / "out")
    return path, tmp_path / "out", tmp_path / "out" / done.run


def test_deploy_proves_counts_times_and_reports(
    deployed: tuple[Path, Path, pipeline.Deployment], data: tuple[Path, int]
) -> None:
    _, path, done = deployed
    assert (done.state, done.reused) == ("pass", ())
    assert done.inspection.checkpoint.sha256 == files.sha256(path)
    steps = {a["step"]: a for a in done.accuracy}
    assert list(steps) == ["trained", "fused", "ONNX fp32"]
    for step in steps.values():
        assert (step["correct"], step["images"], step["same_as_first"]) == (data[1], 40, 40)
    assert [r["backend"] for r in done.bench["bench"]["rows"]] == ["ort-cpu"]
    report = json.loads((done.folder / "report.json").read_text())
    assert (report["schema"], report["state"]) == ("replk.report/1", "pass")
    assert [step["state"] for step in report["runs"][0]["steps"]] == ["pass", "pass"]
    text = (done.folder / "report.md").read_text()
    for part in (
        "RepLKNet-test: pass",
        "model.fp32.onnx",
        "65.00%",
        "26 of 40",
        "ort-cpu",
        done.inspection.checkpoint.sha256,
    ):
        assert part in text
    assert Workspace.latest(done.folder.parent).folder == done.folder
    assert not list(done.folder.rglob("*.part"))


def test_a_second_deploy_takes_what_is_there_and_says_so(
    copied: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, root, run = copied

    def again(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a step was done again")

    monkeypatch.setattr(exporting, "export", again)
    monkeypatch.setattr(fusing, "fuse", again)
    before = (run / "model.fp32.onnx").read_bytes()
    done = deploy(path, root)
    assert done.reused == ("fused.safetensors", "model.fp32.onnx")
    assert done.state == "pass"
    assert done.exports[0]["export"]["size"] == [64, 64]
    assert (run / "model.fp32.onnx").read_bytes() == before


@pytest.mark.parametrize("name", ["fused.safetensors", "model.fp32.onnx"])
def test_a_deploy_stops_at_an_altered_file(copied: tuple[Path, Path, Path], name: str) -> None:
    path, root, run = copied
    whole = bytearray((run / name).read_bytes())
    whole[-1] ^= 1
    (run / name).write_bytes(whole)
    report = (run / "report.md").read_bytes()
    with pytest.raises(IntegrityError, match=name):
        deploy(path, root)
    assert (run / "report.md").read_bytes() == report


def test_other_options_make_a_file_again_and_only_that(copied: tuple[Path, Path, Path]) -> None:
    path, root, run = copied
    before = (run / "model.fp32.onnx").read_bytes()
    done = deploy(path, root, batch=ONE)
    assert done.reused == ("fused.safetensors",)
    assert (done.state, done.exports[0]["export"]["batch"]) == ("pass", {"min": 1, "opt": 1, "max": 1})
    assert (run / "model.fp32.onnx").read_bytes() != before


def test_other_weights_of_the_same_file_are_never_taken_from_the_run(
    run: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def export(fused: Any, *_args: Any, **_kwargs: Any) -> Any:
        seen.append(fused)
        raise InterruptedError

    monkeypatch.setattr("replk_deploy.pipeline.exporting.export_fused", export)
    with pytest.raises(InterruptedError):
        deploy(ckpt, run.parent, source="ema", batch=ONE)
    average = networks.trained(TINY, seed=1)
    assert off(answer(seen[0].fusion.model, images()), answer(average, images())) < 1e-5


def test_a_rejected_fusion_ends_the_deploy_with_a_report_that_says_so(
    copied: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run held a good file of the same name, whose record must not be taken for this one."""
    path, root, run = copied
    plant(monkeypatch)
    done = deploy(path, root, size=(72, 64))
    assert (done.state, done.exports, done.bench, done.accuracy) == ("rejected", (), None, ())
    assert json.loads((run / "report.json").read_text())["state"] == "rejected"
    assert "rejected" in (run / "report.md").read_text()


def test_a_rejected_export_ends_the_deploy_before_it_is_timed(
    copied: tuple[Path, Path, Path], data: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, root, run = copied
    perturbed(monkeypatch, "stem.3")
    done = deploy(path, root, batch=ONE, data=data[0])
    assert (done.state, done.bench, done.accuracy) == ("rejected", None, ())
    assert "first wrong block: stem.3," in (run / "report.json").read_text()
    assert done.exports[0]["file"] == str(run / "rejected" / "model.fp32.onnx")


def test_a_backend_asked_for_by_name_must_be_there_before_the_work(tmp_path: Path, ckpt: Path) -> None:
    with pytest.raises(UnavailableError, match="trt"):
        pipeline.deploy(ckpt, root=tmp_path, backends=("ort-cpu", "trt"))
    assert names(tmp_path) == set()


def test_the_state_of_a_deployment_is_its_worst(deployed: tuple[Path, Path, pipeline.Deployment]) -> None:
    done = deployed[2]
    for state in ("rejected", "unverified", "provisional"):
        bad = {**done.exports[0], "verdict": {**done.exports[0]["verdict"], "state": state}}
        assert dataclasses.replace(done, exports=(done.exports[0], bad)).state == state
        assert dataclasses.replace(done, fuse=bad).state == state


def test_a_fusion_that_gives_nan_ends_with_a_report(
    copied: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, root, run = copied
    honest = reparam.bn_affine

    def broken(norm: Any) -> Any:
        scale, shift = honest(norm)
        return scale, shift * float("nan")

    monkeypatch.setattr(reparam, "bn_affine", broken)
    done = deploy(path, root, size=(72, 64))
    assert done.state == "rejected"
    assert "rejected" in (run / "report.md").read_text()
