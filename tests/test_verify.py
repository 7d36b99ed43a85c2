"""The gate: what is inside passes, and nothing else does."""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from replk_deploy import verify
from replk_deploy.backends.base import Backend, TensorSpec
from replk_deploy.batch import Batch
from replk_deploy.errors import ContractError, Exit, InconclusiveError, MismatchError
from replk_deploy.precision import PRECISIONS, TOLERANCES, Precision
from replk_deploy.verify import Agreement, Array, Bound, Probe

LIMIT = 1e-3
Answers = dict[str, Array]


def probe(count: int = 4, *, size: int = 8) -> Probe:
    return verify.normal((size, size), count=count, seed=count)


def answer(images: Array, *, classes: int = 1000) -> Answers:
    """Answer as a network would: every image its own way, the largest value clearly above the second."""
    matrix = np.random.default_rng(0).standard_normal((classes, images[0].size))
    logits = images.reshape(len(images), -1).astype(np.float64) @ matrix.T
    logits[np.arange(len(images)), logits.argmax(1)] *= 1.5
    return {"logits": logits}


def judge(
    candidate: Callable[[Array], Answers],
    *,
    images: Probe | None = None,
    expected: Answers | None = None,
    limit: float = LIMIT,
    repeat: bool = False,
) -> Agreement:
    images = images or probe()
    expected = expected if expected is not None else answer(images.images)
    bound = verify.fixed(expected, limit, "a test")
    return verify.verify(expected, candidate, images, bound=bound, name="it", precision="fp32", repeat=repeat)


def changed(change: Callable[[Array], None]) -> Callable[[Array], Answers]:
    """Return the honest answer after an edit in place."""

    def candidate(images: Array) -> Answers:
        outs = answer(images)
        change(outs["logits"])
        return outs

    return candidate


def scaled(share: float) -> Callable[[Array], Answers]:
    """Return the honest answer, wrong in every element by the same relative amount."""
    return lambda images: {"logits": answer(images)["logits"] * (1 + share * LIMIT)}


def put(spot: object, value: float) -> Callable[[Array], Answers]:
    def change(logits: Array) -> None:
        logits[spot] = value

    return changed(change)


def test_the_right_answer_passes_and_reports_no_error() -> None:
    agreement = judge(answer, repeat=True)
    assert (agreement.passed, agreement.state, agreement.worst, agreement.rel_l2) == (True, "pass", 0, 0)
    assert agreement.noise == pytest.approx(0, abs=1e-14)  # one row alone may sum in another order
    assert agreement.signal > 0.5
    assert [r.image for r in agreement.rows] == list(probe().names)
    assert {r.top1 for r in agreement.rows} == {"same"}


@pytest.mark.parametrize("share", [0.5, 0.99, -0.99])
def test_inside_the_bound_passes(share: float) -> None:
    agreement = judge(scaled(share))
    assert agreement.passed
    assert agreement.worst == pytest.approx(abs(share), rel=1e-6)


@pytest.mark.parametrize("share", [1.01, -1.01, 50])
def test_outside_the_bound_fails(share: float) -> None:
    agreement = judge(scaled(share))
    assert (agreement.passed, agreement.state) == (False, "rejected")
    assert agreement.worst == pytest.approx(abs(share), rel=1e-6)
    assert f"limit {LIMIT:.1e}" in agreement.sentence


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 3])
def test_one_element_that_is_not_finite_fails(value: float, row: int) -> None:
    agreement = judge(put((row, 17), value))
    assert not agreement.passed
    assert agreement.worst == math.inf
    assert not math.isfinite(agreement.rel_l2), "a NaN in a later row must not hide behind a finite one"
    assert agreement.flips == 1, "an answer with a NaN has no class"
    assert agreement.sentence.startswith(f"normal {row}")


def test_nothing_but_nan_fails() -> None:
    assert not judge(lambda images: {"logits": np.full((len(images), 1000), math.nan)}).passed


@pytest.mark.parametrize("bad", [0, 31, 63])
def test_one_bad_row_of_64_is_not_diluted(bad: int) -> None:
    def change(logits: Array) -> None:
        logits[bad] *= 1 + 3 * LIMIT

    images = probe(64)
    agreement = judge(changed(change), images=images)
    got, ref = changed(change)(images.images)["logits"], answer(images.images)["logits"]
    assert np.linalg.norm(got - ref) / np.linalg.norm(ref) < LIMIT, "pooled over the batch it would pass"
    assert [r.share > 1 for r in agreement.rows] == [index == bad for index in range(64)]
    assert not agreement.passed


def test_one_bad_class_of_1000_fails_by_its_peak() -> None:
    def change(logits: Array) -> None:
        logits[2, 7] += 6 * LIMIT * np.abs(logits[2]).max()

    agreement = judge(changed(change))
    row = agreement.rows[2]
    assert row.rel_l2 < LIMIT, "relative L2 alone would pass"
    assert row.share == pytest.approx(6 / verify.PEAK, rel=1e-6)
    assert not agreement.passed


