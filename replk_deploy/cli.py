"""The command line: parse, call one function of `pipeline`, render, exit."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from replk_deploy import __version__, render
from replk_deploy.batch import DYNAMIC
from replk_deploy.batch import Batch as Range
from replk_deploy.errors import Exit, ReplkError
from replk_deploy.precision import PRECISIONS, Precision


class ErrorsAtTheEdge(typer.core.TyperGroup):
    """Turn our errors into a message and an exit code, in one place."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except ReplkError as exc:
            render.error(exc)
            word = {Exit.MISMATCH: "rejected", Exit.INCONCLUSIVE: "inconclusive"}.get(exc.code, "error")
            render.verdict(word, f"{ctx.invoked_subcommand}: {exc.problem.splitlines()[0]}", render.err)
            raise typer.Exit(exc.code) from exc
        except KeyboardInterrupt:
            render.note("interrupted; temporary files are removed")
            raise typer.Exit(Exit.INTERRUPTED) from None
        except (MemoryError, RuntimeError) as exc:
            if isinstance(exc, RuntimeError) and "can't allocate memory" not in str(exc):
                raise  # ours, with its traceback
            render.error(
                ReplkError("memory ran out", "take a smaller --size or --batch, or a machine with more memory")
            )
            render.verdict("error", f"{ctx.invoked_subcommand}: memory ran out", render.err)
            raise typer.Exit(Exit.UNAVAILABLE) from exc


app = typer.Typer(
    cls=ErrorsAtTheEdge,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a RepLKNet training checkpoint to a proved ONNX model and a latency table.",
)

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint: .pth, .pt, .pkl or .safetensors.")]
Artefact = Annotated[Path | None, typer.Argument(help="A run folder or one file; by default the latest run.")]
Weights = Annotated[str, typer.Option("--weights", metavar="model|ema", help="Which weights of a training checkpoint.")]
Head = Annotated[str | None, typer.Option(help="Which of several classifier heads to keep.")]
Size = Annotated[str | None, typer.Option(metavar="N|HxW", help="Input size; by default what the checkpoint says.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Write here instead of into the run folder.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the proof; the file is marked unverified.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for stdout.")]
Batch = Annotated[str, typer.Option(metavar="N|MIN:MAX|MIN:OPT:MAX", help="Images at a time.")]
Precisions = Annotated[
    str, typer.Option("--precision", metavar="|".join(PRECISIONS), help="Type of weights and results.")
]


