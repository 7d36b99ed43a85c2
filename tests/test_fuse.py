"""Fusion: nothing is left, nothing is lost, and the network that came in stays as it was."""

import re

import pytest
import torch
from torch import Tensor, nn

from replk_deploy.errors import ContractError
from replk_deploy.fuse import batch_norms, fuse
from replk_deploy.models import reparam
from replk_deploy.models.replknet import VARIANTS, RepLKGeometry, RepLKNet
from tests import networks

EXACT = 1e-12  # relative L2, float64; measured 1e-15 to 2e-14 with fitted and disturbed statistics, torch 2.13
SIZES = ((64, 64), (97, 75), (35, 130))  # the last maps are far smaller than their kernels, and not square


def answers(model: nn.Module, size: tuple[int, int], *, seed: int = 3) -> tuple[Tensor, ...]:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed)).double()
    with torch.inference_mode():
        outs: tuple[Tensor, ...] = model.double()(images)
    return outs


def off(model: nn.Module, wanted: nn.Module, size: tuple[int, int] = (64, 64)) -> float:
    """Return the worst relative L2 over outputs and images."""
    pairs = zip(answers(model, size), answers(wanted, size), strict=True)
    return max(float((a - b).norm() / b.norm()) for got, ref in pairs for a, b in zip(got, ref, strict=True))


def lived(geometry: RepLKGeometry = networks.SMALL, *, seed: int = 0) -> RepLKNet:
    return networks.trained(geometry, seed=seed)


def merged_keys(training: list[str]) -> set[str]:
    """Return the reference project's names after its own merge, from those before it."""
    kept = {k for k in training if ".large_kernel." not in k}
    blocks = {k.split(".lkb_origin.")[0] for k in training if ".lkb_origin." in k}
    return kept | {f"{b}.lkb_reparam.{leaf}" for b in blocks for leaf in ("weight", "bias")}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("level", ["full", "merge"])
@pytest.mark.parametrize("name", networks.GEOMETRIES)
def test_a_fused_network_gives_the_same_answer(name: str, level: str, size: tuple[int, int]) -> None:
    model = lived(networks.GEOMETRIES[name], seed=2)
    assert off(fuse(model, level=level).model, model, size) < EXACT


@pytest.mark.parametrize("name", networks.GEOMETRIES)
def test_full_leaves_no_norm_and_no_branch(name: str) -> None:
    geometry = networks.GEOMETRIES[name]
    model = lived(geometry)
    fusion = fuse(model)
    norms = set(batch_norms(model))
    inside = {n for n in norms if ".large_kernel." in n}
    assert fusion.left == () == batch_norms(fusion.model)
    assert not [m for m in fusion.model.modules() if isinstance(m, reparam.Reparam)]
    assert not [k for k in fusion.model.state_dict() if "running_" in k or "num_batches" in k]
    assert set(fusion.folded) == norms - inside
    assert len(fusion.folded) == len(set(fusion.folded))
    assert len(fusion.merged) == sum(geometry.depths)
    assert fusion.changed
    assert all(m.bias is not None for m in fusion.model.modules() if isinstance(m, nn.Conv2d))
    assert fusion.model.form == "folded"


@pytest.mark.parametrize("name", networks.GEOMETRIES)
def test_merge_gives_the_layout_of_the_reference_project(name: str) -> None:
    model = lived(networks.GEOMETRIES[name])
    fusion = fuse(model, level="merge")
    state = model.state_dict()
    assert set(fusion.model.state_dict()) == merged_keys(list(state))
    assert set(fusion.left) == {n for n in batch_norms(model) if ".large_kernel." not in n}
    assert fusion.folded == ()
    for key, tensor in fusion.model.state_dict().items():
        if key in state:
            assert torch.equal(tensor, state[key].double() if tensor.is_floating_point() else state[key]), key


@pytest.mark.parametrize(
    ("name", "norms", "left", "keys"),
    [("RepLKNet-31B", 203, 155, 931), ("RepLKNet-31L", 203, 155, 931), ("RepLKNet-XL", 179, 155, 931)],
)
def test_full_size_variants_keep_the_published_counts(name: str, norms: int, left: int, keys: int) -> None:
    forms = {form: RepLKNet.empty(VARIANTS[name], form) for form in ("training", "merged", "folded")}
    assert [len(batch_norms(m)) for m in forms.values()] == [norms, left, 0]
    merged = set(forms["merged"].state_dict())
    assert merged == merged_keys(list(forms["training"].state_dict()))
    assert len(merged) == keys
    convs = [sum(isinstance(m, nn.Conv2d) for m in model.modules()) for model in forms.values()]
    assert convs == [154 if norms == 203 else 130, 130, 130]
    assert len(list(forms["training"].folds())) == 155


