"""What happens to a picture before the network sees it.

The rules are those of the reference training code: inputs of 384 and more are warped to the square,
smaller ones are resized on the short side and cropped in the centre; XL models use mean = std = 0.5.
"""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]
WARP_FROM = 384
MOST = 2**15  # pixels a side
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """RGB in 0..1 minus mean, over std; `said_by` tells whether the checkpoint or a default said so."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Literal["warp", "crop"]
    crop_pct: float
    said_by: Literal["checkpoint", "default", "user"]

    def pixels(self, picture: "Image") -> Pixels:
        """Resize and crop a picture to [H, W, 3] uint8, bicubic."""
        from PIL import Image as pil  # noqa: N813, PLC0415  # an extra, needed for pictures only

        picture = picture.convert("RGB")
        height, width = self.size
        if self.resize == "warp":
            return np.asarray(picture.resize((width, height), pil.Resampling.BICUBIC))
        wide, high = int(width / self.crop_pct), int(height / self.crop_pct)  # one side is exact, the other follows
        if wide * picture.height >= high * picture.width:
            high = int(wide * picture.height / picture.width)
        else:
            wide = int(high * picture.width / picture.height)
        wide, high = max(width, wide), max(height, high)
        if (wide, high) != picture.size:
            picture = picture.resize((wide, high), pil.Resampling.BICUBIC)
        left, top = round((wide - width) / 2), round((high - height) / 2)
        return np.asarray(picture.crop((left, top, left + width, top + height)))

    def normalise(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Turn [N, H, W, 3] uint8 into [N, 3, H, W] float32."""
        scaled = (pixels.astype(np.float32) / 255 - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32)


def from_args(args: argparse.Namespace | None, label: str) -> Preprocessing:
    """Read the preprocessing that a training run stored, with the variant's own as default.

    Args:
        args: the Namespace that the reference training script saves, or None.
        label: name of the variant; XL differs in constants and size.
    """
    said: dict[str, Any] = {} if args is None else vars(args)
    size = _number(said.get("test_size")) or _number(said.get("input_size"))
    default = {"RepLKNet-31L": 384, "RepLKNet-XL": 320}.get(label, 224)
    side = int(size or default)
    half = label == "RepLKNet-XL"
    if "imagenet_default_mean_and_std" in said:
        half = not said["imagenet_default_mean_and_std"]
    mean, std = HALF if half else IMAGENET
    return Preprocessing(
        size=(side, side),
        mean=mean,
        std=std,
        resize="warp" if (_number(said.get("input_size")) or side) >= WARP_FROM else "crop",
        crop_pct=_number(said.get("crop_pct")) or 0.875,
        said_by="checkpoint" if size else "default",
    )


def _number(value: object) -> float | None:
    """Return a number that a size or a share can be; None for anything else."""
    sensible = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MOST
    return float(value) if sensible else None  # type: ignore[arg-type]  # a number, if sensible
