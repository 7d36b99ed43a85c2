"""Every refusal carries its exit code and its remedy, wherever it travels."""

import copy
import pickle
import re

import pytest

from replk_deploy import errors
from replk_deploy.errors import ContractError, Exit, ReplkError


def kinds() -> list[type[ReplkError]]:
    return [ReplkError, *ReplkError.__subclasses__()]


def test_the_exit_codes_are_the_published_ones() -> None:
    assert {e.name: e.value for e in Exit} == {
        "OK": 0,
        "BUG": 1,
        "USAGE": 2,
        "MISMATCH": 3,
        "REGRESSION": 4,
        "UNAVAILABLE": 5,
        "INTEGRITY": 6,
        "INCONCLUSIVE": 7,
        "INTERRUPTED": 130,
        "PIPE": 141,
    }


def test_each_kind_has_the_code_that_the_table_at_the_top_gives_it() -> None:
    said = dict(re.findall(r"(\w+Error) +(\d) ", str(errors.__doc__)))
    assert said == {kind.__name__: str(kind.code.value) for kind in kinds()}


def test_no_refusal_ends_as_success_or_as_a_bug_of_ours() -> None:
    assert not {kind.code for kind in kinds()} & {Exit.OK, Exit.BUG}


def test_a_broken_contract_is_no_refusal_and_keeps_its_traceback() -> None:
    assert not issubclass(ContractError, ReplkError)
    assert not isinstance(ReplkError("a", "b"), AssertionError)


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("travel", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])  # noqa: S301  # our own
def test_a_refusal_survives_the_way_to_another_process(kind, travel) -> None:
    sent = kind("tensor head.weight is missing", "give the whole checkpoint")
    got = travel(sent)
    assert type(got) is kind
    assert (got.problem, got.remedy, got.code) == (sent.problem, sent.remedy, kind.code)
    assert str(got) == "tensor head.weight is missing (give the whole checkpoint)"
