"""A file on disk → named tensors, without running anything that the file says.

Torch archives open with `weights_only`, which builds tensors and plain containers; training runs also
store an `argparse.Namespace`, so that one class is allowed. MegEngine files are plain pickles of
numpy arrays and open with an unpickler that knows nothing else, and not numpy either: it reads bytes,
type and shape of each array itself. Any other name is refused.
"""

import argparse
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from replk_deploy.errors import CheckpointError, first_line

Source = Literal["model", "ema"]
WRAPPERS: dict[Source, tuple[str, ...]] = {
    "model": ("model", "state_dict", "module"),
    "ema": ("model_ema", "state_dict_ema", "ema_state_dict"),
}
PREFIXES = ("module.", "_orig_mod.", "model.")
DEEPEST = 8  # wrappers in wrappers; a file can hold itself
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
    if (path / "manifest.json").is_file():
        files = sorted(str(file) for file in path.iterdir() if file.suffix in {".safetensors", ".onnx"})
        told = f"name one of its files: {', '.join(files)}" if files else "name the checkpoint that it began from"
        raise CheckpointError(f"{path} is a run folder, and one file is wanted", told)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file", "name a checkpoint: .pth, .pt, .pkl or .safetensors")
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes)", AGAIN)
    if path.suffix == ".safetensors" or _looks_like_safetensors(head, path.stat().st_size):
        return _unwrap(path, _safetensors(path), source)
    if head.startswith(b"PK"):
        return _unwrap(path, _torch_zip(path), source)
    if head[0] == pickle.PROTO[0]:
        return _unwrap(path, _pickle(path), source)
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path} is an ONNX file, not a checkpoint", "judge it: replk verify CHECKPOINT FILE")
    raise CheckpointError(
        f"{path} is not a checkpoint: it starts with {head[:8]!r}",
        "name a file written by torch.save, MegEngine or safetensors",
    )