@app.callback(invoke_without_command=True)
def version(*, show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """From a RepLKNet training checkpoint to a proved ONNX model and a latency table."""
    if show:
        render.out.print(f"replk {__version__}")
        raise typer.Exit(Exit.OK)


@app.command()
def inspect(
    checkpoint: Checkpoint, *, weights: Weights = "model", head: Head = None, size: Size = None, as_json: Json = None
) -> None:
    """Say what a checkpoint is: network, form, costs, health."""
    from replk_deploy import pipeline

    seen = pipeline.inspect(checkpoint, source=_source(weights), head=head, size=_size(size))
    last = f"inspect {seen.checkpoint.label}: every tensor has its place"
    render.show(seen, lambda: render.inspection(seen), last, "pass", as_json=as_json)


@app.command()
def fuse(
    checkpoint: Checkpoint,
    *,
    output: Output = None,
    level: Annotated[str, typer.Option(metavar="full|merge", help="full leaves no BatchNorm.")] = "full",
    weights: Weights = "model",
    head: Head = None,
    size: Size = None,
    no_verify: NoVerify = False,
    as_json: Json = None,
) -> None:
    """Fold BatchNorms and branches into single large kernels, and prove it."""
    from replk_deploy import pipeline

    if level not in {"full", "merge"}:
        raise ReplkError(f"--level {level} is not known", "choose full or merge")
    with render.bars() as progress:
        made = pipeline.fuse(
            checkpoint,
            output=output,
            level="full" if level == "full" else "merge",
            source=_source(weights),
            head=head,
            size=_size(size),
            prove=not no_verify,
            progress=progress,
        )

    def words() -> None:
        if not made.fusion.changed:
            render.out.print("already fused: nothing to merge or fold")
        else:
            counts = f"{len(made.fusion.merged)} blocks merged, {len(made.fusion.folded)} BatchNorms folded"
            render.out.print(f"{counts}, {len(made.fusion.left)} left")
        if made.proof:
            render.proof(made.proof)

    _finish(made, words, f"fuse {made.metadata.label} fp32", as_json)


@app.command()
def export(
    artefact: Artefact = None,
    *,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX; without it, cast weights as safetensors.")] = False,
    output: Output = None,
    weights: Weights = "model",
    head: Head = None,
    precision: Precisions = "fp32",
    size: Size = None,
    batch: Batch = str(DYNAMIC),
    embed_preprocess: Annotated[
        bool, typer.Option("--embed-preprocess", help="Take uint8 [N,H,W,3]; normalise in the graph.")
    ] = False,
    no_verify: NoVerify = False,
    as_json: Json = None,
) -> None:
    """Write a fused network, or a checkpoint after fusing it, as ONNX, and prove it."""
    from replk_deploy import pipeline

    if embed_preprocess and not onnx:
        raise ReplkError("--embed-preprocess belongs to ONNX", "add --onnx")
    with render.bars() as progress:
        made = pipeline.export(
            artefact,
            onnx=onnx,
            output=output,
            source=_source(weights),
            head=head,
            precision=_precision(precision),
            size=_size(size),
            batch=Range.parse(batch),
            embed=embed_preprocess,
            prove=not no_verify,
            progress=progress,
        )

    def words() -> None:
        if made.export:
            nodes = ", ".join(f"{n} {op}" for op, n in made.export.nodes.items())
            ports = made.export.inputs | made.export.outputs
            render.pairs({**ports, "opset": str(made.export.opset), "nodes": nodes})
        if made.proof:
            render.proof(made.proof)

    _finish(made, words, f"export {precision}", as_json)


@app.command()
def verify(
    reference: Annotated[Path, typer.Argument(help="Checkpoint, fused weights or ONNX file.")],
    candidate: Annotated[Path, typer.Argument(help="What is judged: likewise.")],
    *,
    weights: Weights = "model",
    head: Head = None,
    size: Size = None,
    as_json: Json = None,
) -> None:
    """Judge one file by another; exit 3 when they do not compute the same."""
    from replk_deploy import pipeline

    with render.bars() as progress:
        found = pipeline.verify(
            reference, candidate, source=_source(weights), head=head, size=_size(size), progress=progress
        )
    last = f"verify {candidate.name} · worst {found.worst:.2f} of allowance"
    render.show(found, lambda: render.proof(found), last, found.state, as_json=as_json)
    _exit(found.state)


@app.command()
def bench(
    artefact: Artefact = None,
    *,
    backend: Annotated[list[str], typer.Option(help="Runtime; repeatable, the first is the baseline.")],
    batch: Annotated[list[int], typer.Option(help="Images at a time; repeatable.")] = [1],  # noqa: B006  # typer copies it
    max_seconds: Annotated[float, typer.Option(help="Cap on the timed part, per backend and batch.")] = 60.0,
    percentile: Annotated[list[int], typer.Option(help="50, 90 or 99: enough samples are taken for it.")] = [50, 90],  # noqa: B006
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Time a file that no verdict vouches for.")
    ] = False,
    as_json: Json = None,
) -> None:
    """Time an artefact on runtimes, interleaved; none that no verdict vouches for."""
    from replk_deploy import pipeline

    with render.bars() as progress:
        timed = pipeline.bench(
            artefact,
            backends=tuple(dict.fromkeys(backend)),
            batches=tuple(dict.fromkeys(batch)),
            max_seconds=max_seconds,
            percentiles=tuple(percentile),
            allow_unverified=allow_unverified,
            progress=progress,
        )
    rows = timed.bench.rows
    stable = "" if not any(r.unstable for r in rows) else " · unstable, see notes"
    last = f"bench {', '.join(f'{r.backend} b{r.batch} {r.p50_ms.value:.2f} ms' for r in rows)}{stable}"
    state = "unverified" if timed.unverified else "pass"
    render.show(timed.bench, lambda: render.latency(timed), last, state, as_json=as_json)


