"""Networks and checkpoint files for the tests; run as a script, it writes a full-size checkpoint."""

import argparse
from pathlib import Path

import pytest
import torch

from replk_deploy import lanes
from replk_deploy.models.replknet import VARIANTS, RepLKGeometry, RepLKNet
from replk_deploy.poison import poison, randomise
from replk_deploy.proof import cast
from replk_deploy.selftest import GEOMETRY

SMALL = GEOMETRY  # what the self-test uses
LIKE_XL = RepLKGeometry(
    channels=(8, 12, 16, 24),
    depths=(1, 1, 1, 1),
    kernels=(27, 27, 27, 13),
    small=None,
    dw_channels=(12, 18, 24, 36),
    ffn_channels=(32, 48, 64, 96),
    classes=10,
)
BACKBONE = RepLKGeometry(
    channels=(8, 12, 16, 24),
    depths=(1, 1, 1, 1),
    kernels=(13, 11, 9, 7),
    small=3,
    dw_channels=(8, 12, 16, 24),
    ffn_channels=(16, 24, 32, 48),
    classes=None,
    out_indices=(0, 1, 2, 3),
    norms=(0, 1, 2, 3),
)
GEOMETRIES = {"small": SMALL, "like XL": LIKE_XL, "backbone": BACKBONE}
SIZES = {"RepLKNet-31B": 224, "RepLKNet-31L": 384, "RepLKNet-XL": 320}


def trained(geometry: RepLKGeometry = SMALL, *, seed: int = 0, size: int = 96, device: str = "cpu") -> RepLKNet:
    """Return a float32 network in training form whose BatchNorms fit its activations and are then disturbed."""
    network = randomise(RepLKNet.build(geometry, "training"), seed=seed)
    return cast(poison(network.to(device), size=size, seed=seed).cpu(), torch.float32)


def training_args(**changes: object) -> argparse.Namespace:
    """Return arguments as the reference training script stores them."""
    said = {"model": "RepLKNet-test", "input_size": 64, "nb_classes": 10, "crop_pct": None, "epochs": 300}
    return argparse.Namespace(**(said | {"imagenet_default_mean_and_std": True} | changes))


def save_as_trained(model: RepLKNet, path: Path, /, **args: object) -> Path:
    """Write a checkpoint with the keys of the reference training script."""
    torch.save(
        {"model": model.state_dict(), "optimizer": {}, "epoch": 299, "scaler": {}, "args": training_args(**args)}, path
    )
    return path


def shorten_timing(patch: pytest.MonkeyPatch) -> None:
    """Only how long is taken from the clock changes: numbers measured so are no latencies."""
    short = {"WARM_MS": 1.0, "WARM_CAP_MS": 2.0, "REWARM_MS": 0.0, "BLOCK_MS": 1.0, "FLOW_MS": 1.0, "TARGET": 100.0}
    for name, value in short.items():
        patch.setattr(lanes, name, value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a full-size checkpoint with fitted and disturbed statistics.")
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("path", type=Path)
    options = parser.parse_args()
    size = SIZES[options.variant]
    device = "cuda" if torch.cuda.is_available() else "cpu"  # minutes against an hour for the largest
    half = options.variant == "RepLKNet-XL"
    save_as_trained(
        trained(VARIANTS[options.variant], size=-(-size * 7 // 320) * 32, device=device),
        options.path,
        model=options.variant,
        input_size=size,
        nb_classes=1000,
        imagenet_default_mean_and_std=not half,
    )


if __name__ == "__main__":
    main()