def _looks_like_safetensors(head: bytes, size: int) -> bool:
    return head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8


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
            damaged = archive.testzip()
    except Exception as exc:  # a damaged archive can fail in any way
        raise CheckpointError(f"{path} is cut short or damaged: it is a torch archive without its end", AGAIN) from exc
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of its record {damaged} is wrong", AGAIN)
    if any(n.endswith("constants.pkl") for n in names):
        raise CheckpointError(f"{path} is a TorchScript program, which runs code", RESAVE)
    if not any(n.endswith("data.pkl") for n in names):
        raise CheckpointError(
            f"{path} is a zip archive but not a torch checkpoint", "name a file written by torch.save"
        )
    with torch.serialization.safe_globals([argparse.Namespace]):
        unsafe = sorted(_guarded(path, lambda: set(torch.serialization.get_unsafe_globals_in_checkpoint(path))))
        if unsafe:
            raise _refusal(path, unsafe)
        return _guarded(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def _pickle(path: Path) -> Any:
    """Open a plain pickle: a torch file of before 1.6, or numpy arrays as MegEngine saves them."""
    try:
        with path.open("rb") as file:
            found = _NumpyUnpickler(file).load()
    except CheckpointError as exc:
        raise _refusal(path, [exc.problem]) from exc
    except Exception as exc:  # a pickle can fail in any way
        raise CheckpointError(f"{path} is cut short or not a checkpoint: {exc}", AGAIN) from exc
    if isinstance(found, int) and found == torch.serialization.MAGIC_NUMBER:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return _guarded(path, lambda: torch.load(path, map_location="cpu", weights_only=True))
    return _guarded(path, lambda: _as_tensors(found))


class _Type:
    """Stands in for numpy.dtype, which would believe whatever memory layout a file claims."""

    def __init__(self, code: str, *_: object) -> None:
        self.native = np.dtype(code)
        self.stored = self.native
        if self.native.kind not in "fiub":
            raise ValueError(f"arrays of {self.native}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.stored = self.native.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray: bytes, a type and a shape that must agree."""

    def __init__(self, *_: object) -> None:
        self.tensor: Tensor | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self._set(data, dtype, shape, "F" if fortran else "C")

    def _set(self, data: bytes, dtype: _Type, shape: tuple[int, ...], order: Literal["C", "F"]) -> None:
        array = np.frombuffer(data, dtype.stored).reshape(shape, order=order)
        self.tensor = torch.from_numpy(array.astype(dtype.native, order="C"))


class _Buffer(_Array):
    def __init__(self, data: bytes, dtype: _Type, shape: tuple[int, ...], order: Literal["C", "F"]) -> None:
        self._set(data, dtype, shape, order)


class _Scalar(_Array):
    def __init__(self, dtype: _Type, data: bytes) -> None:
        self._set(data, dtype, (), "C")


class _Latin1(bytes):
    """Stands in for _codecs.encode, by which old pickles spell bytes."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]  # plain bytes
        if encoding != "latin1":
            raise ValueError(f"bytes spelled in {encoding}")
        return text.encode("latin1")

    def __setstate__(self, state: object) -> None:  # without it, a file could set attributes of this class
        raise ValueError(f"bytes with a state: {state}")


STAND_INS: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _Latin1,
} | {
    (f"numpy.{core}.{name}", function): stand_in
    for core in ("core", "_core")
    for name, function, stand_in in (
        ("multiarray", "_reconstruct", _Array),
        ("multiarray", "scalar", _Scalar),
        ("numeric", "_frombuffer", _Buffer),
    )
}


class _NumpyUnpickler(pickle._Unpickler):  # in Python: a damaged index must not allocate gigabytes
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in STAND_INS:
            raise CheckpointError(f"{module}.{name}", "")
        return STAND_INS[module, name]


def _as_tensors(found: Any) -> Any:
    if isinstance(found, Mapping):
        return {key: _as_tensors(value) for key, value in found.items()}
    return found.tensor if isinstance(found, _Array) else found


def _guarded(path: Path, opened: Callable[[], Any]) -> Any:
    try:
        return opened()
    except pickle.UnpicklingError as exc:
        named = re.search(r"GLOBAL ([\w.]+)", str(exc))
        if named:
            raise _refusal(path, [named[1]]) from exc
        raise CheckpointError(f"{path} is not a checkpoint: {first_line(exc)}", AGAIN) from exc
    except Exception as exc:  # damaged bytes can fail in any way
        raise CheckpointError(f"{path} is cut short or damaged: {first_line(exc)}", AGAIN) from exc


def _refusal(path: Path, names: list[str]) -> CheckpointError:
    listed = ", ".join(names)
    return CheckpointError(f"{path} is refused: reading it would run code of {listed}; nothing was run", RESAVE)


def _unwrap(path: Path, found: Any, source: Source) -> Contents:
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not named tensors", RESAVE)
    args = found.get("args")
    beside: list[str] = []
    has_ema = any(isinstance(found.get(k), Mapping) for k in WRAPPERS["ema"])
    steps: list[str] = []
    keys = WRAPPERS[source]
    while len(steps) < DEEPEST and (key := next((k for k in keys if isinstance(found.get(k), Mapping)), None)):
        beside += [str(k) for k in found if k != key]
        steps.append(key)
        found, keys = found[key], WRAPPERS["model"]
    if source == "ema" and not steps:
        raise CheckpointError(
            f"{path} holds no averaged weights ({', '.join(WRAPPERS['ema'])})", "leave out --weights ema"
        )
    other = [str(k) for k, v in found.items() if not isinstance(v, Tensor) or v.layout != torch.strided]
    if other or not found:
        shown = ", ".join(other[:8]) or "nothing"
        raise CheckpointError(
            f"{path} does not hold named tensors under {' / '.join(steps) or 'its top level'}: {shown}",
            "take its averaged weights: --weights ema" if has_ema and not steps else RESAVE,
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
