"""A gate that nobody has seen fail is no gate: each planted bug must be caught, and nothing else."""

import copy
import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from replk_deploy import proof, selftest
from replk_deploy.errors import UnavailableError
from replk_deploy.models.base import Network
from replk_deploy.proof import Oracle, Proof
from replk_deploy.selftest import BUGS, SEEDS, caught, network, prove
from replk_deploy.verify import Agreement

FIRST = "stages.0.blocks.0"
CULPRITS = {
    "small": FIRST,
    "large": FIRST,
    "norms of": FIRST,
    "norm before a": FIRST,
    "norm before the head": "head",
    "norm folded": FIRST,
    "one ReLU": FIRST,
    "one NaN": FIRST,
    "tanh": "stages.0.blocks.1",
    "small branch dropped in one stage": "stages.2.blocks.0",
    "one weight of the file": "stages.2.blocks.1",
    "running": "stem.0",
    "eps": "stem.0",
    "weights of the file": "stem.0",
    "file of another": "stem.0",
}
NOT_THE_STATISTICS = (
    "small kernel one pixel off in W",
    "small branch dropped",
    "one ReLU lost",
    "channels of the input reversed",
    "one weight of the file changed",
)
HIDDEN_BY_FRESH_NORMS = (
    "running mean dropped",
    "beta dropped",
    "gamma dropped",
    "sign of gamma lost",
    "sign of the mean",
    "small branch's bias dropped",
    "small branch's bias dropped in one channel",
    "norms of the branches swapped",
    "norm before a 1x1: shift dropped",
    "norm before the head: shift dropped",
)

IN_MEMORY = "norm folded into the shortcut too"  # planted on the weights of one process; no file can hold it


def culprit_of(bug: str) -> str | None:
    fitting = [start for start in CULPRITS if bug.startswith(start)]
    return CULPRITS[max(fitting, key=len)] if fitting else None


@pytest.fixture
def without_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the proof judge a copy with the BatchNorms of a new network instead of the poisoned one."""

    def fresh(model: Network, **_options: Any) -> Network:
        twin = copy.deepcopy(model).double()
        for module in twin.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        return twin

    monkeypatch.setattr(proof, "poison", fresh)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught_and_its_block_is_named(bug: str) -> None:
    plant = caught(bug, BUGS[bug])
    assert plant.caught
    assert not plant.rel_l2 < 1e-9, "it must have changed the answer, or the wrong thing was caught"
    culprit = culprit_of(bug)
    assert culprit is None or plant.caught_by == culprit


@pytest.mark.parametrize("bug", ["none", *(b for b in BUGS if b != IN_MEMORY)])
def test_verify_catches_the_same_bug_in_a_finished_file(bug: str, trained: Network) -> None:
    """Two files have neither float64 weights nor a poisoned copy: float32 on the checkpoint itself must do."""
    with BUGS.get(bug, nullcontext)():
        stored = selftest.cast(selftest.fuse(trained).model, torch.float32)
        other = SimpleNamespace(model=stored, metadata=None)
        found = proof.prove_pair(Oracle(trained, "it"), other, size=selftest.SIZE)
    assert (found.state == "rejected") == (bug != "none")
    assert found.bisection or found.structure or bug == "none"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_correct_fusion_raises_no_alarm(seed: int) -> None:
    found = prove(network(seed))
    assert found.state == "pass"
    assert found.bisection is None
    assert found.worst < 0.6, "measured 0.3; near 1 the gate would cry wolf"
    assert all(error < 1e-14 for error in found.modules.values())


def test_every_bug_leaves_the_code_as_it_was() -> None:
    for bug, plant in BUGS.items():
        with plant():
            pass
        assert not [m for m in vars(selftest.reparam).values() if getattr(m, "__module__", "") == selftest.__name__], (
            bug
        )
    assert prove(network()).state == "pass"


@pytest.mark.usefixtures("without_poison")
@pytest.mark.parametrize("bug", HIDDEN_BY_FRESH_NORMS)
def test_without_the_poison_this_bug_would_slip_through(bug: str) -> None:
    """Why the poison exists. Should one of these be caught one day, the poison may have become dispensable."""
    assert not caught(bug, BUGS[bug]).caught


@pytest.mark.usefixtures("without_poison")
@pytest.mark.parametrize("bug", NOT_THE_STATISTICS)
def test_without_the_poison_only_the_statistics_go_unseen(bug: str) -> None:
    assert caught(bug, BUGS[bug]).caught


def test_a_selftest_counts_what_was_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    some = ("running mean dropped", "one NaN")
    monkeypatch.setattr(selftest, "SEEDS", (0, 1))
    monkeypatch.setattr(selftest, "BUGS", {bug: BUGS[bug] for bug in some})
    steps: list[tuple[str, int, int | None]] = []
    found = selftest.selftest(progress=lambda *step: steps.append(step))
    assert found.passed
    assert tuple(p.bug for p in found.plants) == some
    assert all(p.caught for p in found.plants)
    assert (found.clean, found.false_alarms) == (2, 0)
    assert steps == [("selftest", done, 4) for done in range(1, 5)]


def test_a_selftest_fails_for_one_missed_bug_one_false_alarm_or_no_bug_at_all() -> None:
    plant = selftest.Plant(bug="a", caught=True, caught_by="stem.0", rel_l2=1.0)
    good = selftest.Selftest(plants=(plant, plant), clean=3, false_alarms=0)
    assert good.passed
    missed = dataclasses.replace(plant, caught=False)
    assert not dataclasses.replace(good, plants=(plant, missed)).passed
    assert not dataclasses.replace(good, false_alarms=1).passed
    assert not dataclasses.replace(good, plants=()).passed


def test_a_gate_that_always_passes_fails_the_selftest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "SEEDS", (0,))
    monkeypatch.setattr(selftest, "BUGS", {bug: BUGS[bug] for bug in ("gamma dropped", "small kernel mirrored")})
    monkeypatch.setattr(Agreement, "passed", property(lambda _self: True))
    monkeypatch.setattr(Proof, "state", property(lambda _self: "pass"))
    found = selftest.selftest()
    assert not found.passed
    assert not any(p.caught for p in found.plants)
    assert found.false_alarms == 0


def test_a_gate_that_always_refuses_fails_the_selftest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "SEEDS", (0,))
    monkeypatch.setattr(selftest, "BUGS", {"gamma dropped": BUGS["gamma dropped"]})
    monkeypatch.setattr(Proof, "state", property(lambda _self: "rejected"))
    found = selftest.selftest()
    assert not found.passed
    assert found.false_alarms == found.clean == 1


def test_a_bug_that_does_nothing_is_not_caught() -> None:
    plant = caught("nothing", selftest._after(lambda kernel: kernel))
    assert not plant.caught
    assert plant.rel_l2 < 1e-4


def test_an_error_that_is_no_mismatch_is_no_catch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_model: Network) -> Proof:
        raise UnavailableError("no runtime", "install one")

    monkeypatch.setattr(selftest, "prove", broken)
    with pytest.raises(UnavailableError):
        caught("gamma dropped", BUGS["gamma dropped"])
