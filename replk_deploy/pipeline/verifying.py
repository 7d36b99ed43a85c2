"""`replk verify`: one file judged by another."""

from pathlib import Path

from replk_deploy import proof as proving
from replk_deploy import publish, sources
from replk_deploy.container import Source
from replk_deploy.errors import ReplkError
from replk_deploy.progress import Progress, silent
from replk_deploy.proof import Oracle, Proof


def verify(
    reference: Path,
    candidate: Path,
    *,
    source: Source = "model",
    head: str | None = None,
    size: sources.Size | None = None,
    progress: Progress = silent,
) -> Proof:
    """Judge one file by another: checkpoints, fused weights and ONNX files in any pair."""
    if reference.suffix == ".onnx" and candidate.suffix != ".onnx":
        reference, candidate = candidate, reference  # the question is symmetric, and only weights have a float64 answer
    if size and candidate.suffix == ".onnx":
        raise ReplkError(f"{candidate} has its own size", "leave out --size")
    if reference.suffix == ".onnx":
        return publish.proved("verify", lambda: proving.prove_graphs(reference, candidate, progress=progress))
    loaded = sources.load_either(reference, source, head)
    oracle, doubt = Oracle(loaded.model, loaded.sha256), sources.doubt(loaded)
    if candidate.suffix == ".onnx":
        return publish.proved("verify", lambda: proving.prove_file(oracle, candidate, doubt=doubt, progress=progress))
    other = sources.load_either(candidate, source, head)
    if sources.rounding(loaded) > sources.rounding(other):
        loaded, other, oracle = other, loaded, Oracle(other.model, other.sha256)  # rounded weights judge nobody
        doubt = sources.doubt(loaded)
    shown = size or loaded.preprocessing.size
    return publish.proved(
        "verify", lambda: proving.prove_pair(oracle, other, size=shown, doubt=doubt, progress=progress)
    )
