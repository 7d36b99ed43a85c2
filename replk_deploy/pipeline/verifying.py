"""`replk verify`: one file judged by another."""

from pathlib import Path

from replk_deploy import backends as runtimes
from replk_deploy import proof as proving
from replk_deploy import publish, sources
from replk_deploy.backends import sidecar
from replk_deploy.container import Source
from replk_deploy.errors import ReplkError
from replk_deploy.progress import Progress, silent
from replk_deploy.proof import Oracle, Proof

ENGINES = {".plan", ".pt2"}


def verify(
    reference: Path | str,
    candidate: Path | str,
    *,
    source: Source = "model",
    head: str | None = None,
    size: sources.Size | None = None,
    progress: Progress = silent,
) -> Proof:
    """Judge one file by another: checkpoints, fused weights, ONNX files and engines in any pair with one float64 side.

    Raises:
        InconclusiveError: the reference answers all images nearly alike, so that a wrong file might pass.
        ReplkError: a file cannot be taken, or both are engines.
        IntegrityError: an engine is not what its sidecar says, or was built for something else.
    """
    reference, candidate = Path(reference), Path(candidate)
    if _rank(reference) > _rank(candidate):
        reference, candidate = candidate, reference  # the question is symmetric, and only weights have a float64 answer
    if size and _rank(candidate):
        raise ReplkError(f"{candidate} has its own size", "leave out --size")
    if _rank(reference) > 1:
        raise ReplkError(
            "two engines have no reference between them", "name a checkpoint, fused weights or an ONNX file"
        )
    if _rank(candidate) > 1:
        return publish.seen("verify", lambda: _engine(reference, candidate, source, head, progress))
    if _rank(reference):
        return publish.seen("verify", lambda: proving.prove_graphs(reference, candidate, progress=progress))
    loaded = sources.load_either(reference, source, head)
    oracle, doubt = Oracle(loaded.model, loaded.sha256), sources.doubt(loaded)
    if _rank(candidate):
        rules = loaded.preprocessing
        return publish.seen(
            "verify", lambda: proving.prove_file(oracle, candidate, preprocessing=rules, doubt=doubt, progress=progress)
        )
    other = sources.load_either(candidate, source, head)
    if sources.rounding(loaded) > sources.rounding(other):
        loaded, other, oracle = other, loaded, Oracle(other.model, other.sha256)  # rounded weights judge nobody
        doubt = sources.doubt(loaded)
    rules, shown = loaded.preprocessing, size or loaded.preprocessing.size
    return publish.seen(
        "verify",
        lambda: proving.prove_pair(oracle, other, size=shown, preprocessing=rules, doubt=doubt, progress=progress),
    )


def _rank(path: Path) -> int:
    """Tell weights (0) from ONNX files (1) and engines (2)."""
    return 1 if path.suffix == ".onnx" else 2 * (path.suffix in ENGINES or sidecar.place(path).is_file())


def _engine(reference: Path, engine: Path, source: Source, head: str | None, progress: Progress) -> Proof:
    said = sidecar.read(engine)
    with runtimes.find(said.backend)(engine) as backend:
        if _rank(reference):
            return proving.prove_by_graph(reference, backend, said.header, edge="verify")
        loaded = sources.load_either(reference, source, head)
        progress("verify", 0, 1)
        oracle, rules = Oracle(loaded.model, loaded.sha256), loaded.preprocessing
        doubt = sources.doubt(loaded)
        return proving.prove_backend("verify", oracle, backend, said.header, preprocessing=rules, doubt=doubt)
