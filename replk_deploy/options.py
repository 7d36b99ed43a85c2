"""The options that commands share: their types, their help, and what their text means."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from replk_deploy import files
from replk_deploy.errors import ReplkError
from replk_deploy.forms import FORMS
from replk_deploy.forms import Form as Asked
from replk_deploy.precision import PRECISIONS
from replk_deploy.precision import Precision as Named

SAID = "replk.said"  # under this key a context holds the words after the command
WRITES = {  # kinds of records that `--json` of a command may replace: its own
    "inspect": ("inspection",),
    "fuse": ("fused",),
    "export": ("exported", "lowered-file"),
    "lower": ("lowered-file", "calibration"),
    "verify": ("proof", "agreement"),
    "build": ("built",),
    "bench": ("bench",),
    "compare": ("comparison",),
    "profile": ("profile",),
    "doctor": ("doctor",),
    "erf": ("erf",),
    "report": ("report",),
    "deploy": ("deployment",),
    "demo": ("deployment",),
    "selftest": ("selftest",),
}
SUFFIXES = {"--html": ".html", "--markdown": ".md", "--junit": ".xml", "--json": ".json"}


def place(context: typer.Context, option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Take the name of a file to write; one that cannot be written or is needed is refused before the work begins."""
    name = max(option.opts, key=len)
    if path is None or (name == "--json" and str(path) == "-"):
        return path
    if not path.name.endswith(suffix := SUFFIXES.get(name, "")):
        other = ", or - for stdout" if name == "--json" else ""
        raise ReplkError(f"{name} {path} does not end in {suffix}", f"name a {suffix} file{other}")
    files.demand(path)
    said = [Path(text.partition("=")[2] if text.startswith("-") else text) for text in context.meta.get(SAID, ())]
    source = context.get_parameter_source(option.name or "")
    typed = source is not None and source.name == "COMMANDLINE"
    if sum(other.resolve() == path.resolve() for other in said) > typed:
        raise ReplkError(f"{path} is named twice, and {name} would write over it", f"name another file with {name}")
    if name in SUFFIXES:
        _spare(context.info_name or "", name, path)
    return path


def _spare(command: str, name: str, path: Path) -> None:
    """Refuse a file that a run vouches for, and a record of another kind."""
    from replk_deploy.workspace import Workspace  # noqa: PLC0415  # torch waits

    remedy = f"name another file with {name}"
    for folder in path.resolve().parents[:2]:
        entry = path.resolve().relative_to(folder).as_posix()
        result = entry.removeprefix("results/").removesuffix(".json") if entry.startswith("results/") else entry
        if (folder / "manifest.json").is_file() and (
            entry == "manifest.json" or Workspace.open(folder).entry(result) is not None
        ):
            raise ReplkError(f"{path} belongs to the run {folder.name}", remedy)
    if path.suffix != ".json" or not path.is_file():
        return
    try:
        kind = str(json.loads(path.read_bytes())["schema"]).removeprefix("replk.").rpartition("/")[0]
    except (OSError, ValueError, TypeError, KeyError):
        return
    if kind and kind not in WRITES[command]:
        raise ReplkError(f"{path} holds a record of another kind, replk.{kind}", remedy)


Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint: .pth, .pt, .pkl or .safetensors.")]
Artefact = Annotated[Path | None, typer.Argument(help="A run folder or one file; by default the latest run.")]
Weights = Annotated[str, typer.Option("--weights", metavar="model|ema", help="Which weights of a training checkpoint.")]
Head = Annotated[str | None, typer.Option(help="Which of several classifier heads to keep.")]
Size = Annotated[str | None, typer.Option(metavar="N|HxW", help="Input size; by default what the checkpoint says.")]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", callback=place, help="Write here instead of into the run folder."),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the proof; the file is marked unverified.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", callback=place, help="Write the result as .json; - for stdout."),
]
Junit = Annotated[
    Path | None,
    typer.Option("--junit", metavar="FILE", callback=place, help="Write the verdict as JUnit's XML, too."),
]
Github = Annotated[
    bool, typer.Option("--github", help="Annotate a run of GitHub Actions, and add to the summary of the step.")
]
Batch = Annotated[str, typer.Option(metavar="N|MIN:MAX|MIN:OPT:MAX", help="Images at a time.")]
Precision = Annotated[
    str, typer.Option("--precision", metavar="|".join(PRECISIONS), help="Type of weights and results.")
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where PyTorch runs; auto is the GPU where there is one.")
]
Layout = Annotated[
    Literal["auto", "nchw", "nhwc"], typer.Option(help="Memory layout of activations; auto is the backend's choice.")
]
ConvSearch = Annotated[
    Literal["exhaustive", "heuristic", "default"],
    typer.Option(help="How ONNX Runtime's CUDA provider picks convolution algorithms."),
]
AllowUnverified = Annotated[
    bool, typer.Option("--allow-unverified", help="Take a file that no verdict vouches for; the result says so.")
]

Form = Annotated[
    Asked,
    typer.Option("--lower", help="Form of large convolutions; auto decides for backend and batch."),
]


def share_of(text: str | None) -> float | None:
    """Read a share: 3% or 0.03; a whole and more needs the sign, because 3 is rarely meant as 300%."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    if not found:
        raise ReplkError(f"{text} is no share", "write it as 3% or 0.03")
    if not found[2] and float(found[1]) >= 1:
        raise ReplkError(f"{text} is {float(found[1]):.0%} as a share", f"did you mean {found[1]}%?")
    return float(found[1]) / (100 if found[2] else 1)


def source_of(text: str) -> Any:
    """Read --weights."""
    if text not in {"model", "ema"}:
        raise ReplkError(f"--weights {text} is not known", "choose model or ema")
    return text


def precision_of(text: str) -> Named:
    """Read --precision."""
    if text not in PRECISIONS:
        raise ReplkError(f"--precision {text} is not known", f"choose from {', '.join(PRECISIONS)}")
    return text


def form_of(text: str) -> Any:
    """Read --lower."""
    if text not in FORMS:
        raise ReplkError(f"--lower {text} is not known", f"choose from {', '.join(FORMS)}")
    return text


def size_of(text: str | None) -> tuple[int, int] | None:
    """Read --size: height and width."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not found or not int(found[1]) or not int(found[2] or 1):
        raise ReplkError(f"--size {text} is not a size", "write N or HxW, for example 224 or 512x2048")
    return int(found[1]), int(found[2] or found[1])
