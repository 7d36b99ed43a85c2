"""Our own weights file: safetensors whose header says what it is and what vouches for it."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from replk_deploy.errors import CheckpointError, IntegrityError
from replk_deploy.metadata import Metadata
from replk_deploy.models import FAMILIES
from replk_deploy.models.base import Network
from replk_deploy.precision import TOLERANCES

AGAIN = "copy or export it again"


def content_hash(model: Network) -> str:
    """Return the SHA-256 of a network's tensors: names, types, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def judged_hash(model: Network, metadata: Metadata) -> str:
    """Return the SHA-256 of what a verdict speaks of: a network's tensors and its header, the verdict left out."""
    header = sorted(dataclasses.replace(metadata, verdict=None).to_strings().items())
    return hashlib.sha256(f"{content_hash(model)} {header}".encode()).hexdigest()


def write(path: Path, model: Network, metadata: Metadata) -> None:
    """Write a network's weights as they are, with the metadata in the header."""
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    try:
        save_file(tensors, path, metadata=metadata.to_strings())
    except SafetensorError as exc:  # a full disk, above all
        raise OSError(str(exc)) from exc


def annotate(source: Path, path: Path, said: Mapping[str, str]) -> None:
    """Write a weights file again with more in its header, which stands beside the metadata."""
    try:
        with safe_open(source, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            save_file(tensors, path, metadata={**(file.metadata() or {}), **said})
    except SafetensorError as exc:  # a full disk, above all
        raise OSError(str(exc)) from exc


def notes(path: Path) -> dict[str, str]:
    """Return all that the header of a safetensors file says."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def header(path: Path) -> Metadata | None:
    """Read the metadata of a safetensors file; None when it is not one of ours.

    Raises:
        CheckpointError: not a safetensors file, cut short, or a damaged header.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return Metadata.from_strings(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as exc:
        raise CheckpointError(f"{path} is not a whole safetensors file: {exc}", AGAIN) from exc


def described(path: Path) -> tuple[Network, Metadata]:
    """Build what the header of a weights file of ours names, without memory for its weights, of which none is read.

    Raises:
        CheckpointError: not ours, or a damaged header.
    """
    metadata = header(path)
    if metadata is None or metadata.family not in FAMILIES:
        raise CheckpointError(f"{path} was not written by replk", f"see what it holds: replk inspect {path}")
    family = FAMILIES[metadata.family]
    try:
        model = family.empty(family.parse(metadata.geometry), metadata.form)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ZeroDivisionError) as exc:
        raise CheckpointError(f"{path} has a damaged header: geometry {metadata.geometry}", AGAIN) from exc
    return model.to(TOLERANCES[metadata.precision].torch_dtype), metadata


def read(path: Path) -> tuple[Network, Metadata]:
    """Open a weights file of ours as a network in eval mode, in the precision of the file.

    Raises:
        CheckpointError: not ours, damaged, or its tensors do not fill the network it names.
        IntegrityError: weights or header are not those that its verdict speaks of.
    """
    model, metadata = described(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if wanted != {name: tuple(t.shape) for name, t in tensors.items()}:
        raise CheckpointError(
            f"the tensors of {path} do not fit its own header", "fuse the checkpoint again: replk fuse CKPT"
        )
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if dtypes != {TOLERANCES[metadata.precision].torch_dtype}:
        raise CheckpointError(f"{path} says {metadata.precision} and holds {dtypes}", "export it again")
    model.load_state_dict(tensors, assign=True)
    if metadata.verdict and metadata.verdict.content != judged_hash(model, metadata):
        raise IntegrityError(
            f"weights or header of {path} are not those its verdict speaks of", "fuse the checkpoint again"
        )
    return model.requires_grad_(requires_grad=False).eval(), metadata
