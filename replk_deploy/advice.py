"""What to do next in a folder: from the checkpoints and the run that lie there."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from replk_deploy import records

RUNS = Path("replk-out")
CHECKPOINTS = (".pth", ".pt", ".pkl", ".safetensors")
BENCH = "results/bench.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Where a folder stands, and commands that lead on, the next one first, each with what it gives."""

    stands: str
    commands: tuple[tuple[str, str], ...]


def advise(folder: Path) -> Advice:
    """Say what a folder lacks on the way from a checkpoint to a measured deployment.

    Raises:
        IntegrityError: the manifest of the newest run is damaged.
    """
    manifests = sorted((folder / RUNS).glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        return _begin(folder)
    run = manifests[-1].parent
    exports = [name for name in records.read(manifests[-1], "manifest", 1)["artefacts"] if name.endswith(".onnx")]
    fused = f"run {run.name}: fused"
    if not exports:
        return Advice(
            stands=f"{fused}, not exported",
            commands=(
                ("replk export --onnx", "a proved ONNX file"),
                ("replk export --precision fp16", "weights for native and PyTorch"),
            ),
        )
    exported = f"{fused}, exported ({len(exports)} ONNX)"
    if not (run / BENCH).is_file():
        return Advice(
            stands=f"{exported}, not timed",
            commands=(
                ("replk doctor", "which runtimes are here"),
                ("replk bench --backend ort-cpu", "latencies with intervals"),
                ("replk build --backend trt-rtx", "an engine"),
            ),
        )
    return Advice(
        stands=f"{exported}, timed",
        commands=(
            ("replk profile --backend ort-cpu", "time of each layer"),
            (f"replk compare BEFORE.json {(RUNS / run.name / BENCH).as_posix()}", "against an earlier record"),
        ),
    )


def _begin(folder: Path) -> Advice:
    found = [path for path in folder.iterdir() if path.suffix in CHECKPOINTS and path.is_file()]
    if not found:
        return Advice(
            stands="no checkpoint and no run here",
            commands=(
                ("replk deploy CKPT --data VAL", "the whole chain"),
                ("replk inspect CKPT", "what a checkpoint is"),
            ),
        )
    name = max(found, key=lambda path: path.stat().st_mtime).name
    quoted = shlex.quote(name)
    return Advice(
        stands=f"{name}, and no run yet",
        commands=(
            (f"replk fuse {quoted}", "single large kernels, proved"),
            (f"replk deploy {quoted} --data VAL", "the whole chain"),
            (f"replk inspect {quoted}", "what it is"),
        ),
    )
