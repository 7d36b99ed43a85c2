"""The committed demonstration checkpoint is what its README says; nothing is trained here."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from models import train_digits
from replk_deploy import images
from replk_deploy.checkpoint import load
from replk_deploy.evaluate import evaluate
from replk_deploy.files import sha256
from replk_deploy.models.replknet import RepLKNet
from replk_deploy.proof import cast
from replk_deploy.verify import answer_of

FOLDER = Path(__file__).parents[1] / "models"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
WEIGHTS, PICTURES = FOLDER / "digits.pth", FOLDER / "digits-test.npz"


def claimed(words: str) -> str:
    """Return what the README says in the last column but one of a table's row."""
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {words}")]
    return row.split("|")[2].strip()


def test_the_files_are_those_of_the_readme() -> None:
    for path in (WEIGHTS, PICTURES):
        assert f"{sha256(path)}  {path.name}" in README
        size = f"{path.stat().st_size:_}".replace("_", " ")
        assert f"{size} bytes" in README


def test_both_sets_of_weights_load_and_differ() -> None:
    raw, averaged = load(WEIGHTS), load(WEIGHTS, source="ema")
    for loaded in (raw, averaged):
        assert loaded.model.geometry == train_digits.GEOMETRY
        assert (loaded.form, loaded.label) == ("training", "RepLKNet-digits")
        assert loaded.preprocessing.size == (64, 64)
        assert (loaded.preprocessing.resize, loaded.preprocessing.crop_pct) == ("crop", 1.0)
    assert (raw.wrapper, averaged.wrapper) == ("model", "model_ema")
    assert averaged.warnings == ()
    assert len(raw.warnings) == 1
    assert "--weights ema" in raw.warnings[0]


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[np.ndarray, int]]:
    """Return the float64 logits of both sets on every held-out picture, and how many are right."""
    pictures, found = images.read(PICTURES, classes=10), {}
    for source in ("model", "ema"):
        loaded, kept = load(WEIGHTS, source=source), []
        answer = answer_of(cast(loaded.model, torch.float64))

        def keeping(shown: np.ndarray, answer=answer, kept=kept) -> dict[str, np.ndarray]:
            kept.append(answer(shown)["logits"])
            return {"logits": kept[-1]}

        accuracy = evaluate(keeping, pictures, loaded.preprocessing, step=source)
        found[source] = np.concatenate(kept), accuracy.correct
    return found


@pytest.mark.parametrize(("source", "row"), [("model", "`model` (raw)"), ("ema", "`model_ema`")])
def test_as_many_are_right_as_the_readme_claims(source: str, row: str, answers) -> None:
    assert len(answers[source][0]) == 360
    assert "right of 360" in README
    assert answers[source][1] == int(claimed(row))


def test_a_mix_up_of_the_two_sets_is_plain_in_the_logits(answers) -> None:
    raw, averaged = answers["model"][0], answers["ema"][0]
    apart = np.linalg.norm(raw - averaged, axis=1) / np.linalg.norm(raw, axis=1)
    said = re.search(r"differ by (\d+) % \(median\) to (\d+) % \(worst", README.replace("\n", " "))
    assert (round(100 * np.median(apart)), round(100 * apart.max())) == (int(said[1]), int(said[2]))


def test_the_readme_states_sizes_that_are_true() -> None:
    model = RepLKNet.empty(train_digits.GEOMETRY, "training")
    folded, merged = (RepLKNet.empty(train_digits.GEOMETRY, form) for form in ("folded", "merged"))
    count = [sum(p.numel() for p in m.parameters()) for m in (model, merged, folded)]
    assert count == [155_042, 150_786, 148_746]
    assert all(f"{c:_}".replace("_", " ") in README for c in count)
    assert f"{len(model.state_dict())} tensors" in README


def test_the_script_makes_the_pictures_that_are_committed() -> None:
    train, train_labels, test, labels = train_digits.digits()
    with np.load(PICTURES, allow_pickle=False) as archive:
        assert set(archive.files) == {"images", "labels"}
        np.testing.assert_array_equal(archive["images"], test)
        np.testing.assert_array_equal(archive["labels"], labels)
        assert (archive["images"].dtype, archive["labels"].dtype) == (np.uint8, np.int64)
    assert (train.shape, train_labels.shape) == ((1437, 64, 64, 3), (1437,))
    held_out = {picture.tobytes() for picture in test}
    assert not any(picture.tobytes() in held_out for picture in train)


def test_the_pictures_can_be_written_again_as_they_are(tmp_path: Path) -> None:
    with np.load(PICTURES, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    train_digits.write_npz(tmp_path / "x.npz", **arrays)
    again = images.read(tmp_path / "x.npz", classes=10)
    np.testing.assert_array_equal(again.images, arrays["images"])
    np.testing.assert_array_equal(again.labels, arrays["labels"])


def test_nothing_in_the_checkpoint_says_where_it_was_made() -> None:
    raw = WEIGHTS.read_bytes()
    assert not re.search(rb"/(home|root|tmp|work|Users)/", raw)


def test_the_arguments_in_the_file_are_those_the_script_sets() -> None:
    with torch.serialization.safe_globals([type(train_digits.settings(epochs=1, seed=0))]):
        stored = torch.load(WEIGHTS, weights_only=True)
    assert stored["args"] == train_digits.settings(epochs=20, seed=0)
    assert stored["epoch"] == 19
    assert set(stored) == {"model", "optimizer", "epoch", "args", "model_ema"}


def test_moving_averages_follow_and_augmentation_keeps_the_picture() -> None:
    model, average = (RepLKNet.build(train_digits.GEOMETRY, "training") for _ in range(2))
    old = average.head.weight.detach().clone()
    with torch.no_grad():
        train_digits.follow(average, model, 0.75)
    torch.testing.assert_close(average.head.weight, 0.75 * old + 0.25 * model.head.weight)
    blank = np.zeros((50, 64, 64, 3), np.uint8)
    blank[:, 32, 32] = 255
    moved = train_digits.augment(blank, np.random.default_rng(0))
    bright = np.argwhere(moved[..., 0] > 180)[:, 1:] - 32
    assert len(bright) == 50
    assert (bright.min(), bright.max()) == (-train_digits.SHIFT, train_digits.SHIFT)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_floor() -> None:
    args = train_digits.settings(epochs=20, seed=0)
    rates = [train_digits.rate(step, 22, args) for step in range(440)]
    assert max(rates) == rates[43] == pytest.approx(args.lr)
    assert rates[:44] == sorted(rates[:44])
    assert rates[44:] == sorted(rates[44:], reverse=True)
    assert rates[-1] == pytest.approx(args.min_lr, abs=1e-6)
