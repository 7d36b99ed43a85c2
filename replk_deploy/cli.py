"""The command line: parse, call one function of `pipeline`, render, exit."""

import errno
import signal
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from replk_deploy import __version__, advice, config, files, machine, options, records, render
from replk_deploy.backends import BACKENDS
from replk_deploy.batch import DYNAMIC
from replk_deploy.batch import Batch as Range
from replk_deploy.errors import Exit, MismatchError, ReplkError, UnavailableError, first_line
from replk_deploy.options import (
    AllowUnverified,
    Artefact,
    Batch,
    Checkpoint,
    ConvSearch,
    Device,
    Form,
    Github,
    Head,
    Json,
    Junit,
    Layout,
    NoVerify,
    Output,
    Precision,
    Size,
    Weights,
)
from replk_deploy.precision import PRECISIONS

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class ErrorsAtTheEdge(typer.core.TyperGroup):
    """Turn our errors into a message and an exit code, in one place."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command, and what the project's file says of its options."""
        name, command, rest = super().resolve_command(ctx, args)
        ctx.meta[options.SAID] = tuple(rest)  # parsing empties it
        if not ctx.resilient_parsing:
            path, said = self.choices()
            if name in said:
                ctx.default_map = said
                render.note(f"choices from {path}: {', '.join(sorted(said[name]))}")
        return name, command, rest

    def choices(self) -> tuple[Path | None, dict[str, dict[str, Any]]]:
        """Return what the project's file says."""
        return config.choices(Path.cwd(), {name: _options_of(command) for name, command in self.commands.items()})

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            render.note("interrupted; temporary files are removed")
            raise typer.Exit(Exit.INTERRUPTED) from None
        except (ReplkError, MemoryError, RuntimeError) as exc:
            if (said := _in_words(exc)) is None:
                raise  # ours, with its traceback
            render.error(said)
            word = {Exit.MISMATCH: "rejected", Exit.INCONCLUSIVE: "inconclusive"}.get(said.code, "error")
            render.verdict(
                word, f"{ctx.invoked_subcommand or 'replk'}: {said.problem.splitlines()[0].rstrip(':')}", render.err
            )
            raise typer.Exit(said.code) from exc


def _in_words(exc: BaseException) -> ReplkError | None:
    """Return what ended a command as a user should read it; None for a bug of ours."""
    if isinstance(exc, ReplkError):
        return exc
    words = ("can't allocate memory", "out of memory")  # of PyTorch, on CPUs and on GPUs
    if isinstance(exc, MemoryError) or (isinstance(exc, RuntimeError) and any(w in str(exc) for w in words)):
        return UnavailableError("memory ran out", "take a smaller --size or --batch, or a machine with more memory")
    return None


def _options_of(command: Any) -> dict[str, config.Option]:
    """Return the options of a command, by the name without dashes."""
    hints = typing.get_type_hints(command.callback)
    return {
        max(option.opts, key=len).lstrip("-"): config.Option(
            parameter=option.name,
            repeats=option.multiple,
            switch=option.is_flag,
            choices=_choices_of(hints[option.name], option.metavar or ""),
            path=Path in {hints[option.name], *typing.get_args(hints[option.name])},
        )
        for option in command.params
        if option.param_type_name == "option" and option.name in hints
    }


