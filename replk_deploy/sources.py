"""Which file a command means, and whether anything vouches for it."""

import re
from collections.abc import Sequence
from pathlib import Path

from replk_deploy import backends as runtimes
from replk_deploy import checkpoint, graph, weights
from replk_deploy.backends import sidecar
from replk_deploy.backends.base import Backend, Engine
from replk_deploy.checkpoint import Loaded
from replk_deploy.container import Source
from replk_deploy.errors import IntegrityError, ReplkError, UnavailableError
from replk_deploy.metadata import Metadata
from replk_deploy.models.base import Network
from replk_deploy.precision import TOLERANCES
from replk_deploy.proof import Oracle
from replk_deploy.workspace import Workspace

Size = tuple[int, int]  # height, width
FUSED = "fused.safetensors"


def run_name(loaded: Loaded) -> str:
    """Name the run of a checkpoint: label, first digits of its hash, and choice, in [a-z0-9_-] whatever they hold."""
    origin = loaded.metadata.source_sha256 if loaded.metadata else loaded.sha256
    return "-".join(re.findall(r"[a-z0-9_]+", f"{loaded.label}-{origin[:8]}-{loaded.selected}".lower()))


def load_either(path: Path, source: Source, head: str | None) -> Loaded:
    """Open a training checkpoint at `source`, or a file of ours, which holds one set of weights."""
    ours = path.suffix == ".safetensors" and path.is_file() and path.stat().st_size and weights.header(path)
    return checkpoint.load(path) if ours else checkpoint.load(path, source=source, head=head)


def rounding(loaded: Loaded) -> float:
    """Return the error that the precision of an open file usually costs."""
    return TOLERANCES[loaded.metadata.precision if loaded.metadata else "fp32"].typical


def doubt(loaded: Loaded) -> str:
    """Say why an open file is a doubtful reference; empty when it is not."""
    verdict = loaded.metadata.verdict if loaded.metadata else None
    if loaded.metadata and (verdict is None or verdict.state != "pass"):
        return f"the reference {loaded.file} has no passing verdict itself"
    if loaded.metadata and loaded.metadata.precision != "fp32":
        return f"the reference {loaded.file} holds weights rounded to {loaded.metadata.precision}"
    return ""


def run_or_file(artefact: Path | None, root: Path) -> tuple[Workspace | None, Path | None]:
    """Return the run that is meant, or the file: without a path, the latest run.

    Raises:
        ReplkError: there is no such run or file.
    """
    if artefact is None:
        return Workspace.latest(root), None
    if artefact.is_dir():
        return Workspace.open(artefact), None
    if not artefact.is_file():
        raise ReplkError(f"{artefact} does not exist", "name a run folder, a .onnx or a fused .safetensors file")
    return None, artefact


def opens(kind: type[Backend]) -> str:
    """Return the ending of the file that a backend opens."""
    return kind.suffix if issubclass(kind, Engine) else starts_from(kind)


def starts_from(kind: type[Backend]) -> str:
    """Return the ending of the file of a run that a backend starts from."""
    return ".onnx" if kind.takes == "onnx" else ".safetensors"


def check_kind(path: Path, kind: type[Backend], ending: str) -> None:
    """Raise ReplkError when a backend wants a file of another ending."""
    if path.suffix == ending:
        return
    file, how = {
        ".onnx": ("model.<precision>.onnx", "replk export --onnx"),
        ".safetensors": (FUSED, "replk fuse CHECKPOINT"),
    }.get(ending, (f"its own *{ending} file", f"replk build {path} --backend {kind.name}"))
    raise ReplkError(f"{kind.name} starts from {file}, not from {path.name}", f"make it with: {how}")


def header(path: Path) -> Metadata | None:
    """Return what a file says of itself, an engine by its sidecar; None when it is not one of ours.

    Raises:
        IntegrityError: an engine without the sidecar that describes it.
    """
    if path.suffix == ".onnx":
        return graph.header(path)
    return weights.header(path) if path.suffix == ".safetensors" else sidecar.read(path).header


def vouched(path: Path, *, allow_unverified: bool) -> Metadata | None:
    """Return a file's metadata if a passing verdict speaks of exactly this content.

    That of weights is compared with their content when they are opened.

    Raises:
        IntegrityError: no passing verdict, or one that speaks of another content.
    """
    metadata = header(path)
    if allow_unverified:
        return metadata
    verdict = metadata.verdict if metadata else None
    if verdict is None or verdict.state != "pass":
        state = f"is {verdict.state}" if verdict else "has no verdict"
        ours = "make it again without --no-verify, or" if metadata else "judge it with replk verify, and"
        raise IntegrityError(f"{path} {state}", f"{ours} time it all the same with --allow-unverified")
    if path.suffix == ".onnx" and graph.content_hash(path) != verdict.content:
        raise IntegrityError(
            f"{path} is not the file that its verdict speaks of", "export it again: replk export --onnx"
        )
    return metadata


def sound(path: Path) -> bool:
    """Tell whether a passing verdict speaks of exactly a file's content."""
    try:
        vouched(path, allow_unverified=False)
    except IntegrityError:
        return False
    return True


def open_fused(path: Path, *, prove: bool) -> tuple[Network, Metadata]:
    """Open fused float32 weights of ours; to prove anything by them, a passing verdict must speak of them.

    Raises:
        ReplkError: they hold another precision.
        IntegrityError: altered since their verdict, or `prove` without a passing one.
    """
    model, metadata = weights.read(path)
    if metadata.precision != "fp32":
        raise ReplkError(f"{path} holds {metadata.precision} weights", "export from the fp32 weights that fuse wrote")
    verdict = metadata.verdict
    if prove and (verdict is None or verdict.state != "pass"):
        raise IntegrityError(
            f"{path} has no passing verdict, so nothing can be proved by it",
            "fuse the checkpoint again without --no-verify, or export with --no-verify",
        )
    return model, metadata


def fused_of(run: Workspace) -> Path:
    """Return the fused weights of a run.

    Raises:
        ReplkError: it has none.
        IntegrityError: they are missing, altered or rejected.
    """
    if run.entry(FUSED) is None and run.path(f"rejected/{FUSED}").is_file():
        raise IntegrityError(f"{FUSED} is missing from {run.name}: it was rejected", f"see {run.path('rejected')}")
    if run.entry(FUSED) is None:
        raise ReplkError(f"the run {run.name} has no {FUSED}", "fuse to the end: replk fuse CHECKPOINT --level full")
    return run.take(FUSED)


def oracle_of(run: Workspace | None, single: Path | None) -> Oracle | None:
    """Return the float64 network that a run or file stands for, where one is at hand."""
    if run is not None:
        model, metadata = weights.read(fused_of(run))
    elif single is not None and single.suffix == ".safetensors":
        model, metadata = weights.read(single)
    else:
        return None
    return Oracle(model, metadata.source_sha256)


def present(backends: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the backends that can run here, and why the others are left out; those asked for by name must.

    Engines take minutes to build, so they are made only when asked for.

    Raises:
        UnavailableError: one that was asked for by name cannot run.
    """
    if backends:
        for name in backends:
            runtimes.find(name).probe()
        return list(backends), {}
    found, skipped = [], {}
    for name in runtimes.BACKENDS:
        try:
            kind = runtimes.find(name)
            kind.probe()
            if issubclass(kind, Engine):
                skipped[name] = f"needs an engine built first: --backend {name}"
            else:
                found.append(name)
        except UnavailableError as exc:
            skipped[name] = str(exc)
    return found, skipped