def test_folding_a_merged_network_equals_folding_the_trained_one() -> None:
    model = lived()
    at_once, in_steps = fuse(model), fuse(fuse(model, level="merge").model)
    assert in_steps.merged == ()
    assert in_steps.folded == at_once.folded
    assert off(in_steps.model, model) < EXACT
    for (key, one), two in zip(at_once.model.state_dict().items(), in_steps.model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=0, msg=key)


@pytest.mark.parametrize("level", ["full", "merge"])
def test_fusing_again_changes_nothing_and_says_so(level: str) -> None:
    once = fuse(lived(), level=level)
    again = fuse(once.model, level=level)
    assert (again.changed, again.merged, again.folded, again.left) == (False, (), (), once.left)
    assert again.model is once.model


def test_merging_a_folded_network_brings_nothing_back() -> None:
    folded = fuse(lived()).model
    again = fuse(folded, level="merge")
    assert again.model is folded
    assert (again.changed, again.left) == (False, ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["full", "merge"])
def test_the_network_that_came_in_is_untouched_to_the_bit(level: str, dtype: torch.dtype) -> None:
    model = lived().to(dtype).requires_grad_(requires_grad=True)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    modules = dict(model.named_modules())
    fusion = fuse(model, level=level)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], t) and after[k].dtype == t.dtype for k, t in before.items())
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in fusion.model.parameters())
    assert {p.dtype for p in fusion.model.parameters()} == {torch.float64}
    assert (model.form, fusion.model.training) == ("training", False)


def test_a_network_trained_with_synchronised_norms_has_the_same_state_dict() -> None:
    model = lived()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(lived())
    assert not any(type(m) is nn.BatchNorm2d for m in synchronised.modules())
    fresh = RepLKNet.build(networks.SMALL, "training")
    fresh.load_state_dict(synchronised.state_dict(), strict=True)
    fused = fuse(fresh)
    assert fused.left == ()
    assert off(fused.model, model) < EXACT


def test_a_live_network_of_synchronised_norms_is_refused_and_never_left_as_it_was() -> None:
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(lived())
    with pytest.raises(AssertionError):
        fuse(synchronised)
    with pytest.raises(ContractError, match="is a SyncBatchNorm, not a BatchNorm"):
        fuse(nn.SyncBatchNorm.convert_sync_batchnorm(fuse(lived(), level="merge").model))


def test_norms_of_a_backbone_become_depthwise_1x1_convolutions() -> None:
    model = lived(networks.BACKBONE)
    folded = fuse(model).model
    for index, channels in enumerate(networks.BACKBONE.channels):
        conv, norm = folded.stages[index].norm, model.stages[index].norm
        assert isinstance(conv, nn.Conv2d)
        assert (conv.kernel_size, conv.groups, tuple(conv.weight.shape)) == ((1, 1), channels, (channels, 1, 1, 1))
        x = torch.randn(2, channels, 5, 3, generator=torch.Generator().manual_seed(index)).double()
        torch.testing.assert_close(conv(x), norm.double()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("leaf", ["bn", "prelkb_bn", "preffn_bn", "norm"])
def test_every_kind_of_norm_matters_to_the_comparison(leaf: str) -> None:
    """One β moved in one norm of each kind: what EXACT would let through, this would too."""
    model, other = lived(), lived()
    names = [n for n in batch_norms(other) if re.search(rf"(^|\.){leaf}$", n)]
    for name in (names[0], names[-1]):
        with torch.no_grad():
            other.get_submodule(name).bias[:2] += 1e-3
        assert off(fuse(other).model, model) > 1e3 * EXACT
        other.load_state_dict(model.state_dict())


def test_a_stray_tensor_or_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lived()
    honest = tuple(model.folds())
    monkeypatch.setattr(type(model), "folds", lambda _self: iter(honest[:-1]))
    with pytest.raises(ContractError, match=r"do not fill the network: norm\.bias"):
        fuse(model)


def test_progress_ends_at_its_total() -> None:
    seen: list[tuple[str, int, int | None]] = []
    fuse(lived(), progress=lambda *args: seen.append(args))
    total = len(seen)
    assert seen == [("fuse", done, total) for done in range(1, total + 1)]