@pytest.mark.parametrize(
    "shape", [(1, 1000), (8,), (8, 1), (8, 1000, 1), (1, 8, 1000), (8, 999), (7, 1000), (0, 1000), ()]
)
def test_other_shapes_are_refused_even_where_they_would_broadcast(shape: tuple[int, ...]) -> None:
    images = probe(8)
    with pytest.raises(MismatchError, match="it answers") as caught:
        judge(lambda _images: {"logits": np.zeros(shape)}, images=images)
    assert caught.value.code is Exit.MISMATCH


@pytest.mark.parametrize("names", [["scores"], [], ["logits", "more"]])
def test_other_output_names_are_refused(names: list[str]) -> None:
    with pytest.raises(MismatchError, match="compare files of the same network"):
        judge(lambda images: dict.fromkeys(names, answer(images)["logits"]))


def test_every_output_is_judged() -> None:
    def features(images: Array) -> Answers:
        return {f"stage{i}": np.tanh(images[:, :, i:, :] * (i + 1)) for i in range(3)}

    def wrong(images: Array) -> Answers:
        outs = features(images)
        return outs | {"stage2": outs["stage2"] * (1 + 2 * LIMIT)}

    expected = features(probe().images)
    assert judge(features, expected=expected).passed
    agreement = judge(wrong, expected=expected)
    assert {r.output for r in agreement.rows if r.share > 1} == {"stage2"}
    assert "stage2" in agreement.sentence
    assert {r.top1 for r in agreement.rows} == {""}, "a feature map has no class"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reference_that_is_not_finite_is_our_own_bug(value: float) -> None:
    images = probe()
    expected = put((1, 1), value)(images.images)
    with pytest.raises(ContractError, match="not finite"):
        judge(lambda _images: expected, images=images, expected=expected)


def test_an_empty_reference_is_our_own_bug() -> None:
    empty = {"logits": np.zeros((4, 0))}
    with pytest.raises(ContractError, match="empty"):
        judge(lambda _images: empty, expected=empty)


def test_comparing_no_image_at_all_does_not_pass() -> None:
    assert not dataclasses.replace(judge(answer), rows=()).passed
    with pytest.raises(ContractError, match="no output"):
        judge(lambda _images: {}, expected={})
    images = probe(4)
    unnamed = dataclasses.replace(images, names=images.names[:2])
    with pytest.raises(ContractError, match="4 rows for 2 images"):
        judge(put((3, 1), 1e9), images=unnamed)


def test_a_candidate_that_edits_its_input_is_caught() -> None:
    def candidate(images: Array) -> Answers:
        outs = answer(images)
        images[0, 0, 0, 0] += 1
        return outs

    images = probe()
    before = images.images.copy()
    with pytest.raises(ContractError, match="it changed its input"):
        judge(candidate, images=images)
    assert np.array_equal(images.images, before), "it must not spoil the images for the next candidate"


def in_turn(*candidates: Callable[[Array], Answers]) -> Callable[[Array], Answers]:
    """Return a candidate that answers as each of these, one run after the other."""
    runs = iter(candidates)

    def candidate(images: Array) -> Answers:
        return next(runs)(images)

    return candidate


def test_a_candidate_that_answers_otherwise_the_second_time_is_inconclusive() -> None:
    with pytest.raises(InconclusiveError, match="run again") as caught:
        judge(in_turn(answer, scaled(0.6), answer), repeat=True)
    assert caught.value.code is Exit.INCONCLUSIVE
    agreement = judge(in_turn(answer, scaled(0.4), answer), repeat=True)
    assert agreement.passed
    assert agreement.noise == pytest.approx(0.4 * LIMIT, rel=1e-6)


@pytest.mark.parametrize("row", [0, 2, 3])
def test_a_nan_the_second_time_is_inconclusive_in_any_row(row: int) -> None:
    with pytest.raises(InconclusiveError):
        judge(in_turn(answer, put((row, 3), math.nan), answer), repeat=True)


def test_a_candidate_that_keeps_its_buffer_is_judged_by_its_first_answer() -> None:
    """A runtime that hands out the same memory twice must not turn the first answer into the second."""
    buffer = np.zeros((4, 1000))

    def candidate(images: Array) -> Answers:
        buffer[: len(images)] = answer(images)["logits"]
        return {"logits": buffer[: len(images)]}

    assert judge(candidate, repeat=True).passed


