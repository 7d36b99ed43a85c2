"""What to do next in a folder: from the checkpoints and the run that lie there."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from replk_deploy import records

RUNS = Path("replk-out")
CHECKPOINTS = (".pth", ".pt", ".pkl", ".safetensors")
FUSED, BENCH, REPORT, REJECTED = "fused.safetensors", "results/bench.json", "report.html", "rejected"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Where a folder stands, and commands that lead on, the next one first, each with what it gives."""

    stands: str
    commands: tuple[tuple[str, str], ...]


def advise(folder: Path) -> Advice:
    """Say what a folder lacks on the way from a checkpoint to a measured deployment and its report.

    Raises:
        IntegrityError: the manifest of the run is damaged.
    """
    checkpoint, run = _checkpoint(folder), _run(folder)
    if run is None:
        return _begin(checkpoint)
    names = list(records.read(run / "manifest.json", "manifest", 1)["artefacts"])
    onnx = [name for name in names if name.endswith(".onnx") and "/" not in name]
    weights = [name for name in names if name.startswith("model.") and name.endswith(".safetensors")]
    engines = sorted({name.partition("/")[0] for name in names if "/" in name} - {"lowered"})
    rejected = any((run / REJECTED).glob("*"))
    timed, written = _written(run / BENCH), _written(run / REPORT)
    reported = written >= timed > 0

    stands = ["fused" if FUSED in names else "not fused"]
    lead: list[tuple[str, str]] = []
    if FUSED not in names:
        lead = [(f"replk fuse {checkpoint or 'CKPT'}", "single large kernels, proved")]
    elif not onnx and not weights:
        stands += ["not exported"]
        lead = [
            ("replk export --onnx", "a proved ONNX file"),
            ("replk export --precision fp16", "weights for native and PyTorch"),
        ]
    else:
        found = ((len(onnx), "as ONNX"), (len(weights), "as weights"))
        stands += [f"exported ({', '.join(f'{count} {kind}' for count, kind in found if count)})"]
    stands += [f"built ({', '.join(engines)})"] if engines else []
    if timed:
        stands += ["timed"]
        lead += [
            (f"replk profile --backend {'ort-cpu' if onnx else 'torch'}", "time of each layer"),
            (f"replk compare BEFORE.json {(RUNS / run.name / BENCH).as_posix()}", "against an earlier record"),
        ]
    elif not lead:
        stands += ["not timed"]
        runtime = engines[0] if engines else "ort-cpu" if onnx else "torch"
        lead = [
            (f"replk bench --backend {runtime}", "latencies with intervals"),
            (f"replk build --backend {'trt-rtx' if onnx else 'native'}", "an engine"),
            ("replk doctor", "which runtimes are here"),
        ]
    stands += ["something rejected"] if rejected else ["reported"] if reported else []
    if timed or rejected:
        page = ("replk report", "what is wrong, and where" if rejected else "all of it on one page")
        lead.insert(len(lead) if reported and not rejected else 0, page)
    return Advice(stands=f"run {run.name}: {', '.join(stands)}", commands=tuple(lead))


def _written(file: Path) -> float:
    """Return when a file was written, 0 where there is none."""
    return file.stat().st_mtime if file.is_file() else 0.0


def _run(folder: Path) -> Path | None:
    """Return the run that commands without a path go on with, else the newest."""
    pointer = folder / RUNS / "latest"
    if pointer.is_file():
        named = folder / RUNS / pointer.read_text(encoding="utf-8", errors="replace").strip()
        if (named / "manifest.json").is_file():
            return named
    manifests = (folder / RUNS).glob("*/manifest.json")
    newest = max(manifests, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent if newest else None


def _checkpoint(folder: Path) -> str | None:
    """Return the name of the newest checkpoint, as a shell takes it."""
    found = [path for path in folder.iterdir() if path.suffix in CHECKPOINTS and path.is_file()]
    return shlex.quote(max(found, key=lambda path: path.stat().st_mtime).name) if found else None


def _begin(checkpoint: str | None) -> Advice:
    if checkpoint is None:
        return Advice(
            stands="no checkpoint and no run here",
            commands=(
                ("replk deploy CKPT --data VAL", "the whole chain"),
                ("replk inspect CKPT", "what a checkpoint is"),
                ("replk demo", "the whole chain on a network that comes with replk"),
            ),
        )
    return Advice(
        stands=f"{checkpoint}, and no run yet",
        commands=(
            (f"replk fuse {checkpoint}", "single large kernels, proved"),
            (f"replk deploy {checkpoint} --data VAL", "the whole chain"),
            (f"replk inspect {checkpoint}", "what it is"),
        ),
    )
