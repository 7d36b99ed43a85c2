"""Checkpoint file → a network in which every weight is accounted for.

Nothing in the file is executed, and nothing is guessed: the geometry comes from tensor shapes alone,
and every tensor that is missing, unexpected or misshaped is named at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from replk_deploy import container, weights
from replk_deploy.container import Source
from replk_deploy.errors import CheckpointError
from replk_deploy.files import sha256
from replk_deploy.metadata import Metadata
from replk_deploy.models.base import Form, Network
from replk_deploy.models.replknet import VARIANTS, RepLKNet
from replk_deploy.models.replknet_layouts import foreign, prefix_of, rename
from replk_deploy.preprocess import Preprocessing, from_args
from replk_deploy.records import live


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint, open: the network in eval mode and where each fact about it came from.

    Attributes:
        wrapper: the way from the file's top level to the tensors, `bare` when there was none.
        layout: whose names the tensors had.
        ignored: tensors and entries that are no part of the network.
        selected: what was chosen of several weights or heads, empty when there was no choice to make.
        metadata: the header, when the file is one of ours.
    """

    KIND: ClassVar[str] = "checkpoint"
    FORMAT: ClassVar[int] = 1

    model: Network = live()
    path: Path = live()
    metadata: Metadata | None = live(default=None)
    file: str
    sha256: str
    family: str
    label: str
    form: Form
    wrapper: str
    layout: str
    ignored: tuple[str, ...]
    selected: str
    warnings: tuple[str, ...]
    preprocessing: Preprocessing


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How far named tensors fill a network."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Tell whether every tensor has its place and every place its tensor."""
        return not (self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        parts = {"missing": self.missing, "unexpected": self.unexpected, "misshaped": self.misshaped}
        return "\n".join(f"  {word} {len(names)}: {', '.join(names)}" for word, names in parts.items() if names)


def load(path: Path | str, *, source: Source = "model", head: str | None = None) -> Loaded:
    """Open a checkpoint of any known layout, or a weights file of ours.

    Args:
        path: the file.
        source: `ema` takes the averaged weights that a training run kept beside the raw ones.
        head: which of several classifier heads to keep.

    Raises:
        CheckpointError: damaged, foreign, incomplete, unsafe to read, or with impossible values.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file() and path.stat().st_size and (metadata := weights.header(path)):
        if source == "ema":
            raise CheckpointError(f"{path} holds no averaged weights: replk wrote it", "leave out --weights ema")
        return _ours(path, metadata)
    contents = container.read(path, source=source)
    try:
        tensors, layout, ignored, heads = rename(contents.tensors, head=head)
    except ValueError as exc:
        raise CheckpointError(f"{path}: {exc}", f"see what it holds: replk inspect {path}") from exc
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    try:
        geometry, form = RepLKNet.infer(shapes)
    except ValueError as exc:
        if before := prefix_of(shapes):
            found = sum(name.startswith(before) for name in shapes)
            raise CheckpointError(
                f"{path} holds a RepLKNet under the prefix {before!r}: {found} of its {len(shapes)} tensors",
                "save its state dict without it: torch.save("
                f"{{k[{len(before)}:]: v for k, v in state.items() if k.startswith({before!r})}}, 'bare.pth')",
            ) from exc
        other = foreign(shapes)
        told = f"it is {other}" if other else str(exc)
        raise CheckpointError(
            f"{path} is not a RepLKNet checkpoint: {told}", "replk takes RepLKNet checkpoints"
        ) from exc
    model = RepLKNet.empty(geometry, form)
    fit = check_fit(model, tensors)
    if not fit.exact:
        raise CheckpointError(
            f"{path} does not fill {geometry.label} ({form} form):\n{fit}", "give the whole checkpoint of one network"
        )
    _check_values(path, tensors)
    _fill(model, tensors)
    label, doubts = _label(contents, geometry.label, geometry.classes)
    if contents.has_ema and source == "model":
        doubts.append("it also holds averaged weights: --weights ema takes those")
    if len(heads) > 1:
        doubts.append(f"of the heads {', '.join(heads)} only {head} was kept")
    if any(t.dtype == torch.float64 for t in tensors.values()):
        doubts.append("its float64 weights were rounded to float32")
    doubts += _never_updated(tensors)
    return Loaded(
        model=model,
        path=path,
        file=path.name,
        sha256=sha256(path),
        family=RepLKNet.family,
        label=label,
        form=form,
        wrapper=contents.wrapper,
        layout=layout,
        ignored=(*contents.beside, *ignored),
        selected="-".join(filter(None, ("ema" if source == "ema" else "", head))),
        warnings=tuple(doubts),
        preprocessing=from_args(contents.args, geometry.label),
    )


def check_fit(model: Network, tensors: dict[str, Tensor]) -> Fit:
    """Compare a network's places with named tensors; BatchNorm counters may be absent."""
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    both = wanted.keys() & found.keys()
    return Fit(
        missing=tuple(n for n in wanted if n not in found and not n.endswith("num_batches_tracked")),
        unexpected=tuple(n for n in found if n not in wanted),
        misshaped=tuple(f"{n} {found[n]}, expected {wanted[n]}" for n in wanted if n in both and wanted[n] != found[n]),
    )


def _ours(path: Path, metadata: Metadata) -> Loaded:
    model, _ = weights.read(path)
    return Loaded(
        model=model,
        path=path,
        metadata=metadata,
        file=path.name,
        sha256=sha256(path),
        family=metadata.family,
        label=metadata.label,
        form=metadata.form,
        wrapper="replk",
        layout="reference",
        ignored=(),
        selected=metadata.selected,
        warnings=(),
        preprocessing=metadata.preprocessing,
    )


def _check_values(path: Path, tensors: dict[str, Tensor]) -> None:
    empty = [n for n, t in tensors.items() if t.is_meta]
    if empty:
        raise CheckpointError(
            f"{path} has no values in {len(empty)} tensors: {', '.join(empty)}", "save the model from a real device"
        )
    integers = [n for n, t in tensors.items() if not t.is_floating_point() and not n.endswith("num_batches_tracked")]
    broken = [n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t.float()).all()]
    negative = [n for n, t in tensors.items() if n.endswith("running_var") and (t < 0).any()]
    for names, what in (
        (integers, "not floating point"),
        (broken, "NaN or infinite"),
        (negative, "negative variances"),
    ):
        if names:
            raise CheckpointError(
                f"{path} has {what} values in {len(names)} tensors: {', '.join(names)}",
                "take an earlier checkpoint of the run",
            )


