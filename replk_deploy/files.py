"""Files that are whole or absent, and known by their hash."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from replk_deploy.errors import ReplkError


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def writable(folder: Path) -> None:
    """Create a folder where there is none.

    Raises:
        ReplkError: it cannot be created, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as exc:
        raise ReplkError(
            f"{folder} cannot be written: {exc.strerror}", "name another place, or run in another folder"
        ) from exc


def demand(path: Path) -> None:
    """Refuse a name that no file can take, before the work that would fill it; nothing is left behind.

    Raises:
        ReplkError: it is a folder or a device, or nothing can be written there.
    """
    try:
        if path.exists() and not path.is_file():
            raise ReplkError(f"{path} is {'a folder' if path.is_dir() else 'no plain file'}", "name a file")
        with TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())):
            pass
    except OSError as exc:
        raise ReplkError(f"{path} cannot be written: {exc.strerror}", "name another place") from exc


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it is gone when the block ends, unless `commit` took it.

    Raises:
        ReplkError: the folder or the file cannot be written, or another file that the block opens cannot be used.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    writable(path.parent)
    try:
        part.touch()
        yield part
    except OSError as exc:  # a full disk, above all
        if exc.filename not in {None, part, str(part)}:
            raise ReplkError(f"{exc.filename}: {exc.strerror}", "see that it is there and may be used") from exc
        raise ReplkError(f"{path} cannot be written: {exc.strerror or exc}", "name another place") from exc
    finally:
        part.unlink(missing_ok=True)


def commit(part: Path, path: Path) -> None:
    """Give a staged file its name, whole and on the disk.

    Raises:
        ReplkError: the name is taken by a folder, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # what writes it may have made it private
        part.replace(path)
    except OSError as exc:
        raise ReplkError(f"{path} cannot be written: {exc.strerror}", "name another place") from exc


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, or leave the old one as it was."""
    with staged(path) as part:
        part.write_text(text, encoding="utf-8")
        commit(part, path)
