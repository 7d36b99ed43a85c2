"""Labelled pictures through one step of the chain → how often it is right."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from replk_deploy.images import Pictures
from replk_deploy.preprocess import Preprocessing
from replk_deploy.progress import Progress, silent
from replk_deploy.records import live
from replk_deploy.verify import Answer

BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How often one step of the chain is right, and how often it says what the first step says."""

    KIND: ClassVar[str] = "accuracy"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ("top1",)

    step: str
    images: int
    correct: int
    same_as_first: int
    said: npt.NDArray[np.int64] = live()

    @property
    def top1(self) -> float:
        """Return the share of pictures whose class is right, 0 to 1."""
        return self.correct / self.images


def evaluate(
    answer: Answer,
    pictures: Pictures,
    preprocessing: Preprocessing,
    *,
    step: str,
    first: Accuracy | None = None,
    uint8: bool = False,
    progress: Progress = silent,
) -> Accuracy:
    """Count how many pictures are given their class.

    Args:
        answer: gives logits, as the only output.
        pictures: what is shown.
        preprocessing: resizing, and normalisation unless `uint8`.
        step: what the counted thing is called.
        first: the first step of the chain, to compare with.
        uint8: the normalisation is inside the artefact.
        progress: told after each batch.
    """
    said, right = [], 0
    for pixels, labels in pictures.batches(BATCH, preprocessing):
        outputs: Mapping[str, npt.NDArray[np.float64]] = answer(pixels if uint8 else preprocessing.normalise(pixels))
        logits = outputs["logits"]
        classes = np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)  # NaN is no class
        said.append(classes)
        right += int((classes == labels).sum())
        progress(f"accuracy of {step}", sum(map(len, said)), len(pictures.labels))
    every = np.concatenate(said)
    same = len(every) if first is None else int((every == first.said).sum())
    return Accuracy(step=step, images=len(every), correct=right, same_as_first=same, said=every)
