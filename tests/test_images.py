"""Labelled pictures come from an .npz or a folder in a known order, or are refused in words."""

import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from replk_deploy import images, optional
from replk_deploy.errors import Exit, ReplkError, UnavailableError
from replk_deploy.preprocess import Preprocessing

RULES = Preprocessing(size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, resize="warp", crop_pct=1.0, said_by="default")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def refused(path: Path, *, classes: int | None = 10) -> ReplkError:
    with pytest.raises(ReplkError) as caught:
        images.read(path, classes=classes)
    assert caught.value.code == Exit.USAGE
    assert caught.value.remedy
    return caught.value


def everything(found: images.Pictures, rules: Preprocessing = RULES, size: int = 3) -> tuple[np.ndarray, np.ndarray]:
    batches = list(found.batches(size, rules))
    assert all(len(p) == len(y) <= size for p, y in batches)
    return np.concatenate([p for p, _ in batches]), np.concatenate([y for _, y in batches])


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_pictures_of_the_right_size_come_as_they_are_with_their_labels(dtype: type, tmp_path: Path) -> None:
    shown, labels = noise(7, 16, 16, 3), np.array([3, 1, 4, 1, 5, 9, 2], dtype)
    found = images.read(npz(tmp_path / "x.npz", images=shown, labels=labels), classes=10)
    got, said = everything(found)
    np.testing.assert_array_equal(got, shown)
    np.testing.assert_array_equal(said, labels)
    assert said.dtype == np.int64
    assert found.classes == ()


def test_grey_pictures_get_three_equal_colours(tmp_path: Path) -> None:
    shown = noise(4, 16, 16)
    got, _ = everything(images.read(npz(tmp_path / "x.npz", images=shown, labels=np.arange(4)), classes=10))
    np.testing.assert_array_equal(got, np.stack([shown] * 3, axis=-1))


def test_pictures_of_another_size_are_resized_by_the_rules(tmp_path: Path) -> None:
    shown = noise(5, 20, 31, 3)
    got, _ = everything(images.read(npz(tmp_path / "x.npz", images=shown, labels=np.arange(5)), classes=10))
    for row in range(5):
        np.testing.assert_array_equal(
            got[row], np.asarray(Image.fromarray(shown[row]).resize((16, 16), Image.Resampling.BICUBIC))
        )


def test_pictures_of_the_right_size_are_cropped_all_the_same_where_the_rules_say_so(tmp_path: Path) -> None:
    shown = noise(1, 16, 16, 3)
    found = images.read(npz(tmp_path / "x.npz", images=shown, labels=np.zeros(1, int)), classes=10)
    cropping = Preprocessing(
        size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, resize="crop", crop_pct=0.8, said_by="default"
    )
    got, _ = everything(found, cropping)
    larger = Image.fromarray(shown[0]).resize((20, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(got[0], np.asarray(larger.crop((2, 2, 18, 18))))


GOOD = {"images": noise(4, 16, 16, 3), "labels": np.arange(4)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": noise(4, 16, 16, 3).astype(np.float32)}, "float32"),
        ({"images": noise(4, 16, 16, 3).astype(np.int16)}, "int16"),
        ({"images": noise(4, 3, 16, 16)}, r"\(4, 3, 16, 16\)"),
        ({"images": noise(4, 16, 16, 4)}, r"\(4, 16, 16, 4\)"),
        ({"images": noise(4, 16)}, r"\(4, 16\)"),
        ({"labels": np.arange(3)}, r"labels \(3,\)"),
        ({"labels": np.arange(4)[:, None]}, r"labels \(4, 1\)"),
        ({"labels": np.eye(4)}, r"labels \(4, 4\)"),
        ({"labels": np.array([0, 1, 2, 10])}, "label 10"),
        ({"labels": np.array([0, 1, -1, 2])}, "label"),
        ({"labels": np.array([0, 1, 2.5, 3])}, "float64"),
        ({"labels": np.array(["0", "1", "2", "3"])}, "<U1"),
        ({"labels": np.array([True, False, True, True])}, "bool"),
        ({"labels": np.array([0, 1, 2, 2**63], np.uint64)}, "label"),
        ({"images": noise(0, 16, 16, 3), "labels": np.arange(0)}, "no pictures"),
        ({"labels": None}, "labels"),
        ({"images": None}, "images"),
    ],
)
def test_arrays_that_are_not_labelled_pictures_are_refused(changes: dict, words: str, tmp_path: Path) -> None:
    arrays = {k: v for k, v in (GOOD | changes).items() if v is not None}
    found = refused(npz(tmp_path / "x.npz", **arrays))
    assert str(tmp_path / "x.npz") in found.problem
    assert re.search(words, found.problem), found.problem


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"echo > '{self.path}'",)


