"""For the tests of a training project: two files must compute the same.

from replk_deploy.testing import assert_equivalent

def test_the_export_is_the_network():
    assert_equivalent("best.pth", "model.fp16.onnx")
"""

from os import PathLike
from pathlib import Path
from typing import Any

from replk_deploy import pipeline
from replk_deploy.container import Source
from replk_deploy.errors import MismatchError
from replk_deploy.proof import Proof


def assert_equivalent(
    reference: str | PathLike[Any],
    candidate: str | PathLike[Any],
    *,
    weights: Source = "model",
    size: tuple[int, int] | None = None,
) -> Proof:
    """Judge one file by another as `replk verify` does; AssertionError in its words unless they pass.

    Args:
        reference: checkpoint, fused weights, ONNX file or engine.
        candidate: likewise; one of the two must have a float64 answer, or nothing is proved.
        weights: which weights of a training checkpoint, model or ema.
        size: height and width, where both are weights.

    Raises:
        AssertionError: they do not compute the same, or nothing proves that they do.
        ReplkError: a file cannot be taken.
    """
    try:
        proof = pipeline.verify(Path(reference), Path(candidate), source=weights, size=size)
    except MismatchError as exc:
        raise AssertionError(str(exc)) from exc
    if proof.state == "rejected":
        raise AssertionError(f"{candidate} does not compute what {reference} does: {proof.sentence}")
    if proof.state != "pass":
        raise AssertionError(f"nothing proves that {candidate} computes what {reference} does: {proof.sentence}")
    return proof
