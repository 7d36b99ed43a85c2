"""Right answers are counted, by hand here."""

from pathlib import Path

import numpy as np
import pytest

from replk_deploy import evaluate as evaluation
from replk_deploy.evaluate import evaluate
from replk_deploy.images import Pictures
from replk_deploy.preprocess import Preprocessing
from replk_deploy.records import plain

RULES = Preprocessing(
    size=(4, 4), mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 0.25), resize="warp", crop_pct=1.0, said_by="default"
)


def shown(*labels: int) -> Pictures:
    """Return pictures whose first pixel says their row."""
    pixels = np.zeros((len(labels), 4, 4, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(len(labels))
    return Pictures(source=Path("x.npz"), labels=np.array(labels, np.int64), classes=(), images=pixels, files=())


def saying(*classes: int, uint8: bool = False):
    """Return an answer that reads each picture's row and says the class given for it."""

    def answer(images: np.ndarray) -> dict[str, np.ndarray]:
        if uint8:
            assert images.dtype == np.uint8
            rows = images[:, 0, 0, 0].astype(int)
        else:
            assert images.dtype == np.float32
            rows = np.round((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).astype(int)
        logits = np.full((len(images), 4), -3.0)
        logits[np.arange(len(images)), [classes[r] for r in rows]] = -1.0
        return {"logits": logits}

    return answer


def test_right_answers_and_agreement_with_the_first_step_are_counted() -> None:
    pictures = shown(0, 1, 2, 3, 3)
    first = evaluate(saying(0, 1, 2, 2, 1), pictures, RULES, step="trained")
    assert (first.step, first.images, first.correct, first.same_as_first, first.top1) == ("trained", 5, 3, 5, 0.6)
    assert first.said.tolist() == [0, 1, 2, 2, 1]
    # right where the first is wrong, and wrong where it is right: as often right, not the same
    second = evaluate(saying(3, 1, 0, 3, 3), pictures, RULES, step="fused", first=first)
    assert (second.correct, second.same_as_first, second.top1) == (3, 1, 0.6)
    third = evaluate(saying(0, 1, 2, 2, 1), pictures, RULES, step="ONNX", first=first)
    assert (third.correct, third.same_as_first) == (3, 5)


def test_none_and_all_right() -> None:
    assert evaluate(saying(1, 0), shown(0, 1), RULES, step="x").top1 == 0.0
    assert evaluate(saying(0, 1), shown(0, 1), RULES, step="x").top1 == 1.0


@pytest.mark.parametrize("count", [1, 31, 32, 33, 70])
def test_the_last_batch_may_be_smaller_and_is_counted(count: int) -> None:
    """Everything is right but the last picture; a lost or doubled batch changes the count."""
    labels, steps = [i % 4 for i in range(count)], []
    told = [*labels[:-1], (labels[-1] + 1) % 4]
    found = evaluate(
        saying(*told),
        shown(*labels),
        RULES,
        step="x",
        progress=lambda what, done, total: steps.append((what, done, total)),
    )
    assert (found.images, found.correct) == (count, count - 1)
    assert found.said.tolist() == told
    assert steps[-1] == ("accuracy of x", count, count)
    assert len(steps) == -(-count // evaluation.BATCH)


def test_raw_pictures_go_to_a_network_that_normalises_by_itself() -> None:
    found = evaluate(saying(2, 1, 0, uint8=True), shown(2, 1, 3), RULES, step="x", uint8=True)
    assert found.correct == 2


def test_a_record_of_it_holds_counts_and_not_each_answer() -> None:
    record = plain(evaluate(saying(0, 1, 2), shown(0, 1, 3), RULES, step="fused"))
    assert record == {
        "schema": "replk.accuracy/1",
        "step": "fused",
        "images": 3,
        "correct": 2,
        "same_as_first": 3,
        "top1": 2 / 3,
    }
