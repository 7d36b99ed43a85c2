"""From a temporary file to its name: written, read back, proved, and only then called what it is."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from replk_deploy import files, weights
from replk_deploy.errors import MismatchError
from replk_deploy.metadata import Metadata, Verdict
from replk_deploy.models.base import Network
from replk_deploy.proof import Proof, demand_signal
from replk_deploy.workspace import Workspace


def store(part: Path, suffix: str, model: Network, metadata: Metadata) -> None:
    """Write weights as safetensors, or as a bare `.pth` state dict for the reference code."""
    if suffix == ".pth":
        torch.save(model.state_dict(), part)
    else:
        weights.write(part, model, metadata)


def restore(part: Path, suffix: str, like: Network) -> Network:
    """Read back what was just written: what is proved is what lies on the disk."""
    if suffix != ".pth":
        return weights.read(part)[0]
    stored = type(like).empty(like.geometry, like.form)
    stored.load_state_dict(torch.load(part, weights_only=True), assign=True)
    return stored


def proved(edge: str, prove: Callable[[], Proof]) -> Proof:
    """Run a proof; a mismatch that ended it early becomes a rejection with its reason."""
    try:
        return prove()
    except MismatchError as exc:
        return Proof(edge=edge, agreements=(), modules={}, structure=(f"{exc.problem}: {exc.remedy}",), bisection=None)


def seen(edge: str, prove: Callable[[], Proof]) -> Proof:
    """Run a proof that rests on its answers alone, and let nothing pass by a comparison that could not have failed.

    Raises:
        InconclusiveError: the reference answers all images nearly alike.
    """
    proof = proved(edge, prove)
    if proof.state != "rejected":
        for agreement in proof.agreements:
            demand_signal(agreement)
    return proof


def judged(proof: Proof | None, content: str, reference: str) -> Verdict:
    """Turn a proof, or its absence, into the verdict that a file carries."""
    if proof is None:
        return Verdict(state="unverified", content=content, reference=reference, worst=None, why="not verified")
    worst = proof.worst if math.isfinite(proof.worst) else None
    return Verdict(state=proof.state, content=content, reference=reference, worst=worst, why=proof.sentence)


def place(part: Path, final: Path, verdict: Verdict, run: Workspace | None) -> Path:
    """Give a file its name when its verdict allows that, and a rejected one another name."""
    if verdict.state == "rejected":
        apart = final.with_name(f"{final.stem}.rejected{final.suffix}")
        final = run.path(f"rejected/{final.name}") if run and final.is_relative_to(run.folder) else apart
    files.commit(part, final)
    return final
