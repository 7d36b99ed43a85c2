"""The record beside an engine, under its name + `.json`: what it is, where it came from, what vouches for it.

An engine is executable code and opens on one version and one kind of device only, so its sidecar is
checked before a byte of it is given to a runtime.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

from replk_deploy import files, records
from replk_deploy.backends.base import TensorSpec
from replk_deploy.batch import Batch
from replk_deploy.errors import IntegrityError, ReplkError
from replk_deploy.metadata import Metadata, State, Verdict
from replk_deploy.precision import TOLERANCES, Precision

UNJUDGED = Verdict(state="unverified", content="", reference="", worst=None, why="not verified")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """What an engine is.

    Attributes:
        backend: what opens it.
        sha256: of the engine's file.
        source: name of the file it was built from.
        source_sha256: of that file.
        made_with: what must be the same to open it.
        recipe: the choices it was built with.
        facts: seconds, memory, flags in force.
        metadata: the header of the source, empty when it is not one of ours.
        verdict: what its verification found; one that was built for an absent device is `unverified`.
    """

    KIND: ClassVar[str] = "engine"
    FORMAT: ClassVar[int] = 1

    backend: str
    sha256: str
    source: str
    source_sha256: str
    made_with: Mapping[str, str]
    recipe: Mapping[str, Any]
    facts: Mapping[str, str]
    input: TensorSpec
    outputs: tuple[str, ...]
    batches: tuple[Batch, ...]
    precision: Precision
    metadata: Mapping[str, str]
    verdict: Verdict

    @property
    def header(self) -> Metadata | None:
        """Return the metadata of the source with the verdict of the engine; None when it is not one of ours."""
        said = Metadata.from_strings(self.metadata)
        return said and dataclasses.replace(said, verdict=self.verdict)


def content(sidecar: Sidecar) -> str:
    """Return the SHA-256 of what the verdict of an engine speaks of: the engine, and all else in its sidecar."""
    said = records.to_json(dataclasses.replace(sidecar, verdict=UNJUDGED))
    return hashlib.sha256(said.encode()).hexdigest()


def place(engine: Path) -> Path:
    """Return where the sidecar of an engine lies."""
    return engine.with_name(f"{engine.name}.json")


def write(engine: Path, sidecar: Sidecar) -> None:
    """Write the sidecar of an engine."""
    files.write_text(place(engine), records.to_json(sidecar))


def read(engine: Path) -> Sidecar:
    """Return the sidecar of exactly this engine.

    Raises:
        ReplkError: there is no such engine.
        IntegrityError: no sidecar, a damaged one, or one of another file.
    """
    again = "build it again: replk build --backend B"
    if not engine.is_file():
        raise ReplkError(f"{engine} is not a file", again)
    if not place(engine).is_file():
        raise IntegrityError(f"{engine} has no sidecar {place(engine).name}, so nothing says what it is", again)
    record = records.read(place(engine), Sidecar.KIND, Sidecar.FORMAT)
    again = f"build it again: replk build {record.get('source', 'FILE')} --backend {record.get('backend', 'B')}"
    try:
        found = _sidecar(record)
        header = found.header
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise IntegrityError(f"{place(engine)} is damaged: {exc}", again) from exc
    if files.sha256(engine) != found.sha256:
        raise IntegrityError(f"{engine} is not the engine that its sidecar describes: its hash differs", again)
    if found.verdict.state not in get_args(State) or found.precision not in TOLERANCES:
        raise IntegrityError(
            f"{place(engine)} says {found.verdict.state} and {found.precision}, which nothing is", again
        )
    if header and header.precision != found.precision:
        raise IntegrityError(f"{place(engine)} says {found.precision} and {header.precision}", again)
    if found.verdict.state == "pass" and found.verdict.content != content(found):
        raise IntegrityError(f"{place(engine)} is not the sidecar that its verdict speaks of", again)
    return found


def demand(engine: Path, sidecar: Sidecar, backend: str, here: Mapping[str, str]) -> None:
    """Refuse an engine of another backend, or one made with something that is not here.

    Raises:
        IntegrityError: names what differs, and the command that builds it for this machine.
    """
    again = f"build it here: replk build {sidecar.source} --backend {backend}"
    if sidecar.backend != backend:
        raise IntegrityError(f"{engine} was built for {sidecar.backend}", f"open it with --backend {sidecar.backend}")
    unlike = [f"{k} {v}, here {here.get(k, 'none')}" for k, v in sidecar.made_with.items() if here.get(k) != v]
    if unlike:
        raise IntegrityError(f"{engine} was built with {'; '.join(unlike)}", again)


def _sidecar(record: dict[str, Any]) -> Sidecar:
    fields = {k: v for k, v in record.items() if k != "schema"}
    spec = fields["input"]
    return Sidecar(
        **{
            **fields,
            "input": TensorSpec(**{**spec, "shape": tuple(spec["shape"])}),
            "outputs": tuple(fields["outputs"]),
            "batches": tuple(Batch(**b) for b in fields["batches"]),
            "verdict": Verdict(**fields["verdict"]),
        }
    )
