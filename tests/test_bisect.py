"""The block that is at fault is named, and no other."""

import math

import pytest
import torch
from torch import Tensor

from replk_deploy.bisect import HEAD, Bisection, BlockAnswer, BlockError, bisect, blocks_of
from replk_deploy.fuse import fuse
from replk_deploy.models.base import Network
from replk_deploy.precision import ALGEBRA, TOLERANCES
from replk_deploy.proof import cast
from tests import networks

PLANTS = [
    ("stem.0", "stem.0.conv.weight"),
    ("stem.3", "stem.3.conv.bias"),
    ("stages.0.blocks.0", "stages.0.blocks.0.large_kernel.lkb_reparam.weight"),
    ("stages.2.blocks.2", "stages.2.blocks.2.pw1.conv.bias"),
    ("stages.1.blocks.1", "stages.1.blocks.1.pw2.conv.weight"),
    ("transitions.1.0", "transitions.1.0.conv.weight"),
    ("transitions.2.1", "transitions.2.1.conv.weight"),
    (HEAD, "head.weight"),
    (HEAD, "head.bias"),
]
LOW = torch.float32


@pytest.fixture(scope="module")
def reference() -> Network:
    return cast(networks.trained(), torch.float64)


def noise(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()


def fused(reference: Network, dtype: torch.dtype = torch.float64) -> Network:
    return cast(fuse(reference).model, dtype)


def perturb(model: Network, name: str, by: float) -> None:
    """Change one element, in the middle of its kernel; the channel that matters most, so that no ReLU hides it."""
    tensor = model.state_dict()[name]
    spot = tuple(s // 2 if axis > 1 else 0 for axis, s in enumerate(tensor.shape))
    tensor[spot] += by


def test_a_correct_fusion_has_no_culprit(reference: Network) -> None:
    found = bisect(reference, blocks_of(fused(reference)), noise())
    assert found.culprit is None
    assert [b.block for b in found.blocks] == [*reference.blocks(), HEAD]
    assert all(b.rel_l2 < 1e-13 and b.limit == ALGEBRA for b in found.blocks)  # measured below 1e-14
    assert "each block alone is right" in found.sentence


@pytest.mark.parametrize(("block", "name"), PLANTS)
def test_one_wrong_weight_names_its_block_and_no_other(reference: Network, block: str, name: str) -> None:
    candidate = fused(reference)
    perturb(candidate, name, 0.1)
    found = bisect(reference, blocks_of(candidate), noise())
    assert [b.block for b in found.blocks if not b.rel_l2 <= b.limit] == [block]
    assert found.culprit is not None
    assert found.culprit.block == block
    assert f"first wrong block: {block}," in found.sentence


@pytest.mark.parametrize(("block", "name"), [PLANTS[0], PLANTS[2], PLANTS[4], PLANTS[7]])
def test_a_float32_candidate_is_held_to_ten_times_what_float32_costs(reference: Network, block: str, name: str) -> None:
    eager, candidate = blocks_of(cast(reference, LOW)), fused(reference, LOW)
    clean = bisect(reference, blocks_of(candidate), noise(), eager=eager)
    assert clean.culprit is None
    assert all(10 * TOLERANCES["fp32"].floor <= b.limit < 1e-4 for b in clean.blocks)
    perturb(candidate, name, 0.1)
    found = bisect(reference, blocks_of(candidate), noise(), eager=eager)
    assert [b.block for b in found.blocks if not b.rel_l2 <= b.limit] == [block]


@pytest.mark.parametrize("block", ["stem.1", "stages.3.blocks.1", HEAD])
@pytest.mark.parametrize("kind", ["nan", "inf", "shape", "broadcast"])
def test_an_answer_that_is_not_even_comparable_is_at_fault(reference: Network, block: str, kind: str) -> None:
    honest = blocks_of(reference)

    def candidate(name: str, x: Tensor) -> Tensor:
        out = honest(name, x)
        if name != block:
            return out
        return {"nan": out * math.nan, "inf": out / 0, "shape": out[..., :-1], "broadcast": out[:1]}[kind]

    found = bisect(reference, candidate, noise())
    assert [b.block for b in found.blocks if not b.rel_l2 <= b.limit] == [block]


@pytest.mark.parametrize(
    ("name", "block"), [("stages.3.norm.bias", HEAD), ("stages.2.blocks.0.pw2.conv.bias", "stages.2.blocks.0")]
)
def test_a_backbone_is_bisected_up_to_its_last_norm(name: str, block: str) -> None:
    backbone = cast(networks.trained(networks.BACKBONE), torch.float64)
    candidate = fused(backbone)
    assert bisect(backbone, blocks_of(candidate), noise()).culprit is None
    perturb(candidate, name, 0.1)
    found = bisect(backbone, blocks_of(candidate), noise())
    assert found.culprit is not None
    assert found.culprit.block == block


def test_the_reference_keeps_no_hook_and_no_change(reference: Network) -> None:
    before = {k: t.clone() for k, t in reference.state_dict().items()}
    bisect(reference, blocks_of(fused(reference)), noise())
    assert not any(m._forward_hooks for m in reference.modules())
    assert all(torch.equal(reference.state_dict()[k], t) for k, t in before.items())


def test_each_block_is_fed_what_the_reference_feeds_its_own(reference: Network) -> None:
    """The error of one block must not travel on: every input is the reference's."""
    fed: dict[str, Tensor] = {}

    def candidate(name: str, x: Tensor) -> Tensor:
        fed[name] = x.clone()
        return torch.zeros(1)

    images = noise()
    bisect(reference, candidate, images)
    answer: BlockAnswer = blocks_of(reference)
    x = images
    for name in (*reference.blocks(), HEAD):
        assert torch.equal(fed[name], x), name
        x = answer(name, x)


def test_the_first_wrong_block_is_the_culprit_and_nan_is_wrong() -> None:
    rows = [BlockError(block=n, rel_l2=e, limit=1e-12) for n, e in (("a", 1e-13), ("b", math.nan), ("c", 1.0))]
    culprit = Bisection(blocks=tuple(rows)).culprit
    assert culprit is not None
    assert culprit.block == "b"
