"""A file on disk → named tensors, without running anything that the file says.

Torch archives open with `weights_only`, which builds tensors and plain containers; training runs also
store an `argparse.Namespace`, so that one class is allowed. MegEngine files are plain pickles of
numpy arrays and open with an unpickler that knows nothing else. Any other name is refused.
"""

import argparse
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from replk_deploy.errors import CheckpointError

Source = Literal["model", "ema"]
WRAPPERS: dict[Source, tuple[str, ...]] = {
    "model": ("model", "state_dict", "module"),
    "ema": ("model_ema", "state_dict_ema", "ema_state_dict"),
}
PREFIXES = ("module.", "_orig_mod.", "model.")
NUMPY = {
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}
RESAVE = "load it where you trust it and save the weights alone: torch.save(model.state_dict(), 'weights.pth')"
AGAIN = "copy or download the file again, and compare its size with the original"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a file held: tensors by name, the training arguments, and the way to them."""

    tensors: dict[str, Tensor]
    args: argparse.Namespace | None
    wrapper: str
    beside: tuple[str, ...]
    has_ema: bool


def read(path: Path, *, source: Source = "model") -> Contents:
    """Read the tensors of a checkpoint file; wrappers and unanimous prefixes are removed.

    Raises:
        CheckpointError: missing, empty, cut short, not a checkpoint, or it names a class that is not allowed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file", "name a checkpoint: .pth, .pt, .pkl or .safetensors")
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes)", AGAIN)
    if path.suffix == ".safetensors" or _looks_like_safetensors(head, path.stat().st_size):
        return _unwrap(path, _safetensors(path), source)
    if head.startswith(b"PK"):
        return _unwrap(path, _torch_zip(path), source)
    if head[0] == pickle.PROTO[0]:
        return _unwrap(path, _pickle(path), source)
    raise CheckpointError(
        f"{path} is not a checkpoint: it starts with {head!r}",
        "name a file written by torch.save, MegEngine or safetensors",
    )


def _looks_like_safetensors(head: bytes, size: int) -> bool:
    return len(head) == 8 and 2 <= struct.unpack("<Q", head)[0] <= size - 8 and head[0] != pickle.PROTO[0]  # noqa: PLR2004


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{path} is not a whole safetensors file: {exc}", AGAIN) from exc


def _torch_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as exc:
        raise CheckpointError(f"{path} is cut short or damaged: it is a torch archive without its end", AGAIN) from exc
    if any(n.endswith("constants.pkl") for n in names):
        raise CheckpointError(f"{path} is a TorchScript program, which runs code", RESAVE)
    if not any(n.endswith("data.pkl") for n in names):
        raise CheckpointError(
            f"{path} is a zip archive but not a torch checkpoint", "name a file written by torch.save"
        )
    with torch.serialization.safe_globals([argparse.Namespace]):
        unsafe = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
        if unsafe:
            raise _refusal(path, unsafe)
        return _weights_only(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def _pickle(path: Path) -> Any:
    """Open a plain pickle: a torch file of before 1.6, or numpy arrays as MegEngine saves them."""
    try:
        with path.open("rb") as file:
            found = _NumpyUnpickler(file).load()
    except CheckpointError as exc:
        raise _refusal(path, [exc.problem]) from exc
    except Exception as exc:  # a pickle can fail in any way
        raise CheckpointError(f"{path} is cut short or not a checkpoint: {exc}", AGAIN) from exc
    if found == torch.serialization.MAGIC_NUMBER:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return _weights_only(path, lambda: torch.load(path, map_location="cpu", weights_only=True))
    return _as_tensors(found)


class _NumpyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NUMPY:
            raise CheckpointError(f"{module}.{name}", "")
        return super().find_class(module, name)


def _as_tensors(found: Any) -> Any:
    if isinstance(found, Mapping):
        return {key: _as_tensors(value) for key, value in found.items()}
    if isinstance(found, np.ndarray) and found.dtype.kind in "fiub":
        return torch.from_numpy(np.ascontiguousarray(found))
    return found


def _weights_only(path: Path, opened: Callable[[], Any]) -> Any:
    try:
        return opened()
    except pickle.UnpicklingError as exc:
        named = re.search(r"GLOBAL ([\w.]+)", str(exc))
        if named:
            raise _refusal(path, [named[1]]) from exc
        raise CheckpointError(f"{path} is not a checkpoint: {_first_line(exc)}", AGAIN) from exc
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as exc:
        raise CheckpointError(f"{path} is cut short or damaged: {_first_line(exc)}", AGAIN) from exc


def _refusal(path: Path, names: list[str]) -> CheckpointError:
    listed = ", ".join(names)
    return CheckpointError(f"{path} is refused: reading it would run code of {listed}; nothing was run", RESAVE)


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__


def _unwrap(path: Path, found: Any, source: Source) -> Contents:
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not named tensors", RESAVE)
    args = found.get("args")
    beside: list[str] = []
    has_ema = any(isinstance(found.get(k), Mapping) for k in WRAPPERS["ema"])
    steps: list[str] = []
    keys = WRAPPERS[source]
    while key := next((k for k in keys if isinstance(found.get(k), Mapping)), None):
        beside += [str(k) for k in found if k != key]
        steps.append(key)
        found, keys = found[key], WRAPPERS["model"]
    if source == "ema" and not steps:
        raise CheckpointError(
            f"{path} holds no averaged weights ({', '.join(WRAPPERS['ema'])})", "leave out --weights ema"
        )
    other = [str(k) for k, v in found.items() if not isinstance(v, Tensor)]
    if other or not found:
        shown = ", ".join(other[:8]) or "nothing"
        raise CheckpointError(
            f"{path} does not hold named tensors under {' / '.join(steps) or 'its top level'}: {shown}", RESAVE
        )
    tensors = {str(k): v for k, v in found.items()}
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), None):
        steps.append(prefix)
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return Contents(
        tensors=tensors,
        args=args if isinstance(args, argparse.Namespace) else None,
        wrapper=" / ".join(steps) or "bare",
        beside=tuple(beside),
        has_ema=has_ema,
    )
