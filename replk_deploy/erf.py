"""The effective receptive field: which pixels the centre of the last feature map depends on.

As in the RepLKNet paper: the positive part of the gradient of the central values (after a ReLU, summed
over channels) with respect to the image, summed over colours, averaged over images, then A = log10(1 + ·)
scaled to a largest value of 1. Its measure is r, the share of the image that the smallest centred
rectangle covers which holds a share t of A: the larger, the wider the field.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from replk_deploy.errors import ReplkError
from replk_deploy.metadata import State
from replk_deploy.models.base import Network
from replk_deploy.progress import Progress, silent

SHARES = (0.2, 0.3, 0.5, 0.99)  # t of the paper
APART = 1e-2  # beyond it the fusion is wrong, see `state_of`
CELLS = 56  # a picture in a report shows no more a side
Map = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    """The smallest centred rectangle that holds a share of all contributions, and how much of the image it covers."""

    share: float
    height: int
    width: int
    area: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """The receptive field of one network; `cells` is the map in means of blocks of pixels, largest value 1."""

    network: Literal["trained", "fused"]
    squares: tuple[Square, ...]
    cells: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Receptive:
    """Receptive fields before and after the fusion.

    Attributes:
        shown: what the images were.
        size: height and width of the images.
        apart: relative L2 distance of the two maps.
    """

    KIND: ClassVar[str] = "erf"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ("state",)

    label: str
    sha256: str
    shown: str
    images: int
    size: tuple[int, int]
    fields: tuple[Field, ...]
    apart: float

    @property
    def state(self) -> State:
        """Tell whether the two maps are one."""
        return state_of(self.apart)


def state_of(apart: float | str) -> State:
    """Judge the distance of two maps.

    float32 rounds them 3e-7 apart in the demo and 6e-4 in 31B; mirrored kernels moved them by 0.5. What moves them by
    less is for the proof of the fusion to find.
    """
    return "pass" if float(apart) <= APART else "rejected"


def moved(apart: float | str) -> str:
    """Say that two maps are not one; nothing where they are."""
    if state_of(apart) == "pass":
        return ""
    return f"fusion moved the receptive field by {float(apart):.1e}, limit {APART:.0e}"


def erf(
    networks: Mapping[Literal["trained", "fused"], Network],
    images: npt.NDArray[np.float32],
    *,
    label: str = "",
    sha256: str = "",
    shown: str = "",
    progress: Progress = silent,
) -> Receptive:
    """Compare the effective receptive fields of two forms of a network.

    Args:
        networks: trained and fused, on the CPU in eval mode.
        images: [N, 3, H, W], normalised.
        label: name of the network.
        sha256: of the checkpoint.
        shown: what the images are.
        progress: told after each image.

    Raises:
        ReplkError: the centre answers nothing, or not a number.
    """
    maps = {name: contributions(network, images, name, progress) for name, network in networks.items()}
    fields = tuple(Field(network=n, squares=_squares(a), cells=_cells(a)) for n, a in maps.items())
    first, *_, last = [*maps.values(), *maps.values()]
    height, width = images.shape[2:]
    return Receptive(
        label=label,
        sha256=sha256,
        shown=shown,
        images=len(images),
        size=(height, width),
        fields=fields,
        apart=float(np.linalg.norm(last - first) / np.linalg.norm(first)),
    )


def contributions(
    network: Network, images: npt.NDArray[np.float32], name: str = "network", progress: Progress = silent
) -> Map:
    """Return A, [H, W] with a largest value of 1."""
    total = torch.zeros(images.shape[2:], dtype=torch.float64)
    weight = next(network.parameters())
    for done, image in enumerate(images, start=1):
        pixels = torch.from_numpy(image[None]).to(weight.dtype).requires_grad_()
        centre = _centre(network, pixels)
        (gradient,) = torch.autograd.grad(centre, pixels)
        total += gradient.relu().sum((0, 1)).double()
        progress(f"receptive field, {name}", done, len(images))
    scaled = np.log10(1 + total.numpy() / len(images))
    if not (np.isfinite(scaled).all() and scaled.max() > 0):
        raise ReplkError(
            "the centre of the last feature map depends on no pixel, or on NaN", "show it other images: --data"
        )
    found: Map = scaled / scaled.max()
    return found


def _centre(network: Network, pixels: Tensor) -> Tensor:
    features = pixels
    for block in network.blocks():
        features = network.get_submodule(block)(features)
    height, width = features.shape[2:]
    return features[:, :, height // 2, width // 2].relu().sum()


def _squares(scores: Map) -> tuple[Square, ...]:
    height, width = scores.shape
    found = []
    for share in SHARES:
        for reach in range(max(height, width)):
            rows, columns = (round(reach * side / max(height, width)) for side in (height, width))
            top, left = max(0, height // 2 - rows), max(0, width // 2 - columns)
            inside = scores[top : height // 2 + rows + 1, left : width // 2 + columns + 1]
            if inside.sum() >= share * scores.sum():
                break
        high, wide = inside.shape
        found.append(Square(share=share, height=high, width=wide, area=high * wide / scores.size))
    return tuple(found)


def _cells(scores: Map) -> tuple[tuple[float, ...], ...]:
    rows, columns = ([side * i // min(side, CELLS) for i in range(min(side, CELLS) + 1)] for side in scores.shape)
    means = [[float(scores[a:b, c:d].mean()) for c, d in pairwise(columns)] for a, b in pairwise(rows)]
    top = max(map(max, means))
    return tuple(tuple(round(cell / top, 4) for cell in row) for row in means)
