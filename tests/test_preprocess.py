"""Pictures are resized, cropped and normalised as the reference evaluation does; its rules are written anew here."""

import argparse

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from replk_deploy.preprocess import Preprocessing, from_args

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)


def rules(side: int | tuple[int, int] = 224, *, resize: str = "crop", crop_pct: float = 0.875) -> Preprocessing:
    size = (side, side) if isinstance(side, int) else side
    mean, std = IMAGENET
    return Preprocessing(size=size, mean=mean, std=std, resize=resize, crop_pct=crop_pct, said_by="default")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture with edges, a slope and noise, so that one pixel off is seen."""
    rng = np.random.default_rng(seed)
    grid = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)[..., None] + np.array([0, 40, 90])
    grid += 60 * (np.indices((height, width)).sum(0) // 5 % 2)[..., None]
    return Image.fromarray(((grid + rng.integers(0, 30, grid.shape)) % 256).astype(np.uint8))


def reference(shown: Image.Image, side: int, crop_pct: float) -> np.ndarray:
    """Resize the short side to int(side / crop_pct), the long one in proportion, and cut out the centre."""
    shown, short = shown.convert("RGB"), int(side / crop_pct)
    width, height = shown.size
    if width <= height:
        wide, high = short, int(short * height / width)
    else:
        wide, high = int(short * width / height), short
    resized = shown.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = round((wide - side) / 2.0), round((high - side) / 2.0)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize(
    ("size", "side", "crop_pct"),
    [
        ((256, 256), 224, 0.875),
        ((300, 451), 224, 0.875),
        ((500, 375), 224, 0.875),
        ((49, 333), 224, 0.875),  # in floating point, 49·(224/49)/0.875 is just below 256
        ((101, 57), 224, 0.875),
        ((400, 800), 320, 0.875),  # the long side follows int(320/0.875) = 365, not 365.7
        ((641, 427), 320, 0.875),
        ((90, 71), 64, 1.0),
        ((33, 33), 64, 0.9),
        ((225, 224), 224, 1.0),
    ],
)
def test_small_inputs_are_resized_on_the_short_side_and_cropped_in_the_centre(size, side, crop_pct) -> None:
    shown = picture(*size)
    got = rules(side, crop_pct=crop_pct).pixels(shown)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, reference(shown, side, crop_pct))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    width=st.integers(20, 260),
    height=st.integers(20, 260),
    side=st.sampled_from([32, 64, 96]),
    crop_pct=st.sampled_from([0.875, 0.9, 0.95, 1.0]),
)
def test_any_picture_comes_out_as_the_reference_makes_it(width: int, height: int, side: int, crop_pct: float) -> None:
    shown = picture(width, height)
    np.testing.assert_array_equal(rules(side, crop_pct=crop_pct).pixels(shown), reference(shown, side, crop_pct))


@pytest.mark.parametrize("size", [(500, 375), (61, 403), (384, 384)])
def test_large_inputs_are_warped_to_the_square(size: tuple[int, int]) -> None:
    shown = picture(*size)
    got = rules(384, resize="warp").pixels(shown)
    np.testing.assert_array_equal(got, np.asarray(shown.resize((384, 384), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("resize", ["warp", "crop"])
@pytest.mark.parametrize("shown", [(97, 41), (41, 97), (64, 64), (30, 20)])
def test_height_comes_before_width(resize: str, shown: tuple[int, int]) -> None:
    assert rules((64, 96), resize=resize).pixels(picture(*shown)).shape == (64, 96, 3)


def test_a_crop_of_an_oblong_input_keeps_the_proportions_and_the_centre() -> None:
    """Left half red, right half blue, upper half bright: the corner between them stays in the middle."""
    colours = np.zeros((80, 200, 3), np.uint8)
    colours[:, :100, 0], colours[:, 100:, 2], colours[:40, :, 1] = 255, 255, 255
    got = rules((64, 96), crop_pct=0.8).pixels(Image.fromarray(colours)).astype(int)
    assert (got[:, :46, 0] > 250).all()
    assert (got[:, 50:, 2] > 250).all()
    assert (got[:30, :, 1] > 250).all()
    assert (got[34:, :, 1] < 5).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_pictures_of_every_mode_become_three_colours(mode: str) -> None:
    shown = picture(70, 50).convert(mode)
    got = rules(32).pixels(shown)
    assert got.shape == (32, 32, 3)
    np.testing.assert_array_equal(got, reference(shown, 32, 0.875))


def test_a_grey_picture_has_three_equal_colours() -> None:
    got = rules(32).pixels(picture(70, 50).convert("L"))
    assert got.std() > 10
    assert (got == got[..., :1]).all()


@pytest.mark.parametrize("constants", [IMAGENET, HALF], ids=["ImageNet", "half"])
def test_every_value_of_every_colour_is_normalised_exactly(constants: tuple) -> None:
    mean, std = constants
    made = Preprocessing(size=(16, 16), mean=mean, std=std, resize="warp", crop_pct=1.0, said_by="default")
    values = np.arange(256, dtype=np.uint8)
    pixels = np.stack([values, values[::-1], np.roll(values, 7)], axis=-1).reshape(1, 16, 16, 3)
    got = made.normalise(pixels)
    assert got.dtype == np.float32
    assert got.shape == (1, 3, 16, 16)
    assert got.flags.c_contiguous
    for c in range(3):
        exact = (pixels[0, ..., c].astype(np.float64) / 255 - mean[c]) / std[c]
        np.testing.assert_allclose(got[0, c], exact, rtol=0, atol=4e-7)


def test_one_picture_of_a_batch_does_not_change_another() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 10, 3), dtype=np.uint8)
    whole = rules((8, 10)).normalise(pixels)
    assert whole.shape == (3, 3, 8, 10)
    for row in range(3):
        np.testing.assert_array_equal(whole[row], rules((8, 10)).normalise(pixels[row : row + 1])[0])


@pytest.mark.parametrize(
    ("said", "label", "side", "resize", "constants", "crop_pct", "by"),
    [
        (None, "RepLKNet-31B", 224, "crop", IMAGENET, 0.875, "default"),
        (None, "RepLKNet-31L", 384, "warp", IMAGENET, 0.875, "default"),
        (None, "RepLKNet-XL", 320, "crop", HALF, 0.875, "default"),
        ({}, "RepLKNet-XL", 320, "crop", HALF, 0.875, "default"),
        ({"input_size": 384}, "RepLKNet-31B", 384, "warp", IMAGENET, 0.875, "checkpoint"),
        ({"input_size": 383}, "RepLKNet-31B", 383, "crop", IMAGENET, 0.875, "checkpoint"),
        ({"input_size": 224, "crop_pct": None}, "RepLKNet-31B", 224, "crop", IMAGENET, 0.875, "checkpoint"),
        ({"input_size": 224, "crop_pct": 0.95}, "RepLKNet-31B", 224, "crop", IMAGENET, 0.95, "checkpoint"),
        ({"input_size": 224, "test_size": 256}, "RepLKNet-31B", 256, "crop", IMAGENET, 0.875, "checkpoint"),
        ({"input_size": 384, "test_size": 320}, "RepLKNet-31B", 320, "warp", IMAGENET, 0.875, "checkpoint"),
        ({"input_size": 224, "test_size": 448}, "RepLKNet-31B", 448, "crop", IMAGENET, 0.875, "checkpoint"),
        ({"input_size": 320, "imagenet_default_mean_and_std": False}, "any", 320, "crop", HALF, 0.875, "checkpoint"),
        (
            {"input_size": 320, "imagenet_default_mean_and_std": True},
            "RepLKNet-XL",
            320,
            "crop",
            IMAGENET,
            0.875,
            "checkpoint",
        ),
        ({"imagenet_default_mean_and_std": False}, "RepLKNet-31B", 224, "crop", HALF, 0.875, "default"),
        ({"input_size": None, "test_size": None}, "RepLKNet-31B", 224, "crop", IMAGENET, 0.875, "default"),
        ({"input_size": True, "crop_pct": True}, "RepLKNet-31B", 224, "crop", IMAGENET, 0.875, "default"),
        ({"input_size": "224", "crop_pct": -1}, "RepLKNet-31L", 384, "warp", IMAGENET, 0.875, "default"),
        ({"input_size": 0, "crop_pct": 0}, "RepLKNet-31B", 224, "crop", IMAGENET, 0.875, "default"),
    ],
)
def test_what_training_said_becomes_the_rules(said, label, side, resize, constants, crop_pct, by) -> None:
    made = from_args(None if said is None else argparse.Namespace(**said), label)
    assert made == Preprocessing(
        size=(side, side), mean=constants[0], std=constants[1], resize=resize, crop_pct=crop_pct, said_by=by
    )
    assert isinstance(made.size[0], int)
