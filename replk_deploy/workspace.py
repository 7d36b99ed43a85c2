"""The run folder: which files there are, what each came from, and what vouches for it.

    replk-out/latest              the name of the newest run
    replk-out/<name>/             manifest.json, the artefacts, results/, rejected/, report.*

Files are written beside their place and renamed, the manifest last: after a crash a file may exist
that nothing vouches for, never the reverse.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from filelock import FileLock

from replk_deploy import files, records
from replk_deploy.errors import IntegrityError, ReplkError
from replk_deploy.metadata import Verdict

ROOT = Path("replk-out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One artefact of a run.

    Attributes:
        sha256: of the whole file.
        made_from: hash of each file it came from, by name.
        by: the command that made it.
        options: what decided its content; other options mean it must be made again.
        verdict: what its verification found.
        record: SHA-256 of its record in results/; empty where there was none.
    """

    sha256: str
    made_from: Mapping[str, str]
    by: str
    options: Mapping[str, Any]
    verdict: Verdict
    record: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a run holds, oldest artefact first."""

    KIND: ClassVar[str] = "manifest"
    FORMAT: ClassVar[int] = 1

    run: str
    artefacts: Mapping[str, Entry]


class Workspace:
    """One run folder."""

    def __init__(self, folder: Path) -> None:
        """Open a run folder that has a manifest, or begin one.

        Raises:
            IntegrityError: the manifest is damaged or of a newer version.
        """
        self.folder = folder
        self._artefacts: dict[str, Entry] = {}
        if (folder / "manifest.json").exists():
            record = records.read(folder / "manifest.json", Manifest.KIND, Manifest.FORMAT)
            try:
                self._artefacts = {name: _entry(entry) for name, entry in record["artefacts"].items()}
            except (KeyError, TypeError, AttributeError) as exc:
                raise IntegrityError(
                    f"{folder}/manifest.json is damaged: {exc}", f"make the run again: rm -r {folder}"
                ) from exc

    @classmethod
    def latest(cls, root: Path = ROOT) -> Self:
        """Open the newest run under `root`.

        Raises:
            ReplkError: there is none.
        """
        pointer = root / "latest"
        name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
        if not name or not (root / name / "manifest.json").is_file():
            runs = sorted(found.parent.as_posix() for found in root.glob("*/manifest.json"))
            if runs:
                raise ReplkError(f"{pointer} names no run", f"name one of: {', '.join(runs)}")
            raise ReplkError(f"there is no run in {root.absolute()}", "begin with: replk fuse CHECKPOINT")
        return cls(root / name)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open an existing run folder.

        Raises:
            ReplkError: it is not one.
        """
        if not (folder / "manifest.json").is_file():
            raise ReplkError(
                f"{folder} is not a run folder: it has no manifest.json", "begin with: replk fuse CHECKPOINT"
            )
        return cls(folder)

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self.folder.name

    def make_latest(self) -> None:
        """Let commands without a path continue from this run."""
        files.write_text(self.folder.parent / "latest", f"{self.name}\n")

    def path(self, name: str) -> Path:
        """Return where an artefact or result of this name lies or will lie."""
        return self.folder / name

    def entry(self, name: str) -> Entry | None:
        """Return what the manifest says of an artefact."""
        return self._artefacts.get(name)

    def artefacts(self, suffix: str) -> tuple[str, ...]:
        """Name the artefacts whose name ends so, the one made last first."""
        return tuple(n for n in reversed(self._artefacts) if n.endswith(suffix))

    def take(self, name: str) -> Path:
        """Return the path of an artefact that is still the file the manifest describes.

        Raises:
            IntegrityError: missing, unknown or altered.
        """
        entry, path = self._artefacts.get(name), self.path(name)
        if entry is None or not path.is_file():
            by = entry.by if entry else "fuse CHECKPOINT"
            raise IntegrityError(f"{path} is missing", f"make it again: replk {by}")
        again = f"make it again: rm {path} and repeat replk {entry.by}"
        if files.sha256(path) != entry.sha256:
            raise IntegrityError(f"{path} is not the file that its manifest describes: its hash differs", again)
        return path

    def result(self, name: str) -> Path:
        """Return the record of an artefact that is still the one the manifest describes.

        Raises:
            IntegrityError: missing or altered.
        """
        entry, path = self._artefacts.get(name), self.path(f"results/{name}.json")
        again = f"make it again: rm {self.path(name)} and repeat replk {entry.by if entry else 'fuse'}"
        if not path.is_file():
            raise IntegrityError(f"{path} is missing", again)
        if entry and entry.record and files.sha256(path) != entry.record:
            raise IntegrityError(f"{path} is not the record that its manifest describes: its hash differs", again)
        return path

    def fresh(self, name: str, made_from: Mapping[str, str], options: Mapping[str, Any]) -> bool:
        """Tell whether an artefact made of the same files with the same options is there to be taken again.

        Raises:
            IntegrityError: the file is there and was altered.
        """
        entry = self._artefacts.get(name)
        if entry is None or not self.path(name).is_file():
            return False
        if dict(entry.made_from) != dict(made_from) or dict(entry.options) != records.plain(options):
            return False
        self.take(name)
        return True

    def record(
        self, name: str, *, made_from: Mapping[str, str], by: str, options: Mapping[str, Any], verdict: Verdict
    ) -> Entry:
        """Enter an artefact that lies in the folder as the newest one."""
        said = self.path(f"results/{name}.json")
        entry = Entry(
            sha256=files.sha256(self.path(name)),
            made_from=dict(made_from),
            by=by,
            options=records.plain(options),
            verdict=verdict,
            record=files.sha256(said) if said.is_file() else "",
        )
        with self._alone():
            self._artefacts |= Workspace(self.folder)._artefacts  # another process may have added to them
            self._artefacts.pop(name, None)
            self._artefacts[name] = entry
            self._write()
        return entry

    def save(self) -> None:
        """Write the manifest."""
        with self._alone():
            self._artefacts |= Workspace(self.folder)._artefacts
            self._write()

    def _alone(self) -> FileLock:
        """Keep other processes from writing the manifest between our reading and writing it.

        Raises:
            ReplkError: the folder cannot be written.
        """
        files.writable(self.folder)
        return FileLock(self.folder / ".lock")

    def _write(self) -> None:
        manifest = Manifest(run=self.name, artefacts=self._artefacts)
        files.write_text(self.folder / "manifest.json", records.to_json(manifest))


def _entry(fields: dict[str, Any]) -> Entry:
    return Entry(**{**fields, "verdict": Verdict(**fields["verdict"])})