@pytest.mark.parametrize("name", ["images", "labels"])
def test_arrays_of_pickled_objects_are_refused_and_nothing_is_run(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    objects = np.array([Bomb(trace)] * 4, dtype=object)
    refused(npz(tmp_path / "x.npz", **(GOOD | {name: objects})))
    assert not trace.exists()


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    whole = npz(tmp_path / "whole.npz", **GOOD).read_bytes()
    single, packed = io.BytesIO(), io.BytesIO()
    np.save(single, GOOD["images"])
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("readme.txt", "hello")
    wrong = {
        "text": b"images, labels\n",
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "almost whole": whole[:-1],
        "npy": single.getvalue(),
        "zip": packed.getvalue(),
        "zeros": bytes(100),
    }
    for name, content in wrong.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        assert str(path) in refused(path).problem
    assert "missing.npz" in refused(tmp_path / "missing.npz").problem


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_an_npz_with_a_damaged_byte_is_refused(packing: int, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, array in GOOD.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)
    assert len(images.read(path, classes=10).labels) == 4
    raw = path.read_bytes()
    for spot in range(200, len(raw) // 2, 97):
        path.write_bytes(raw[:spot] + bytes([raw[spot] ^ 0x55]) + raw[spot + 1 :])
        refused(path)


# folders -------------------------------------------------------------------------------------------------------------


def folder(root: Path, **classes: list[str]) -> Path:
    """Make a folder of classes whose files hold one grey level each, counted up from 0 by 10."""
    level = 0
    for name, files in classes.items():
        (root / name).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (20, 30), (level,) * 3).save(root / name / file)
            level += 10
    return root


def test_folders_are_classes_in_order_of_their_names_and_so_are_files(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", zebra=["b.png", "a.PNG"], ant=["2.bmp", "1.png", "10.tif"], bee=["x.webp"])
    (root / "ant" / "notes.txt").write_text("not a picture")
    (root / "labels.csv").write_text("not a folder")
    found = images.read(root, classes=3)
    assert found.classes == ("ant", "bee", "zebra")
    assert [f.name for f in found.files] == ["1.png", "10.tif", "2.bmp", "x.webp", "a.PNG", "b.png"]
    got, labels = everything(found, size=4)
    assert labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert got.shape == (6, 16, 16, 3)
    assert [int(p.mean().round(-1)) for p in got] == [30, 40, 20, 50, 10, 0]


def test_grey_and_transparent_files_are_taken_as_three_colours(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", one=["a.png"])
    shown = noise(16, 16)
    Image.fromarray(shown).save(root / "one" / "b.png")
    Image.fromarray(noise(16, 16, 4)).save(root / "one" / "c.png")
    got, _ = everything(images.read(root, classes=1))
    np.testing.assert_array_equal(got[1], np.stack([shown] * 3, axis=-1))
    np.testing.assert_array_equal(got[2], noise(16, 16, 4)[..., :3])


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    assert "no pictures" in refused(tmp_path).problem
    (tmp_path / "ant").mkdir()
    assert "no pictures" in refused(tmp_path).problem
    (tmp_path / "ant" / "a.txt").write_text("x")
    (tmp_path / "loose.png").write_bytes(b"x")
    assert "no pictures" in refused(tmp_path).problem


def test_more_folders_than_classes_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", a=["1.png"], b=["1.png"], c=["1.png"])
    assert len(images.read(root, classes=3).labels) == 3
    assert "2 classes" in refused(root, classes=2).problem


def test_a_backbone_has_no_classes_to_be_right_about(tmp_path: Path) -> None:
    assert "backbone" in refused(npz(tmp_path / "x.npz", **GOOD), classes=None).problem


def test_a_file_that_is_not_a_picture_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", one=["a.png"])
    Image.fromarray(noise(64, 64, 3)).save(root / "one" / "b.png")
    whole = (root / "one" / "b.png").read_bytes()
    for content in (b"", b"not a picture", whole[:30], whole[: len(whole) // 2], whole[:40] + bytes(60) + whole[100:]):
        (root / "one" / "b.png").write_bytes(content)
        found = images.read(root, classes=1)
        with pytest.raises(ReplkError, match=r"b\.png is not a picture") as caught:
            everything(found)
        assert "remove it" in caught.value.remedy


def test_a_folder_named_like_a_picture_is_not_a_picture(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", one=["a.png"])
    (root / "one" / "b.png").mkdir()
    with pytest.raises(ReplkError, match=r"b\.png is not a picture"):
        everything(images.read(root, classes=1))


def test_without_pillow_arrays_of_the_right_size_still_work_and_others_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name.split(".", maxsplit=1)[0])

    monkeypatch.setattr(optional, "import_module", missing)
    right = images.read(npz(tmp_path / "x.npz", **GOOD), classes=10)
    assert len(everything(right)[1]) == 4
    other = images.read(npz(tmp_path / "y.npz", **(GOOD | {"images": noise(4, 9, 9, 3)})), classes=10)
    with pytest.raises(UnavailableError, match="Pillow") as caught:
        everything(other)
    assert "pip install" in caught.value.remedy