def _fill(model: Network, tensors: dict[str, Tensor]) -> None:
    state = {}
    for name, place in model.state_dict().items():
        tensor = tensors.get(name, torch.zeros((), dtype=torch.int64))
        state[name] = tensor.to(place.dtype).contiguous()
    model.load_state_dict(state, assign=True)
    model.requires_grad_(requires_grad=False)


def _label(contents: container.Contents, inferred: str, classes: int | None) -> tuple[str, list[str]]:
    """Return the label and where `args` disagrees with the tensors."""
    said = {} if contents.args is None else vars(contents.args)
    doubts = []
    name = said.get("model")
    name = name if isinstance(name, str) and name.isprintable() else inferred
    label = inferred
    if inferred not in VARIANTS:
        label = name
    if name != inferred and (name in VARIANTS or inferred in VARIANTS):
        label = inferred
        doubts.append(f"its args say {name}, its tensors are {inferred}")
    count = said.get("nb_classes")
    if isinstance(count, int) and classes is not None and count != classes:
        doubts.append(f"its args say {count} classes, its head has {classes}")
    return label, doubts


def _never_updated(tensors: dict[str, Tensor]) -> list[str]:
    names = [n.removesuffix(".running_var") for n in tensors if n.endswith(".running_var")]
    fresh = [n for n in names if not tensors[f"{n}.running_mean"].any() and (tensors[f"{n}.running_var"] == 1).all()]
    if not fresh:
        return []
    shown = ", ".join(fresh[:3]) + (", …" if len(fresh) > 3 else "")  # noqa: PLR2004
    return [f"{len(fresh)} of {len(names)} BatchNorms were never updated: {shown}; is this a trained checkpoint?"]
