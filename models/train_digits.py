"""Train a small RepLKNet on scikit-learn's digits and save it the way the reference training script does.

Released weights weigh hundreds of megabytes, and random ones prove little: fresh BatchNorms are the
identity. This file is small and has lived: its statistics come from data, its branches and its two
sets of weights differ, and many a wrong fold shows in accuracy, not in the last digits alone. Kernels
are those of the large variants, 31, 29, 27 and 13, and reach from every pixel over the whole feature
map, which is 16, 8, 4 and 2 pixels wide.

    python models/train_digits.py --output models/digits.pth --data-output models/digits-test.npz
"""

import argparse
import copy
import math
import time
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from replk_deploy.models.replknet import RepLKGeometry, RepLKNet
from replk_deploy.preprocess import Pixels, Preprocessing, from_args

Labels = npt.NDArray[np.int64]

CHANNELS = (16, 24, 32, 48)
GEOMETRY = RepLKGeometry(
    channels=CHANNELS,
    depths=(1, 1, 2, 1),
    kernels=(31, 29, 27, 13),
    small=5,
    dw_channels=CHANNELS,
    ffn_channels=tuple(4 * c for c in CHANNELS),
    classes=10,
)
SIDE = 64
SPLIT_SEED = 0  # the held-out pictures are the same whatever seed the training has
SHIFT = 6  # pixels; less than one of the 8x8 originals
NOISE = 8.0  # standard deviation, in steps of 0..255


def digits() -> tuple[Pixels, Labels, Pixels, Labels]:
    """Return 80 % of the digits to train on and the other 20 %, the classes in equal shares.

    Returns:
        train images, train labels, test images, test labels; images are [N, 64, 64, 3] uint8, the
        8x8 originals scaled from 0..16 to 0..255 and enlarged bicubically, labels [N] int64.
    """
    originals, labels = load_digits(return_X_y=True)
    grey = np.round(originals.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(g).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB") for g in grey]
    images = np.stack([np.asarray(picture) for picture in large])
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    labels = labels.astype(np.int64)
    return images[train], labels[train], images[test], labels[test]


def settings(*, epochs: int, seed: int) -> argparse.Namespace:
    """Return the arguments of the run under the names of the reference training script."""
    return argparse.Namespace(
        model="RepLKNet-digits",
        data_set="digits",
        nb_classes=GEOMETRY.classes,
        input_size=SIDE,
        crop_pct=1.0,
        imagenet_default_mean_and_std=True,
        epochs=epochs,
        warmup_epochs=2,
        batch_size=64,
        opt="adamw",
        lr=4e-3,
        min_lr=1e-5,
        weight_decay=0.05,
        smoothing=0.1,
        drop_path=0.0,
        model_ema=True,
        model_ema_decay=0.98,
        device="cpu",
        seed=seed,
    )


def augment(images: Pixels, rng: np.random.Generator) -> Pixels:
    """Move each picture by a few pixels, black coming in, and add noise; [N, H, W, 3] as before."""
    side = images.shape[1]
    framed = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
    corners = rng.integers(0, 2 * SHIFT, size=(len(images), 2), endpoint=True)
    moved = np.stack([p[y : y + side, x : x + side] for p, (y, x) in zip(framed, corners, strict=True)])
    return (moved + rng.normal(0, NOISE, moved.shape)).round().clip(0, 255).astype(np.uint8)


def tensor(images: Pixels, preprocessing: Preprocessing) -> Tensor:
    """Normalise pictures as the deployed network will; channels last halves the time of a step."""
    return torch.from_numpy(preprocessing.normalise(images)).to(memory_format=torch.channels_last)


def rate(step: int, steps_per_epoch: int, args: argparse.Namespace) -> float:
    """Give the learning rate of a step: linear warm-up, then half a cosine down to `min_lr`."""
    warmup, total = args.warmup_epochs * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warmup:
        return float(args.lr * (step + 1) / warmup)
    done = (step - warmup) / max(1, total - warmup)
    return float(args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * done)) / 2)


def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights and statistics towards the model's; counters are copied."""
    latest = model.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(latest[name], 1 - decay)
        else:
            value.copy_(latest[name])


def adamw(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """Return an optimizer that decays kernels and matrices, not norms and biases."""
    wide = [p for p in model.parameters() if p.dim() > 1]
    flat = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": wide, "weight_decay": args.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr)


def train(images: Pixels, labels: Labels, args: argparse.Namespace) -> tuple[RepLKNet, RepLKNet, torch.optim.AdamW]:
    """Train from nothing and return the network, its moving average and the optimizer; prints a line per epoch."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = RepLKNet.build(GEOMETRY, "training").train()
    average = copy.deepcopy(model).eval()
    optimizer = adamw(model, args)
    preprocessing = from_args(args, GEOMETRY.label)
    per_epoch = len(images) // args.batch_size  # an incomplete last batch is left out
    for epoch in range(args.epochs):
        start, losses = time.perf_counter(), []
        order = rng.permutation(len(images))
        for index in range(per_epoch):
            chosen = order[index * args.batch_size : (index + 1) * args.batch_size]
            for group in optimizer.param_groups:
                group["lr"] = rate(epoch * per_epoch + index, per_epoch, args)
            (logits,) = model(tensor(augment(images[chosen], rng), preprocessing))
            loss = functional.cross_entropy(logits, torch.from_numpy(labels[chosen]), label_smoothing=args.smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            follow(average, model, args.model_ema_decay)
            losses.append(loss.item())
        print(f"epoch {epoch:2}: loss {np.mean(losses):.4f}, {time.perf_counter() - start:.1f} s", flush=True)
    return model.eval(), average, optimizer


@torch.no_grad()
def top1(model: RepLKNet, images: Pixels, labels: Labels, preprocessing: Preprocessing) -> float:
    """Return the share of pictures whose largest logit is the label's."""
    (logits,) = model(tensor(images, preprocessing))
    return float((logits.argmax(1).numpy() == labels).mean())


def write_npz(path: Path, **arrays: npt.NDArray[np.generic]) -> None:
    """Write arrays that `numpy.load` reads, by bzip2: 0.5 MB where `savez_compressed` needs 1.3 for enlarged digits."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def main() -> None:
    """Train, print the held-out accuracy of both sets of weights and write the files."""
    parser = argparse.ArgumentParser(description="Train a small RepLKNet on scikit-learn's digits.")
    parser.add_argument("--output", type=Path, default=Path("digits.pth"), help="checkpoint to write")
    parser.add_argument("--data-output", type=Path, help="write the held-out pictures and labels here, as .npz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    # One order of summation. Two threads on two busy cores took up to 14 times as long per step (torch 2.13).
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    args = settings(epochs=options.epochs, seed=options.seed)
    train_images, train_labels, test_images, test_labels = digits()
    model, average, optimizer = train(train_images, train_labels, args)
    preprocessing = from_args(args, GEOMETRY.label)
    for name, network in (("model", model), ("model_ema", average)):
        print(f"{name}: held-out top-1 {top1(network, test_images, test_labels, preprocessing):.4f}")
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": args.epochs - 1,
        "args": args,
        "model_ema": average.state_dict(),
    }
    with options.output.open("wb") as file:  # not the path: torch would write its name into the file
        torch.save(checkpoint, file)
    if options.data_output is not None:
        write_npz(options.data_output, images=test_images, labels=test_labels)


if __name__ == "__main__":
    main()