def _choices_of(hint: Any, metavar: str) -> tuple[str, ...]:
    """Return the choices that a type or a metavar lists; none where the metavar names anything else."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    words = tuple(metavar.split("|"))
    return words if len(words) > 1 and all(map(str.islower, words)) else ()


app = typer.Typer(
    cls=ErrorsAtTheEdge,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a RepLKNet training checkpoint to a proved ONNX model and a latency table.",
)


@app.callback(invoke_without_command=True)
def begin(
    context: typer.Context, *, show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """From a RepLKNet training checkpoint to a proved ONNX model and a latency table."""
    if show:
        render.out.print(f"replk {__version__}")
        raise typer.Exit(Exit.OK)
    if context.invoked_subcommand is None:
        typing.cast("ErrorsAtTheEdge", context.command).choices()  # a broken file is said
        render.advice(advice.advise(Path()))


@app.command()
def inspect(
    checkpoint: Checkpoint, *, weights: Weights = "model", head: Head = None, size: Size = None, as_json: Json = None
) -> None:
    """Say what a checkpoint is: network, form, costs, health."""
    from replk_deploy import pipeline

    seen = pipeline.inspect(checkpoint, source=options.source_of(weights), head=head, size=options.size_of(size))
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
            source=options.source_of(weights),
            head=head,
            size=options.size_of(size),
            prove=not no_verify,
            progress=progress,
        )

    def words() -> None:
        if not made.fusion.changed:
            render.say("already fused: nothing to merge or fold")
        else:
            merged, folded, left = len(made.fusion.merged), len(made.fusion.folded), len(made.fusion.left)
            render.say(f"{merged} blocks merged with their BatchNorms, {folded} others folded, {left} left")
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
    precision: Precision = "fp32",
    size: Size = None,
    batch: Batch = str(DYNAMIC),
    embed_preprocess: Annotated[
        bool, typer.Option("--embed-preprocess", help="Take uint8 [N,H,W,3]; normalise in the graph.")
    ] = False,
    lower: Form = "none",
    backend: Annotated[str | None, typer.Option(help="Runtime that --lower auto decides for.")] = None,
    no_verify: NoVerify = False,
    as_json: Json = None,
) -> None:
    """Write a fused network, or a checkpoint after fusing it, as ONNX, and prove it."""
    from replk_deploy import pipeline

    if embed_preprocess and not onnx:
        raise ReplkError("--embed-preprocess belongs to ONNX", "add --onnx")
    if (lower != "none" or backend) and not onnx:
        raise ReplkError("--lower and --backend belong to ONNX", "add --onnx; PyTorch lowers when it opens weights")
    if (lower == "auto") != (backend is not None):
        raise ReplkError("--lower auto and --backend go together", "name both, or ask for a form by name")
    chosen: dict[str, Any] = {
        "output": output,
        "source": options.source_of(weights),
        "head": head,
        "precision": options.precision_of(precision),
        "size": options.size_of(size),
        "batch": Range.parse(batch),
        "embed": embed_preprocess,
        "prove": not no_verify,
    }
    if lower != "none":
        with render.bars() as progress:
            lowered = pipeline.export_lowered(artefact, form=lower, backend=backend, progress=progress, **chosen)
        _finish(lowered, lambda: render.lowering(lowered), f"export {precision}, {lowered.plan.words}", as_json)
        return
    with render.bars() as progress:
        made = pipeline.export(artefact, onnx=onnx, progress=progress, **chosen)

    def words() -> None:
        if made.export:
            nodes = ", ".join(f"{n} {op}" for op, n in made.export.nodes.items())
            ports = made.export.inputs | made.export.outputs
            render.pairs({**ports, "opset": str(made.export.opset), "nodes": nodes})
        if made.proof:
            render.proof(made.proof)

    _finish(made, words, f"export {precision}", as_json)


@app.command()
def lower(
    artefact: Artefact = None,
    *,
    output: Output = None,
    form: Form = "auto",
    backend: Annotated[str, typer.Option(help=f"Runtime that auto decides for: {', '.join(BACKENDS)}.")] = "ort-cpu",
    batch: Annotated[list[int], typer.Option(help="Images at a time; --calibrate takes several.")] = [],  # noqa: B006
    max_weight_growth: Annotated[float, typer.Option(help="Most that all weights together may grow, in times.")] = 6.0,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure each form on this machine, for auto, and lower nothing.")
    ] = False,
    precision: Annotated[
        str | None, typer.Option(metavar="|".join(PRECISIONS), help="Which exported file of a run; else the newest.")
    ] = None,
    no_verify: NoVerify = False,
    as_json: Json = None,
) -> None:
    """Rewrite the large convolutions of an ONNX file in a form that a runtime runs fast, and prove it."""
    from replk_deploy import pipeline

    wanted = options.precision_of(precision) if precision else None
    if calibrate:
        with render.bars() as progress:
            found, path = pipeline.calibrate(
                artefact,
                backend=backend,
                batches=tuple(dict.fromkeys(batch or [1])),
                precision=wanted,
                progress=progress,
            )
        last = f"lower --calibrate {backend}: {len(found.costs)} times · {path}"
        render.show(found, lambda: render.calibration(found), last, "pass", as_json=as_json)
        return
    if len(batch) > 1:
        raise ReplkError("a file is lowered for one batch", "give --batch once, or add --calibrate")
    with render.bars() as progress:
        made = pipeline.lower(
            artefact,
            output=output,
            form=form,
            backend=backend,
            batch=batch[0] if batch else None,
            max_growth=max_weight_growth,
            precision=wanted,
            prove=not no_verify,
            progress=progress,
        )

    _finish(made, lambda: render.lowering(made), f"lower {made.plan.words or 'nothing'}", as_json)


@app.command()
def verify(
    reference: Annotated[Path, typer.Argument(help="Checkpoint, fused weights, ONNX file or engine.")],
    candidate: Annotated[Path, typer.Argument(help="What is judged: likewise.")],
    *,
    weights: Weights = "model",
    head: Head = None,
    size: Size = None,
    junit: Junit = None,
    github: Github = False,
    as_json: Json = None,
) -> None:
    """Judge one file by another; exit 3 when they do not compute the same."""
    from replk_deploy import ci, pipeline

    with _told("verify", candidate, junit, github=github) as tell, render.bars() as progress:
        found = pipeline.verify(
            reference,
            candidate,
            source=options.source_of(weights),
            head=head,
            size=options.size_of(size),
            progress=progress,
        )
        tell(ci.of_proof(found))
    last = f"verify {reference.name} and {candidate.name} · worst {found.worst:.2f} of allowance"
    render.show(found, lambda: render.proof(found), last, found.state, as_json=as_json)
    _exit(found.state)


@app.command()
def build(
    artefact: Artefact = None,
    *,
    backend: Annotated[str, typer.Option(help="Runtime that opens a built file: trt, trt-rtx, aoti, native.")],
    output: Output = None,
    precision: Annotated[
        str | None, typer.Option(metavar="|".join(PRECISIONS), help="Which exported file of a run; else the newest.")
    ] = None,
    batch: Annotated[
        list[str], typer.Option(metavar="N|MIN:MAX|MIN:OPT:MAX", help="Images at a time; repeatable, a profile each.")
    ] = [],  # noqa: B006  # typer copies it
    level: Annotated[int | None, typer.Option(min=0, max=5, help="Builder optimisation level.")] = None,
    workspace_mib: Annotated[int | None, typer.Option(min=1, help="Most scratch memory of a layer, in MiB.")] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="Folder that keeps timings between builds.")] = None,
    compute_capability: Annotated[
        list[str], typer.Option(metavar="X.Y", help="Of a GPU to build for; repeatable; else the runtime's choice.")
    ] = [],  # noqa: B006
    hardware: Annotated[
        Literal["none", "ampere-plus", "same-compute-capability"],
        typer.Option(help="Other GPUs that may open the engine."),
    ] = "none",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later versions of the runtime open the engine.")
    ] = False,
    refittable: Annotated[bool, typer.Option("--refittable", help="Let its weights be replaced later.")] = False,
    refit: Annotated[
        Path | None, typer.Option(metavar="ENGINE", help="Replace the weights of this engine instead of building.")
    ] = None,
    lower: Form = "auto",
    no_verify: NoVerify = False,
    allow_unverified: AllowUnverified = False,
    as_json: Json = None,
) -> None:
    """Build the engine of a runtime from an exported file, and judge it where it can run."""
    from replk_deploy import pipeline
    from replk_deploy.backends.base import Recipe

    recipe = Recipe(
        batches=tuple(Range.parse(text) for text in dict.fromkeys(batch)),
        level=level,
        workspace_mib=workspace_mib,
        timing_cache=timing_cache,
        compute_capabilities=tuple(dict.fromkeys(compute_capability)),
        hardware=hardware,
        version_compatible=version_compatible,
        refittable=refittable,
    )
    with render.bars() as progress:
        made = pipeline.build(
            artefact,
            backend=backend,
            output=output,
            precision=options.precision_of(precision) if precision else None,
            recipe=recipe,
            form=lower,
            refit=refit,
            prove=not no_verify,
            allow_unverified=allow_unverified,
            progress=progress,
        )
    _finish(made, lambda: render.engine(made), f"build {backend} {made.sidecar.precision}", as_json)


@app.command()
def bench(
    artefact: Artefact = None,
    *,
    backend: Annotated[list[str], typer.Option(help=f"{', '.join(BACKENDS)}; repeatable, the first is the baseline.")],
    batch: Annotated[list[int], typer.Option(help="Images at a time; repeatable.")] = [1],  # noqa: B006  # typer copies it
    baseline: Annotated[
        list[str], typer.Option(metavar="timm:NAME", help="Another network beside ours; repeatable.")
    ] = [],  # noqa: B006
    lower: Annotated[
        list[str],
        typer.Option(
            metavar="auto|none|FORM", help="Form of large convolutions; auto decides for backend and batch; repeatable."
        ),
    ] = ["auto"],  # noqa: B006
    cuda_graph: Annotated[
        Literal["auto", "on", "off"], typer.Option(help="Replay a CUDA graph; auto measures with and without.")
    ] = "auto",
    device: Device = "auto",
    layout: Layout = "auto",
    conv_search: ConvSearch = "exhaustive",
    max_seconds: Annotated[float, typer.Option(help="Cap on the timed part, per row.")] = 60.0,
    percentile: Annotated[list[int], typer.Option(help="50, 90 or 99: enough samples are taken for it.")] = [50, 90],  # noqa: B006
    precision: Annotated[
        str | None, typer.Option(metavar="|".join(PRECISIONS), help="Which exported file of a run; else the newest.")
    ] = None,
    idle_ms: Annotated[float, typer.Option(help="Pause before each inference, outside the clock.")] = 0.0,
    cold_l2: Annotated[
        bool, typer.Option("--cold-l2", help="Empty the GPU's L2 cache before each inference, outside the clocks.")
    ] = False,
    require_stable: Annotated[bool, typer.Option("--require-stable", help="Exit 7 when a row did not settle.")] = False,
    allow_unverified: AllowUnverified = False,
    as_json: Json = None,
) -> None:
    """Time an artefact on runtimes, interleaved; none that no verdict vouches for."""
    from replk_deploy import pipeline
    from replk_deploy.backends.base import Settings
    from replk_deploy.bench import shortage

    if short := shortage(max_seconds):
        render.say(short, render.err)
    with render.bars() as progress:
        timed = pipeline.bench(
            artefact,
            backends=tuple(dict.fromkeys(backend)),
            batches=tuple(dict.fromkeys(batch)),
            baselines=tuple(dict.fromkeys(baseline)),
            forms=tuple(options.form_of(form) for form in dict.fromkeys(lower)),
            settings=Settings(device=device, layout=layout, conv_search=conv_search),
            cuda_graph=cuda_graph,
            max_seconds=max_seconds,
            percentiles=tuple(percentile),
            idle_ms=idle_ms,
            cold_l2=cold_l2,
            precision=options.precision_of(precision) if precision else None,
            allow_unverified=allow_unverified,
            progress=progress,
        )
    rows = timed.bench.rows
    unstable, failed = any(r.unstable for r in rows), len(timed.bench.failures)
    words = [f"{r.name} {r.p50_ms.value:.2f} ms" for r in rows]
    last = f"bench {', '.join(words)}{' · unstable, see notes' if unstable else ''}"
    if failed:
        last += f" · {failed} rows failed"
    state = "error" if failed else "unverified" if timed.unverified else "pass"
    if state in {"pass", "unverified"} and unstable and require_stable:
        state = "inconclusive"
    render.show(timed.bench, lambda: render.latency(timed), last, state, as_json=as_json)
    raise typer.Exit({"error": Exit.UNAVAILABLE, "inconclusive": Exit.INCONCLUSIVE}.get(state, Exit.OK))


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(help="A bench record, or a folder of them, one per process.")],
    new: Annotated[Path, typer.Argument(help="Likewise.")],
    *,
    max_regress: Annotated[
        str | None, typer.Option(metavar="SHARE", help="As 3%: exit 4 when a row is slower by more.")
    ] = None,
    require_stable: Annotated[bool, typer.Option("--require-stable", help="Exit 7 when a row is ambiguous.")] = False,
    junit: Junit = None,
    github: Github = False,
    as_json: Json = None,
) -> None:
    """Say of each row of two bench records whether it is the same, faster, slower or ambiguous."""
    from replk_deploy import ci, pipeline

    with _told("compare", new, junit, github=github) as tell:
        found = pipeline.compare(base, new, max_regress=options.share_of(max_regress))
        tell(ci.of_comparison(found, require_stable=require_stable))
    missing = max_regress is not None and found.only_in_base
    unsure = (require_stable and found.ambiguous) or missing or found.undecided
    state = "regression" if found.regressed else "inconclusive" if unsure else "pass"
    last = f"compare {', '.join(f'{row.name} {row.word} {row.ratio:.3f}' for row in found.rows)}"
    render.show(found, lambda: render.comparison(found), last, state, as_json=as_json)
    raise typer.Exit({"regression": Exit.REGRESSION, "inconclusive": Exit.INCONCLUSIVE}.get(state, Exit.OK))


@app.command()
def profile(
    artefact: Artefact = None,
    *,
    backend: Annotated[str, typer.Option(help="Runtime, as in bench.")],
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 1,
    repeats: Annotated[int, typer.Option(min=3, help="Inferences that are timed.")] = 20,
    device: Device = "auto",
    layout: Layout = "auto",
    allow_unverified: AllowUnverified = False,
    as_json: Json = None,
) -> None:
    """Time each layer, with its share, its work and what the device could do at best."""
    from replk_deploy import pipeline
    from replk_deploy.backends.base import Settings

    with render.bars() as progress:
        found = pipeline.profile(
            artefact,
            backend=backend,
            batch=batch,
            repeats=repeats,
            settings=Settings(device=device, layout=layout),
            allow_unverified=allow_unverified,
            progress=progress,
        )
    last = f"profile {backend} b{batch} {found.whole_ms.value:.2f} ms · large kernels {found.large_share:.0%}"
    last += " · unstable, see notes" if found.unstable else ""
    render.show(found, lambda: render.profile(found), last, "pass", as_json=as_json)


@app.command()
def doctor(*, as_json: Json = None) -> None:
    """Say what this machine can run, what is missing, and what does not work together."""
    from replk_deploy import doctor as medicine

    found = medicine.doctor()
    render.show(found, lambda: render.doctor(found), f"doctor {found.sentence}", "pass", as_json=as_json)


@app.command()
def erf(
    checkpoint: Checkpoint,
    *,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", callback=options.place, help="Draw it here: a .svg file.")
    ] = None,
    weights: Weights = "model",
    head: Head = None,
    size: Size = None,
    data: Annotated[Path | None, typer.Option(help="Pictures, as in deploy; without them, seeded noise.")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many to average over.")] = 8,
    as_json: Json = None,
) -> None:
    """Measure the effective receptive field, as trained and as fused."""
    from replk_deploy import pipeline

    with render.bars() as progress:
        found = pipeline.erf(
            checkpoint,
            output=output,
            source=options.source_of(weights),
            head=head,
            size=options.size_of(size),
            data=data,
            count=images,
            progress=progress,
        )
    half = next(s for s in found.fields[-1].squares if s.share == 0.5)  # noqa: PLR2004  # of the paper's shares
    last = f"erf {found.label}: half of it in {half.area:.1%} of the image, trained and fused {found.apart:.1e} apart"
    render.show(found, lambda: render.receptive(found), last, found.state, as_json=as_json)
    _exit(found.state)


@app.command()
def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders; by default the latest run.")] = None,
    *,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=options.place, help="One self-contained page.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=options.place, help="For a pull request.")
    ] = None,
    junit: Junit = None,
    as_json: Json = None,
) -> None:
    """Write what runs vouch for as one page, Markdown or JSON."""
    from replk_deploy import pipeline
    from replk_deploy.report import forms

    found = pipeline.report(tuple(runs or ()), html=html, markdown=markdown, junit=junit, json=as_json)
    folder = runs[0] if runs else advice.RUNS / found.runs[0].name
    places = [str(p) for p in (html, markdown, junit, as_json) if p] or [f"{folder}/report.html"]
    console = render.out
    if str(as_json) == "-":
        render.document(forms.as_json(found))
        console = render.err
    render.verdict(found.state, f"report {', '.join(run.name for run in found.runs)} · {', '.join(places)}", console)
    raise typer.Exit(found.code)


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
    junit: Junit = None,
    github: Github = False,
    as_json: Json = None,
) -> None:
    """Do it all: inspect, fuse, prove, export, prove, bench, report."""
    from replk_deploy import ci, pipeline

    with _told("deploy", checkpoint, junit, github=github) as tell, render.bars() as progress:
        done = pipeline.deploy(
            checkpoint,
            source=options.source_of(weights),
            head=head,
            precisions=tuple(options.precision_of(p) for p in dict.fromkeys(precision)),
            size=options.size_of(size),
            batch=Range.parse(batch),
            embed=embed_preprocess,
            backends=tuple(dict.fromkeys(backend)),
            batches=tuple(dict.fromkeys(bench_batch)),
            max_seconds=max_seconds,
            data=data,
            progress=progress,
        )
        tell(ci.of_deployment(records.plain(done)))
    _deployed(done, "deploy", as_json)


@app.command()
def demo(
    *,
    max_seconds: Annotated[float, typer.Option(help="Cap on the timed part, per backend and batch.")] = 20.0,
    as_json: Json = None,
) -> None:
    """Do it all on a small trained network that comes with the program, with accuracy at each step."""
    from replk_deploy import pipeline

    with render.bars() as progress:
        done = pipeline.demo(max_seconds=max_seconds, progress=progress)
    _deployed(done, "demo", as_json)


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


def main() -> int:
    """Run the command line; a request to end is an interrupt, and an output that nobody takes no bug."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            app(prog_name="replk")
        finally:
            render.flush()
    except BaseException as exc:
        if isinstance(exc, BrokenPipeError) or isinstance(exc.__context__, BrokenPipeError):  # rich and Typer exit 1
            render.fall_silent()
            return Exit.PIPE
        if not isinstance(exc, OSError) or exc.errno not in FULL:
            raise
        problem = f"the output cannot be written: {exc.strerror}"
        with suppress(OSError):  # stderr may be as full
            render.error(ReplkError(problem, "make room, or name another place"))
            render.verdict("error", f"replk: {problem}", render.err)
        render.fall_silent()
        return Exit.USAGE
    return Exit.OK