@pytest.mark.parametrize("strength", [2.0, 0.9])
def test_a_candidate_that_lets_the_first_row_leak_into_others_is_caught(strength: float) -> None:
    """Strong leaks are outside the bound; weak ones show when the rows move."""

    def change(logits: Array) -> None:
        size = np.linalg.norm(logits, axis=1, keepdims=True)
        logits += strength * LIMIT * size * logits[:1] / size[0]

    candidate = changed(change)
    if strength > 1:
        assert not judge(candidate, repeat=True).passed
    else:
        assert judge(candidate).passed
        with pytest.raises(InconclusiveError, match="rows of the batch mix"):
            judge(candidate, repeat=True)


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [3, 0, 1, 2], [0, 0, 2, 3]])
def test_rows_in_another_order_are_caught(order: list[int]) -> None:
    agreement = judge(lambda images: {"logits": answer(images)["logits"][order]}, repeat=True)
    assert [r.share > 1 for r in agreement.rows] == [i != o for i, o in enumerate(order)]


def test_an_answer_that_ignores_the_images_is_caught() -> None:
    constant = answer(probe().images)["logits"][0]
    agreement = judge(lambda images: {"logits": np.tile(constant, (len(images), 1))})
    assert [r.share > 1 for r in agreement.rows] == [False, True, True, True]


def two_classes(margin: float) -> tuple[Probe, Answers]:
    """Return one image whose two best classes are `margin` of the largest value apart."""
    logits = np.array([[1.0, 1.0 - margin, -0.3, 0.2]])
    return probe(1), {"logits": logits}


@pytest.mark.parametrize(
    ("margin", "word"),
    [(0.5 * LIMIT, "tie"), (7.9 * LIMIT, "tie"), (8.1 * LIMIT, "flip"), (0.5, "flip")],
)
def test_the_bound_alone_tells_a_tie_from_a_flip(margin: float, word: str) -> None:
    """The excuse is 2 * 4 * bound, whatever the candidate's own error is: a bad one must not excuse itself."""
    images, expected = two_classes(margin)
    swapped = {"logits": expected["logits"][:, [1, 0, 2, 3]]}
    agreement = judge(lambda _images: swapped, images=images, expected=expected)
    assert [r.top1 for r in agreement.rows] == [word]
    assert (agreement.flips, agreement.ties) == (int(word == "flip"), int(word == "tie"))
    assert agreement.undecidable == float(word == "tie")
    wrecked = {"logits": np.array([[0.0, 100.0, 0.0, 0.0]])}
    agreement = judge(lambda _images: wrecked, images=images, expected=expected)
    assert [r.top1 for r in agreement.rows] == [word]
    assert not agreement.passed


def test_a_tie_inside_the_bound_passes_and_is_listed() -> None:
    images, expected = two_classes(0.2 * LIMIT)
    swapped = {"logits": expected["logits"][:, [1, 0, 2, 3]]}
    agreement = judge(lambda _images: swapped, images=images, expected=expected)
    assert (agreement.passed, agreement.ties, agreement.flips) == (True, 1, 0)


def test_a_flip_fails_even_where_no_other_rule_does() -> None:
    agreement = judge(answer)
    flipped = tuple(dataclasses.replace(r, top1="flip") if r is agreement.rows[0] else r for r in agreement.rows)
    assert not dataclasses.replace(agreement, rows=flipped).passed


def test_a_reference_of_zeros_takes_zeros_and_nothing_else() -> None:
    images = probe()
    expected = answer(images.images)
    expected["logits"][0] = 0
    assert judge(lambda _images: expected, images=images, expected=expected, repeat=False).passed
    tiny = {"logits": expected["logits"].copy()}
    tiny["logits"][0, 0] = 1e-300
    agreement = judge(lambda _images: tiny, images=images, expected=expected)
    assert not agreement.passed
    assert agreement.worst == math.inf


@pytest.mark.parametrize("answers", [np.zeros((2, 3)), np.ones((2, 3))])
def test_answers_that_do_not_depend_on_the_image_have_no_signal(answers: Array) -> None:
    assert not verify.signal({"logits": answers}) >= verify.SIGNAL
    mixed = {"good": np.array([[1.0, 2], [2, 1]]), "dead": answers}
    assert not verify.signal(mixed) >= verify.SIGNAL, "the weakest output decides"


