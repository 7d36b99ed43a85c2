"""A source file and a recipe → the file that one runtime opens, and what its sidecar will say."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from replk_deploy import files, graph, records, weights
from replk_deploy.backends.base import Engine, Made, Recipe
from replk_deploy.backends.sidecar import UNJUDGED, Sidecar
from replk_deploy.errors import ReplkError, UnavailableError
from replk_deploy.metadata import Metadata
from replk_deploy.precision import TOLERANCES, Precision
from replk_deploy.progress import Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """An engine that was built, and not judged yet.

    Attributes:
        sidecar: what it is; its verdict is `unverified`.
        seconds: that the build took.
        absent: what this machine lacks to open it, empty when it can.
    """

    KIND: ClassVar[str] = "build"
    FORMAT: ClassVar[int] = 1

    sidecar: Sidecar
    seconds: float
    absent: str


def build(
    source: Path,
    out: Path,
    kind: type[Engine],
    *,
    recipe: Recipe,
    refit: Path | None = None,
    progress: Progress = silent,
) -> Build:
    """Write an engine at `out`; the caller writes the sidecar once it has a verdict.

    Args:
        source: of the kind that the backend takes.
        out: where the engine goes.
        kind: the backend.
        recipe: how to build; choices that the backend does not honour are refused.
        refit: an engine whose weights are replaced by those of `source`, instead of building anew.
        progress: told by the runtime.

    Raises:
        ReplkError: the backend does not honour a choice, or cannot take the source.
        UnavailableError: the runtime is missing, or unable to build it.
    """
    vain = sorted(recipe.made() - kind.ingredients)
    if vain:
        raise ReplkError(
            f"{kind.name} knows no {', '.join(vain)}", f"leave out --{', --'.join(v.replace('_', '-') for v in vain)}"
        )
    metadata = header(source)
    start = time.perf_counter()
    made = kind.refit(refit, source, out, progress) if refit else kind.build(source, out, recipe, progress)
    seconds = time.perf_counter() - start
    sidecar = Sidecar(
        backend=kind.name,
        sha256=files.sha256(out),
        source=source.name,
        source_sha256=files.sha256(source),
        made_with=made.made_with,
        recipe=records.plain(recipe),
        facts={**made.facts, "build_s": f"{seconds:.1f}"},
        input=made.input,
        outputs=made.outputs,
        batches=made.batches,
        precision=metadata.precision if metadata else _precision(source, made),
        metadata=dataclasses.replace(metadata, verdict=None).to_strings() if metadata else {},
        verdict=UNJUDGED,
    )
    return Build(sidecar=sidecar, seconds=seconds, absent=made.absent or _missing(kind))


def header(source: Path) -> Metadata | None:
    """Return the metadata of a source file; None when it is not one of ours."""
    return graph.header(source) if source.suffix == ".onnx" else weights.header(source)


def _missing(kind: type[Engine]) -> str:
    try:
        kind.probe()
    except UnavailableError as exc:
        return exc.problem
    return ""


def _precision(source: Path, made: Made) -> Precision:
    for precision, row in TOLERANCES.items():
        if str(row.torch_dtype) == f"torch.{made.input.dtype}":
            return precision
    raise ReplkError(f"{source} takes {made.input.dtype} and does not say its precision", "export it with replk")