@contextmanager
def _told(suite: str, about: Path, junit: Path | None, *, github: bool) -> Iterator[Callable[[Sequence[Any]], None]]:
    """Give what tells continuous integration of a verdict; what stops the command is told, even where it is killed."""
    from replk_deploy import ci

    summary = machine.step_summary() if github else None

    def tell(cases: Sequence[ci.Case]) -> None:
        if junit:
            files.write_text(junit, ci.junit(suite, cases))
        if github:
            for line in ci.annotations(suite, cases, about=about, workspace=machine.workspace()):
                render.note(line, whole=True)
        if summary:
            ci.append(summary, ci.summary(suite, cases))

    try:
        if summary:
            ci.append(summary, "")
        if junit:
            files.write_text(junit, ci.junit(suite, (ci.Case.stopped(suite, ci.UNENDED),)))
        yield tell
    except KeyboardInterrupt:
        tell((ci.Case.stopped(suite, "interrupted"),))
        raise
    except MismatchError as exc:
        tell((ci.Case(name=suite, found="", failure=str(exc)),))
        raise
    except Exception as exc:
        said = _in_words(exc) or f"{type(exc).__name__}: {first_line(exc)}"
        tell((ci.Case.stopped(suite, str(said)),))
        raise


def _deployed(done: Any, command: str, as_json: Path | None) -> None:
    def words() -> None:
        render.inspection(done.inspection)
        render.chain(done)
        if done.accuracy:
            render.accuracy(done.accuracy)
        if done.timed:
            render.latency(done.timed)
        if done.reused:
            render.say(f"taken from the run as it was: {', '.join(done.reused)}")

    last = f"{command} {done.inspection.checkpoint.label} · {done.folder}/report.html"
    failed = len(done.timed.bench.failures) if done.timed else 0
    if failed:
        last += f" · {failed} rows failed"
    state = "error" if failed and done.state != "rejected" else done.state
    render.show(done, words, last, state, as_json=as_json)
    _exit(state)


def _finish(made: Any, words: Any, what: str, as_json: Path | None) -> None:
    worst = made.verdict.worst
    used = f" · worst {worst:.2f} of allowance" if worst is not None else ""
    render.show(made, words, f"{what}{used} · {made.file}", made.verdict.state, as_json=as_json)
    _exit(made.verdict.state)


def _exit(state: str) -> None:
    if state == "rejected":
        raise typer.Exit(Exit.MISMATCH)
    if state == "error":
        raise typer.Exit(Exit.UNAVAILABLE)
