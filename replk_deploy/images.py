"""Labelled pictures: an .npz with `images` and `labels`, or a folder with one sub-folder a class."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile
from zlib import error as ZlibError  # noqa: N812

import numpy as np
import numpy.typing as npt

from replk_deploy import optional
from replk_deploy.errors import ReplkError
from replk_deploy.preprocess import Pixels, Preprocessing

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
EXPECTED = "give an .npz with images [N, H, W, 3] uint8 and labels [N], or a folder with one sub-folder a class"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Labelled pictures, read batch by batch; `classes` names the folders in label order, if there were any."""

    source: Path
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    images: Pixels | None
    files: tuple[Path, ...]

    def batches(self, size: int, preprocessing: Preprocessing) -> Iterator[tuple[Pixels, npt.NDArray[np.int64]]]:
        """Yield resized pictures [n, H, W, 3] uint8 with their labels.

        Raises:
            ReplkError: a file is not a picture.
            UnavailableError: Pillow is needed and not installed.
        """
        for start in range(0, len(self.labels), size):
            rows = range(start, min(start + size, len(self.labels)))
            yield np.stack([self._pixels(i, preprocessing) for i in rows]), self.labels[start : start + size]

    def _pixels(self, index: int, preprocessing: Preprocessing) -> Pixels:
        whole = preprocessing.resize == "warp" or preprocessing.crop_pct >= 1
        if self.images is not None and whole and self.images.shape[1:3] == preprocessing.size:
            pixels: Pixels = self.images[index]
            return pixels
        pillow = optional.load("PIL.Image", package="Pillow", install="replk-deploy[images]")
        if self.images is not None:
            return preprocessing.pixels(pillow.fromarray(self.images[index]))
        try:
            with pillow.open(self.files[index]) as picture:
                return preprocessing.pixels(picture)
        except (OSError, ValueError, pillow.DecompressionBombError) as exc:
            raise ReplkError(f"{self.files[index]} is not a picture: {exc}", "remove it from the folder") from exc


def read(path: Path, *, classes: int | None) -> Pictures:
    """Find the pictures of a data set.

    Args:
        path: the .npz or the folder.
        classes: how many classes the network has; labels must lie below.

    Raises:
        ReplkError: nothing there, wrong shapes, or labels that the network does not have.
    """
    if path.is_dir():
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        pairs = [(f, i) for i, d in enumerate(folders) for f in sorted(d.iterdir()) if f.suffix.lower() in SUFFIXES]
        found = Pictures(
            source=path,
            labels=np.array([label for _, label in pairs], np.int64),
            classes=tuple(d.name for d in folders),
            images=None,
            files=tuple(file for file, _ in pairs),
        )
    else:
        images, labels = _arrays(path)
        found = Pictures(source=path, labels=labels, classes=(), images=images, files=())
    if not len(found.labels):
        raise ReplkError(f"{path} holds no pictures", EXPECTED)
    if classes is None:
        raise ReplkError("a backbone has no classes to be right about", "leave out --data")
    if found.classes and len(found.classes) != classes:
        raise ReplkError(f"{path} has {len(found.classes)} folders, the network {classes} classes", EXPECTED)
    if found.labels.min() < 0 or found.labels.max() >= classes:
        raise ReplkError(f"{path} has label {found.labels.max()}, the network {classes} classes", EXPECTED)
    return found


def _arrays(path: Path) -> tuple[Pixels, npt.NDArray[np.int64]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, ZlibError) as exc:
        raise ReplkError(f"{path} cannot be read as pictures: {exc}", EXPECTED) from exc
    if images.ndim == 3:  # noqa: PLR2004  # grey
        images = np.repeat(images[..., None], 3, axis=-1)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:  # noqa: PLR2004
        raise ReplkError(f"{path} holds images {images.dtype} {images.shape} and labels {labels.shape}", EXPECTED)
    if 0 in images.shape[1:3]:
        raise ReplkError(f"{path} holds images of {images.shape[1]}x{images.shape[2]} pixels", EXPECTED)
    if labels.dtype.kind not in "iu":
        raise ReplkError(f"{path} holds labels of type {labels.dtype}, not whole numbers", EXPECTED)
    return images, labels.astype(np.int64)