def test_a_doubt_makes_a_pass_provisional_and_excuses_nothing() -> None:
    agreement = dataclasses.replace(judge(answer), doubt="only a twin was run")
    assert (agreement.passed, agreement.state) == (True, "provisional")
    assert dataclasses.replace(judge(scaled(2)), doubt="only a twin was run").state == "rejected"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bound_is_what_the_precision_costs_here_times_a_factor(precision: Precision) -> None:
    images, row = probe(), TOLERANCES[precision]
    expected = answer(images.images)
    own = row.limit / 2

    def eager(batch: Array) -> Answers:
        logits = answer(batch)["logits"]
        logits[2] *= 1 + own  # the worst image sets e
        return {"logits": logits}

    bound = verify.calibrate(expected, eager, images, precision, limit=True)
    assert bound.eager["logits"] == pytest.approx(own, rel=1e-6)
    assert bound.rel_l2["logits"] == pytest.approx(row.factor * own, rel=1e-6)
    exact = verify.calibrate(expected, answer, images, precision, limit=True)
    assert exact.rel_l2["logits"] == row.factor * row.floor


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("kind", ["too far", "nan", "inf"])
def test_a_network_that_does_not_survive_the_precision_is_refused(precision: Precision, row: int, kind: str) -> None:
    images, limit = probe(), TOLERANCES[precision].limit
    expected = answer(images.images)

    def eager(batch: Array) -> Answers:
        logits = answer(batch)["logits"]
        logits[row] = {"too far": logits[row] * (1 + 1.1 * limit), "nan": math.nan, "inf": math.inf}[kind]
        return {"logits": logits}

    with pytest.raises(MismatchError, match=f"does not survive {precision}") as caught:
        verify.calibrate(expected, eager, images, precision, limit=True)
    assert ("--precision fp32" in caught.value.remedy) == (precision != "fp32")
    bound = verify.calibrate(expected, eager, images, precision, limit=False)
    if kind != "too far":
        assert not judge_with(bound, expected, images).passed, "a bound that is not finite must not let all through"


def judge_with(bound: Bound, expected: Answers, images: Probe) -> Agreement:
    return verify.verify(
        expected,
        lambda _images: {"logits": -expected["logits"]},
        images,
        bound=bound,
        name="it",
        precision="fp16",
        repeat=False,
    )


def opened(run: Callable[[Array], Answers], fixed: int | None, *batches: Batch) -> Backend:
    """Return what stands for an open backend that takes `fixed` images, or what `batches` say."""
    spec = TensorSpec(name="images", dtype="float32", shape=(fixed, 3, 8, 8))
    return SimpleNamespace(input=spec, batches=batches, run=run)


@pytest.mark.parametrize(("count", "least", "most"), [(1, 3, 3), (5, 3, 3), (2, 2, 2), (7, 1, 1), (9, 2, 4), (1, 2, 4)])
def test_a_limited_batch_is_filled_up_and_cut_again(count: int, least: int, most: int) -> None:
    seen: list[Array] = []

    def limited(images: Array) -> Answers:
        assert least <= len(images) <= most
        seen.append(images)
        return answer(images)

    images, narrow = probe(count), Batch(min=1, opt=1, max=1)
    for backend in (
        opened(limited, None, narrow, Batch(min=least, opt=least, max=most)),
        *([opened(limited, least)] if least == most else []),
    ):
        seen.clear()
        got = verify.any_batch(backend)(images.images)["logits"]
        np.testing.assert_allclose(got, answer(images.images)["logits"], rtol=0, atol=1e-12)
        assert len(seen) == math.ceil(count / most)
        known = {image.tobytes() for image in images.images}
        assert {image.tobytes() for chunk in seen for image in chunk} == known, "padding is made of the images"


def test_a_free_batch_is_left_as_it_is() -> None:
    assert verify.any_batch(opened(answer, None)) is answer


def test_fillers_are_unlike_and_begin_with_the_images() -> None:
    images = probe(3).images
    more = verify.filled(images, 11)
    assert np.array_equal(more[:3], images)
    assert len({image.tobytes() for image in more}) == len(more) == 11


def in_nines(spoil: Callable[[Array], None]) -> Callable[[Array], Answers]:
    """Answer rightly but for batches of nine."""

    def candidate(images: Array) -> Answers:
        logits = answer(images)["logits"]
        if len(images) == 9:
            spoil(logits)
        return {"logits": logits}

    return candidate


def swap(logits: Array) -> None:
    logits[:] = np.roll(logits, 4, axis=0)


def spoil_row(row: int) -> Callable[[Array], None]:
    def spoil(logits: Array) -> None:
        logits[row] *= 1.5

    return spoil


@pytest.mark.parametrize(
    "spoil", [spoil_row(0), spoil_row(3), spoil_row(5), spoil_row(8), swap], ids=["0", "3", "5", "8", "swap"]
)
def test_a_place_that_goes_wrong_in_a_larger_batch_is_rejected(spoil: Callable[[Array], None]) -> None:
    images = probe(4)
    expected = answer(images.images)
    bound = verify.fixed(expected, 1e-3, "as told")
    kwargs = {"bound": bound, "name": "it", "precision": "fp32"}
    assert verify.verify(expected, in_nines(spoil), images, **kwargs).passed, "it is right in small batches"
    found = verify.verify(expected, in_nines(spoil), images, sizes=(4, 9), **kwargs)
    assert not found.passed
    assert "batch of 9" in found.sentence
    assert verify.verify(expected, answer, images, sizes=(4, 9), **kwargs).passed