@app.command()
def deploy(
    checkpoint: Checkpoint,
    *,
    weights: Weights = "model",
    head: Head = None,
    precision: Annotated[list[str], typer.Option(metavar="|".join(PRECISIONS), help="Repeatable.")] = ["fp32"],  # noqa: B006
    size: Size = None,
    batch: Batch = str(DYNAMIC),
    embed_preprocess: Annotated[
        bool, typer.Option("--embed-preprocess", help="Take uint8 [N,H,W,3]; normalise in the graph.")
    ] = False,
    backend: Annotated[list[str], typer.Option(help="Runtime to time; repeatable; by default all present.")] = [],  # noqa: B006
    bench_batch: Annotated[list[int], typer.Option(help="Batch to time; repeatable.")] = [1],  # noqa: B006
    max_seconds: Annotated[float, typer.Option(help="Cap on the timed part, per backend and batch.")] = 20.0,
    data: Annotated[Path | None, typer.Option(help="Labelled pictures: .npz, or a folder by class.")] = None,
    as_json: Json = None,
) -> None:
    """Do it all: inspect, fuse, prove, export, prove, bench, report."""
    from replk_deploy import pipeline

    with render.bars() as progress:
        done = pipeline.deploy(
            checkpoint,
            source=_source(weights),
            head=head,
            precisions=tuple(_precision(p) for p in dict.fromkeys(precision)),
            size=_size(size),
            batch=Range.parse(batch),
            embed=embed_preprocess,
            backends=tuple(dict.fromkeys(backend)),
            batches=tuple(dict.fromkeys(bench_batch)),
            max_seconds=max_seconds,
            data=data,
            progress=progress,
        )

    def words() -> None:
        render.inspection(done.inspection)
        render.chain(done)
        if done.accuracy:
            render.accuracy(done.accuracy)
        if done.timed:
            render.latency(done.timed)
        if done.reused:
            render.out.print(f"taken from the run as it was: {', '.join(done.reused)}")

    last = f"deploy {done.inspection.checkpoint.label} · {done.folder}/report.md"
    render.show(done, words, last, done.state, as_json=as_json)
    _exit(done.state)


@app.command()
def selftest(*, as_json: Json = None) -> None:
    """Plant every known fusion bug and show that the proof catches it."""
    from replk_deploy import selftest as testing

    with render.bars() as progress:
        found = testing.selftest(progress=progress)
    caught = sum(p.caught for p in found.plants)
    last = f"selftest {caught} of {len(found.plants)} planted bugs caught, {found.false_alarms} false alarms"
    state = "pass" if found.passed else "rejected"
    render.show(found, lambda: render.selftest(found), last, state, as_json=as_json)
    _exit(state)


def main() -> None:
    """Run the command line."""
    app(prog_name="replk")


def _finish(made: Any, words: Any, what: str, as_json: Path | None) -> None:
    worst = made.verdict.worst
    used = f" · worst {worst:.2f} of allowance" if worst is not None else ""
    render.show(made, words, f"{what}{used} · {made.file}", made.verdict.state, as_json=as_json)
    _exit(made.verdict.state)


def _exit(state: str) -> None:
    if state == "rejected":
        raise typer.Exit(Exit.MISMATCH)


def _source(text: str) -> Any:
    if text not in {"model", "ema"}:
        raise ReplkError(f"--weights {text} is not known", "choose model or ema")
    return text


def _precision(text: str) -> Precision:
    if text not in PRECISIONS:
        raise ReplkError(f"--precision {text} is not known", f"choose from {', '.join(PRECISIONS)}")
    return text


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not found or not int(found[1]) or found[2] == "0":
        raise ReplkError(f"--size {text} is not a size", "write N or HxW, for example 224 or 512x2048")
    return int(found[1]), int(found[2] or found[1])
