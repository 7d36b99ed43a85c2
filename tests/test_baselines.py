"""Networks of timm go through the same files, proofs and runtimes as ours, and their answers can show a bug."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from replk_deploy import backends, optional, proof, verify, weights
from replk_deploy.batch import DYNAMIC, Batch
from replk_deploy.errors import CheckpointError, Exit, ReplkError, UnavailableError
from replk_deploy.export import export
from replk_deploy.fuse import fuse
from replk_deploy.metadata import Metadata
from replk_deploy.models import FAMILIES, baselines
from replk_deploy.models.baselines import Timm, baseline
from replk_deploy.preprocess import Preprocessing

SWIN, CONVNEXT, RESNET, VIT = (
    "timm:swin_tiny_patch4_window7_224",
    "timm:test_convnext",
    "timm:test_resnet",
    "timm:test_vit",
)
SIZE = (64, 64)
Opened = Callable[[str], tuple[Timm, Preprocessing]]


@pytest.fixture(scope="module")
def opened() -> Opened:
    """Build each network once at 64x64; shared, so never change one."""
    made: dict[str, tuple[Timm, Preprocessing]] = {}

    def get(name: str) -> tuple[Timm, Preprocessing]:
        if name not in made:
            made[name] = baseline(name, size=SIZE)
        return made[name]

    return get


def written(path: Path, network: Timm, rules: Preprocessing, **changes: str) -> Path:
    said = Metadata(
        family=network.family,
        form=network.form,
        geometry=network.describe(),
        label=network.geometry.label,
        precision="fp32",
        preprocessing=rules,
        source_sha256="0" * 64,
        source_name="a test",
    )
    weights.write(path, network, dataclasses.replace(said, **changes))
    return path


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((got - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("name", [SWIN, CONVNEXT, RESNET, VIT])
def test_answers_are_those_of_timm_and_depend_on_the_image(name: str, opened: Opened) -> None:
    network, _ = opened(name)
    probe = verify.normal(SIZE)
    images = torch.from_numpy(probe.images)
    (logits,) = network(images)
    assert torch.equal(logits, network.body.net(images))
    assert logits.shape == (2, network.geometry.classes)
    assert verify.signal(proof.Oracle(network, "").answers(probe)) > verify.SIGNAL


def test_what_it_says_of_itself() -> None:
    network, rules = baseline(CONVNEXT)
    g = network.geometry
    assert (g.label, g.classes, g.outputs, g.stride, g.size) == ("test_convnext", 1000, ("logits",), 32, (160, 160))
    assert (rules.size, rules.resize, rules.crop_pct, rules.said_by) == ((160, 160), "crop", 0.95, "default")
    assert (rules.mean, rules.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (network.family, network.form, network.training) == ("timm", "folded", False)
    assert FAMILIES["timm"] is Timm
    assert fuse(network).model is network
    assert not any(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match="name it"):
        Timm.infer({"a": (1,)})


def test_a_tag_decides_the_classes() -> None:
    network, _ = baseline("timm:convnext_atto.d2_in1k", size=SIZE)
    assert (network.geometry.label, network.geometry.classes) == ("convnext_atto.d2_in1k", 1000)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (weights.content_hash(baseline(CONVNEXT, seed=s)[0]) for s in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.rand(3), expected)


def test_every_block_can_be_seen_in_the_answer(opened: Opened) -> None:
    """As timm leaves it, a block weighs 1e-6: nobody would notice that it is wrong."""
    images = torch.from_numpy(verify.normal(SIZE).images)

    def seen(network: Timm) -> float:
        sound = network(images)[0]
        twin = proof.cast(network, torch.float32)
        convs = [m for m in twin.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        assert convs
        convs[-1].weight = nn.Parameter(convs[-1].weight.flip(-1), requires_grad=False)
        return off(twin(images)[0], sound)

    network, _ = opened(CONVNEXT)
    assert seen(network) > 1e-3
    assert seen(Timm.build(network.geometry, "folded")) < 1e-4


def test_batch_norms_fit_what_they_see(opened: Opened) -> None:
    network, _ = opened(RESNET)
    plain = Timm.build(network.geometry, "folded")
    assert {float(m.running_var.mean()) for m in plain.modules() if isinstance(m, nn.BatchNorm2d)} == {1.0}
    spreads: list[float] = []

    def look(norm: nn.BatchNorm2d, _args: object, out: torch.Tensor) -> None:
        spreads.append(float((out.std() / norm.weight.abs().mean()).detach()))

    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [m.register_forward_hook(look) for m in norms]
    network(torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(9)))
    for hook in hooks:
        hook.remove()
    assert len(spreads) == len(norms) > 10
    assert all(0.3 < spread < 3 for spread in spreads)


@pytest.mark.parametrize("name", [SWIN, RESNET])
def test_a_file_fills_the_network_alone_masks_and_all(name: str, opened: Opened, tmp_path: Path) -> None:
    network, rules = opened(name)
    back, metadata = weights.read(written(tmp_path / "w.safetensors", network, rules))
    assert (back.geometry, metadata.preprocessing) == (network.geometry, rules)
    assert not any(t.is_meta for t in (*back.parameters(), *back.buffers()))
    images = torch.from_numpy(verify.normal(SIZE).images)
    assert torch.equal(back(images)[0], network(images)[0])


def test_a_weights_file_runs_on_torch(opened: Opened, tmp_path: Path) -> None:
    network, rules = opened(CONVNEXT)
    with backends.find("torch")(written(tmp_path / "w.safetensors", network, rules)) as backend:
        agreement = proof.judge_backend("timm", proof.Oracle(network, ""), backend, None)
        assert agreement.state == "pass", agreement.sentence
        other = proof.Oracle(baseline(CONVNEXT, size=SIZE, seed=1)[0], "")
        assert proof.judge_backend("timm", other, backend, None).state == "rejected"


@pytest.mark.parametrize(
    ("name", "batch"),
    [("timm:convnext_atto", DYNAMIC), pytest.param(SWIN, Batch(min=1, opt=1, max=1), marks=pytest.mark.slow)],
)
def test_an_exported_file_answers_as_float64_does_and_another_network_s_does_not(
    name: str, batch: Batch, opened: Opened, tmp_path: Path
) -> None:
    network, _ = opened(name)
    made = export(network, tmp_path / "m.onnx", precision="fp32", size=SIZE, batch=batch)
    assert made.nodes["Conv"] == sum(isinstance(m, nn.Conv2d) for m in network.modules())
    with proof.open_onnx(tmp_path / "m.onnx", "fp32") as backend:
        agreement = proof.judge_backend("timm", proof.Oracle(network, ""), backend, None)
        assert agreement.state == "pass", agreement.sentence
        other = proof.Oracle(baseline(name, size=SIZE, seed=1)[0], "")
        assert proof.judge_backend("timm", other, backend, None).state == "rejected"


@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("swin_tiny_patch4_window7_224", "no baseline", "timm:swin_base"),
        ("timm:", "no baseline", "timm:NAME"),
        ("hub:resnet18", "no baseline", "timm:NAME"),
        ("timm:swin_bse_patch4_window7_224", "no model", "swin_base_patch4_window7_224"),
        ("timm:qqqqqqqqqqqqqqq", "no model", "timm.list_models()"),
        ("timm:hf-hub:somebody/something", "no model", ""),
        ("timm:convnext_tiny.nothing", "Invalid pretrained tag", "timm:convnext_tiny"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_is_near(name: str, problem: str, remedy: str) -> None:
    with pytest.raises(ReplkError) as caught:
        baseline(name)
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy
    assert caught.value.code == Exit.USAGE


def test_a_size_that_it_cannot_have_is_refused() -> None:
    with pytest.raises(ReplkError, match=r"cannot build maxvit_tiny_tf_224 for 100x100: .*window \(3\)"):
        baseline("timm:maxvit_tiny_tf_224", size=(100, 100))


@pytest.mark.parametrize("damage", ["hf-hub:somebody/something", "local-dir:/etc", "no_such_network", 7])
def test_a_header_that_names_no_network_of_timm_is_damaged(damage: object, opened: Opened, tmp_path: Path) -> None:
    network, rules = opened(CONVNEXT)
    said = json.dumps(json.loads(network.describe()) | {"name": damage})
    with pytest.raises(CheckpointError, match="damaged header"):
        weights.read(written(tmp_path / "w.safetensors", network, rules, geometry=said))
    assert Timm.parse(network.describe()) == network.geometry


def test_without_timm_the_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(name=module)

    monkeypatch.setattr(optional, "import_module", missing)
    with pytest.raises(UnavailableError, match=r"pip install 'replk-deploy\[baselines\]'"):
        baseline(CONVNEXT)


def test_a_torchvision_for_another_torch_does_not_stop_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    declared: list[str] = []
    timm = baselines._timm()

    def half_built(module: str) -> object:
        if module == "timm" and len(declared) < len(baselines.UNLOADED):
            raise RuntimeError("operator torchvision::nms does not exist")
        return timm

    monkeypatch.setattr(optional, "import_module", half_built)
    monkeypatch.setattr(torch.library, "define", lambda name, _schema: declared.append(name))
    assert baselines._timm() is timm
    assert declared == ["torchvision::nms", "torchvision::qnms"]


def test_other_failures_of_timm_keep_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_module: str) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(optional, "import_module", broken)
    with pytest.raises(RuntimeError, match="planted"):
        baseline(CONVNEXT)


def test_the_families_do_not_load_timm() -> None:
    code = "import sys, replk_deploy.models; print([m for m in ('timm', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def test_pictures_are_normalised_as_timm_says(opened: Opened) -> None:
    _, rules = opened(SWIN)
    grey = rules.normalise(np.full((1, *SIZE, 3), 255, np.uint8))
    assert grey[0, :, 0, 0] == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rel=1e-6)
    assert rules.said_by == "user"
