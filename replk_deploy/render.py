"""Results → words, tables and progress bars on a terminal.

Results go to stdout, all else to stderr, and the last line is always one verdict. Tables are kept
narrow: what does not fit in 60 columns stands on a line of its own. Sentences are broken at the width
of a terminal and never in a pipe; what is there to be pasted is broken nowhere.
"""

import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from replk_deploy import files, records
from replk_deploy.errors import ReplkError
from replk_deploy.progress import Progress as Listener

NAME = 5  # columns that are left to a row's name, at least
PIPE = 120  # columns of a pipe, where nobody said how many: no name is folded


def console(
    variables: Mapping[str, str] | None = None, *, stderr: bool = False, terminal: bool | None = None
) -> Console:
    """Return stdout or stderr, without escape codes under NO_COLOR; what is not told is found out."""
    made = Console(stderr=stderr, highlight=False, emoji=False, force_terminal=terminal, _environ=variables)
    if made.no_color:
        made._color_system = None  # rich itself would keep bold and dim
    if not made.is_terminal and made._width is None:
        made.width = PIPE
    return made


out, err = console(), console(stderr=True)
WORDS = {"pass": "PASS", "provisional": "PASS (provisional)", "unverified": "UNVERIFIED", "rejected": "FAIL"} | {
    "inconclusive": "INCONCLUSIVE",
    "regression": "REGRESSION",
    "error": "ERROR",
}
SENTENCES = FOUND, BECAUSE, CULPRIT = "found or missing", "because", "first wrong block"
COLOURS = {
    "pass": "green",
    "provisional": "yellow",
    "unverified": "yellow",
    "rejected": "red",
    "inconclusive": "yellow",
    "regression": "red",
    "error": "red",
}


@contextmanager
def bars() -> Iterator[Listener]:
    """Show each step as a bar on a terminal that moves and colours, and as one line elsewhere."""
    if err.color_system is None:
        seen: set[str] = set()

        def line(step: str, done: int, total: int | None) -> None:
            del done, total
            if step not in seen:
                seen.add(step)
                err.print(f"· {escape(step)}")

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as display:
        tasks: dict[str, Any] = {}

        def update(step: str, done: int, total: int | None) -> None:
            if step not in tasks:
                for task in tasks.values():
                    display.update(task, visible=False)
                tasks[step] = display.add_task(escape(step), total=total)
            display.update(tasks[step], completed=done, total=total)

        yield update


def flush() -> None:
    """Write what stdout still holds; on the interpreter's way out nobody could catch an error."""
    if sys.stdout:
        sys.stdout.flush()


def fall_silent() -> None:
    """Send the rest of the output nowhere where nobody takes it, or the interpreter complains on its way out."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def error(problem: ReplkError) -> None:
    """Say what is wrong and what to do, on stderr."""
    err.print(f"[red]error[/] {escape(problem.problem)}", soft_wrap=True)
    err.print(f"[green]fix[/]   {escape(problem.remedy)}", soft_wrap=True)


def note(text: str, *, whole: bool = False) -> None:
    """Say something beside the result, on stderr; `whole` in one line, however wide a terminal is."""
    if whole:
        err.print(escape(text), soft_wrap=True)
    else:
        say(escape(text), err)


def advice(found: Any) -> None:
    """Print what to do next."""
    out.print(escape(found.stands), soft_wrap=True)
    wide = max(len(command) for command, _ in found.commands)
    for command, gives in found.commands:
        out.print(f"  [bold]{escape(command):{wide}}[/]  {escape(gives)}", soft_wrap=True)
    out.print("all commands: replk --help", soft_wrap=True)


def show(result: Any, words: Callable[[], None], last: str, state: str, *, as_json: Path | None) -> None:
    """Show a result: as words, or as JSON in a file or on stdout; then the verdict line."""
    if as_json is not None and str(as_json) == "-":
        sys.stdout.write(records.to_json(result))
        verdict(state, last, err)
        return
    words()
    if as_json is not None:
        files.write_text(as_json, records.to_json(result))
    verdict(state, last, out)


def verdict(state: str, text: str, where: Console) -> None:
    """Print the last line."""
    say(f"[bold {COLOURS[state]}]{WORDS[state]}[/] {escape(text)}", where)


def say(text: str, where: Console | None = None) -> None:
    """Print a sentence: broken at the width of a terminal, in one piece elsewhere."""
    where = where or out
    where.print(text, soft_wrap=not where.is_terminal)


def inspection(seen: Any) -> None:
    """Print what a checkpoint is."""
    loaded = seen.checkpoint
    height, width = seen.size
    rules = loaded.preprocessing
    facts = {
        "form": f"{loaded.form}, {seen.convolutions} convolutions, {seen.batch_norms} BatchNorms",
        "wrapper": loaded.wrapper if loaded.layout == "reference" else f"{loaded.wrapper}, {loaded.layout} names",
        "classes": str(seen.classes) if seen.classes else f"none: a backbone giving {', '.join(seen.outputs)}",
        "parameters": f"{seen.parameters:,}",
        f"MACs at {height}x{width}": f"{seen.macs / 1e9:.3f} G, {seen.inside_macs / 1e9:.3f} G of them inside the map",
        "  as one kernel": f"{seen.fused_macs / 1e9:.3f} G",
        "input": f"{rules.size[0]}x{rules.size[1]} {rules.resize}",
        "  mean, std": f"{_triple(rules.mean)}, {_triple(rules.std)}",
        "  said by": rules.said_by,
        "sha256": loaded.sha256,
    }
    if loaded.ignored:
        facts["left aside"] = _some(loaded.ignored)
    say(f"[bold]{escape(loaded.label)}[/]  {escape(loaded.file)}")
    pairs(facts)
    table = _table("kernel", "channels", "map", "MMAC", "inside", title="large kernels, per image")
    groups: dict[tuple[int, ...], list[Any]] = {}
    for layer in seen.large:
        groups.setdefault((layer.kernel, layer.channels, *layer.map), []).append(layer)
    for (kernel, channels, high, wide), layers in groups.items():
        one = layers[0]
        share = f"{one.inside_macs / one.macs:.1%}"
        times = f"{len(layers)} x " if len(layers) > 1 else ""
        table.add_row(f"{times}{kernel}x{kernel}", str(channels), f"{high}x{wide}", f"{one.macs / 1e6:.1f}", share)
    _print(table)
    for doubt in loaded.warnings:
        say(f"[yellow]note[/] {escape(doubt)}")


def proof(found: Any, *, places: bool = True) -> None:
    """Print how far each state is from float64."""
    against = ", ".join(dict.fromkeys(row.against for row in found.agreements)) or "nothing"
    table = _table("state", "rel. L2", "limit", "share", "verdict", title=f"against {against}")
    for row in found.agreements:
        limit = max(row.bound.rel_l2.values())
        colour = COLOURS[row.state]
        table.add_row(
            escape(row.name), f"{row.rel_l2:.1e}", f"{limit:.1e}", f"{row.worst:.2f}", f"[{colour}]{row.state}[/]"
        )
    _print(table)
    if found.modules and places:
        worst = max(found.modules.values())
        say(f"{len(found.modules)} re-parameterised blocks alone: worst {worst:.1e}, limit 1.0e-12")
    ties, flips = sum(a.ties for a in found.agreements), sum(a.flips for a in found.agreements)
    if ties or flips:
        say(f"top-1: {flips} flipped, {ties} between classes too close to tell apart")
    if found.doubt:
        say(f"[yellow]note[/] {escape(found.doubt)}")
    if found.state == "rejected":
        say(f"[red]why[/]  {escape(found.sentence)}")


def latency(found: Any) -> None:
    """Print one row a network, backend and batch, medians with their intervals."""
    rows, timed = found.bench.rows, found.bench
    gpu, flow = any(r.gpu_p50_ms for r in rows), any(r.throughput for r in rows)
    precisions = {r.contract.precision for r in rows}
    heads = [
        "row",
        *(["type"] if len(precisions) > 1 else []),
        "p50 ms",
        "p90 ms",
        "p99 ms",
        *(["GPU p50 ms"] if gpu else []),
        *(["images/s"] if flow else []),
    ]
    cold = any(r.contract.l2 == "cold" for r in rows)
    table = _table(*heads, "ratio", title="latency, cold L2" if cold else "latency")
    for row in rows:
        alone = "baseline" if row.backend == timed.baseline and row.model == (timed.baseline_model or "") else "–"
        cells = [row.name, *([row.contract.precision] if len(precisions) > 1 else [])]
        cells += [*(_quantile(q) if q else "n/a" for q in (row.p50_ms, row.p90_ms, row.p99_ms))]
        cells += [_quantile(row.gpu_p50_ms) if row.gpu_p50_ms else "–"] if gpu else []
        cells += [f"{row.throughput.images_per_s:.0f}" if row.throughput else "–"] if flow else []
        table.add_row(*cells, _ratio(row.ratio.median) if row.ratio else alone)
    _print(table)
    base = timed.baseline_model or timed.baseline
    types = ", ".join(sorted(precisions))
    place = "input in place, L2 cache emptied before each inference" if cold else "input in place"
    say(f"{types}, host clock, {place}, 95% intervals; ratio is time over {escape(base)}'s, paired by round")
    for row in rows:
        for why in (*row.notes, *row.unstable):
            say(f"[yellow]note[/] {escape(row.name)}: {escape(why)}")
        if row.facts.get("lowering", "none") != "none":
            say(f"{escape(row.name)}: large convolutions as {row.facts['lowering']}")
    for name, why in timed.failures.items():
        say(f"[red]left[/] {escape(name)}: {escape(why)}")
    for name, judged in found.agreements.items():
        file = found.artefacts.get(name)
        say(f"{escape(f'{name} on {file}' if file else name)}: {escape(judged.sentence)}")


def comparison(found: Any) -> None:
    """Print each row of two sides with its ratio and word."""
    table = _table("row", "base ms", "new ms", "new / base", "word", title="compare")
    colours = {"FASTER": "green", "SLOWER": "red", "AMBIGUOUS": "yellow", "SAME": "default"}
    for row in found.rows:
        low, high = row.interval or (None, None)
        interval = "" if low is None else f"\n[dim]{low:.3f}-{high:.3f}[/]"
        medians = [f"{statistics.median(side.p50_ms):.3f}" for side in (row.base, row.new)]
        table.add_row(row.name, *medians, f"{row.ratio:.3f}{interval}", f"[{colours[row.word]}]{row.word}[/]")
    _print(table)
    for side, names in (("base", found.only_in_base), ("new", found.only_in_new)):
        if names:
            say(f"only in {side}: {escape(', '.join(names))}")
    for row in found.rows:
        if row.why:
            say(f"[yellow]ambiguous[/] {escape(row.name)}: {escape(row.why)}")
    for doubt in found.doubts:
        say(f"[yellow]note[/] {escape(doubt)}")
    for name in found.regressions:
        say(f"[red]slower[/] {escape(name)}: by more than {found.max_regress:.1%}")


def engine(made: Any) -> None:
    """Print what an engine is and how far it is from float64."""
    said = made.sidecar
    shape = "x".join("?" if d is None else str(d) for d in said.input.shape)
    facts = {
        "from": said.source,
        "input": f"{said.input.name} {said.input.dtype} {shape}",
        "batches": ", ".join(map(str, said.batches)) or "any",
        "for": ", ".join(f"{k} {v}" for k, v in said.made_with.items()),
        "sidecar": f"{made.file.name}.json",
    }
    pairs(facts | {name: value for name, value in said.facts.items() if value})
    if made.proof:
        proof(made.proof)
    if made.absent:
        say(f"[yellow]note[/] not run here: {escape(made.absent)}")


def profile(found: Any, *, most: int = 30) -> None:
    """Print the sentence, then the layers that take most, large kernels marked."""
    say(escape(found.sentence))
    table = _table("layer", "ms", "share", "MMAC", "in map", "x best", title=f"layers of {found.backend}")
    shown = sorted(found.layers, key=lambda layer: -layer.ms.value)[:most]
    for layer in sorted(shown, key=found.layers.index):
        work = f"{layer.macs / 1e6:.1f}" if layer.sites else "–"
        inside = f"{layer.inside_macs / layer.macs:.0%}" if layer.macs else "–"
        name = f"[bold]{escape(layer.name)}[/]" if layer.large else escape(layer.name)
        ratio = f"{layer.ratio:.1f}" if layer.ratio else "–"
        table.add_row(name, _quantile(layer.ms, 3), f"{layer.share:.1%}", work, inside, ratio)
    left = [layer for layer in found.layers if layer not in shown]
    if left:
        rest = sum(layer.ms.value for layer in left)
        table.add_row(f"{len(left)} more", f"{rest:.3f}", f"{rest / found.of_ms:.1%}", "", "", "")
    rest = found.unattributed_ms
    if rest < 0:
        table.add_row("all layers, watched", f"{found.layers_ms:.3f}", "100.0%", "", "", "")
    else:
        table.add_row("in no layer", f"{rest:.3f}", f"{rest / found.of_ms:.1%}", "", "", "")
    share = "–" if rest < 0 else "100.0%"
    table.add_row("[bold]whole, unwatched[/]", _quantile(found.whole_ms, 3), share, "", "", "")
    _print(table)
    limits = found.roofline
    say(
        f"x best is time over what {limits.copy_gbps:.0f} GB/s and {limits.matrix_gflops:.0f} GFLOP/s"
        f" ({limits.computes}), measured just now, allow; bold layers hold large kernels"
    )
    for doubt in found.doubts:
        say(f"[yellow]note[/] {escape(doubt)}")


def doctor(found: Any) -> None:
    """Print each backend with its versions or what it lacks, then what is known to go wrong."""
    here = found.environment
    pairs({name: str(here[name]) for name in ("cpu", "gpu", "gpu_driver", "os", "python") if here.get(name)})
    colours = {"ready": "green", "missing": "yellow", "broken": "red"}
    table = _table("backend", "state", FOUND, title="backends")
    for runtime in found.backends:
        facts = ", ".join(f"{name} {value}" for name, value in runtime.facts.items())
        words = escape(facts) if facts else f"{escape(runtime.why)}\n[dim]{escape(runtime.fix)}[/]"
        table.add_row(runtime.name, f"[{colours[runtime.state]}]{runtime.state}[/]", words)
    _print(table)
    for trouble in found.troubles:
        say(f"[red]known trouble[/] {escape(trouble.problem)}")
        out.print(f"  {escape(trouble.fix)}", soft_wrap=True)


def lowering(made: Any) -> None:
    """Print what became of the large convolutions, like ones together, and why."""
    plan, sites = made.plan, made.lowered.sites
    decided = {d.site.name: d for d in plan.decisions}
    alike: dict[tuple[Any, ...], int] = {}
    for site in sites:
        decision = decided.get(site.name)
        times = tuple(decision.ms.items()) if decision else ()
        why = site.reason or (decision.why if decision else "asked for")
        key = (site.kernel, site.taps, site.channels, site.map, site.choice, why, times, site.bytes_after)
        alike[key] = alike.get(key, 0) + 1
    table = _table("kernel, channels, map", "form", "ms", "MB", BECAUSE, title="large convolutions")
    for (kernel, taps, channels, size, choice, why, times, held), count in alike.items():
        cropped = "" if taps == kernel else f"→{taps[0]}x{taps[1]}"
        layer = f"{kernel[0]}x{kernel[1]}{cropped}, {channels}, {'x'.join(map(str, size)) if size else '?'}"
        before, after = dict(times).get("none"), dict(times).get(choice)
        gain = "–" if before is None else f"{before:.3g}" if choice == "none" else f"{before:.3g} → {after:.3g}"
        table.add_row(f"{f'{count} x ' if count > 1 else ''}{layer}", choice, gain, f"{held / 1e6:.1f}", why)
    if sites:
        _print(table)
    else:
        say("no large convolution: the graph is what it was")
    grown = f"weights {made.lowered.bytes_before / 1e6:.1f} → {made.lowered.bytes_after / 1e6:.1f} MB"
    say(f"{grown}, {made.lowered.growth:.2f} times" + (f"; times: {plan.source}" if plan.source else ""))
    if made.errors:
        worst = max(made.errors.values())
        say(f"{len(made.errors)} places alone, in float64: worst {worst:.1e}, limit 1.0e-12")
    if made.proof:
        proof(made.proof, places=False)


def calibration(found: Any) -> None:
    """Print what each form of each convolution costs."""
    forms = list(dict.fromkeys(cost.form for cost in found.costs))
    table = _table("kernel", "channels", "map", "batch", *(f"{form} ms" for form in forms), title="calibration")
    rows: dict[tuple[Any, ...], dict[str, float]] = {}
    for cost in found.costs:
        rows.setdefault((cost.taps, cost.channels, cost.map, cost.batch), {})[cost.form] = cost.ms
    for (taps, channels, size, batch), times in rows.items():
        best = min(times, key=lambda form: times[form])
        cells = (f"[bold]{times[f]:.3g}[/]" if f == best else f"{times[f]:.3g}" if f in times else "–" for f in forms)
        table.add_row(f"{taps[0]}x{taps[1]}", str(channels), f"{size[0]}x{size[1]}", str(batch), *cells)
    _print(table)


def accuracy(steps: Sequence[Any]) -> None:
    """Print how often each step is right."""
    table = _table("step", "top-1", "right", "same as trained", title="accuracy")
    for row in steps:
        whole = row["images"]
        table.add_row(
            row["step"], f"{row['top1']:.2%}", f"{row['correct']} of {whole}", f"{row['same_as_first']} of {whole}"
        )
    _print(table)


def receptive(found: Any) -> None:
    """Print how much of an image holds how much of the receptive field."""
    table = _table("share", *(field.network for field in found.fields), title="receptive field")
    for squares in zip(*(field.squares for field in found.fields), strict=True):
        areas = (f"{square.height}x{square.width} = {square.area:.1%}" for square in squares)
        table.add_row(f"{squares[0].share:.0%}", *areas)
    _print(table)
    say(f"over {found.images} images of {found.size[0]}x{found.size[1]}: {escape(found.shown)}")


def document(text: str) -> None:
    """Write a whole document to stdout, as it is."""
    sys.stdout.write(text)


def chain(done: Any) -> None:
    """Print the steps of a run, each with its error and verdict."""
    table = _table("file", "rel. L2", "limit", "share", "verdict", title="proof, against float64")
    for step in (done.fuse, *done.exports):
        state = step["verdict"]["state"]
        table.add_section()
        for row in (step["proof"] or {"agreements": ()})["agreements"]:
            limit = max(map(float, row["bound"]["rel_l2"].values()))  # NaN and infinity are stored as text
            rel_l2, worst = float(row["rel_l2"]), float(row["worst"])
            table.add_row(escape(f"  {row['name']}"), f"{rel_l2:.1e}", f"{limit:.1e}", f"{worst:.2f}", row["state"])
        name = f"[bold]{escape(Path(step['file']).name)}[/]"
        table.add_row(name, "", "", f"{step['verdict']['worst'] or 0:.2f}", f"[{COLOURS[state]}]{state}[/]")
    _print(table)


def selftest(found: Any) -> None:
    """Print each planted bug and whether the gate caught it."""
    table = _table("planted bug", "rel. L2", CULPRIT, title="selftest")
    for row in found.plants:
        caught = escape(row.caught_by) if row.caught else "[red]MISSED[/]"
        table.add_row(escape(row.bug), f"{row.rel_l2:.1e}", caught)
    _print(table)
    say(f"{found.clean} correct fusions: {found.false_alarms} false alarms")


def pairs(facts: dict[str, str]) -> None:
    """Print names and values, one a line."""
    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for name, value in facts.items():
        table.add_row(f"[dim]{escape(name)}[/]", escape(value))
    _print(table)


def _table(*heads: str, title: str) -> Table:
    """Begin a table in which a narrow terminal breaks the names, never a number."""
    first, *others = heads
    columns = (
        Column(first, overflow="fold"),
        *(Column(head, no_wrap=head not in SENTENCES, overflow="fold") for head in others),
    )
    return Table(*columns, title=title, title_justify="left")


def _print(table: Table) -> None:
    """Print a table; where its numbers alone are too wide for the window, they are folded, not cut."""
    fixed = [column for column in table.columns if column.no_wrap]
    wide = sum(max(out.measure(cell).maximum for cell in (column.header, *column.cells)) for column in fixed)
    if wide + 3 * len(table.columns) + 1 + NAME > out.width:
        for column in fixed:
            column.no_wrap = False
    out.print(table)


def _quantile(value: Any, digits: int = 2) -> str:
    if value.interval is None:
        return f"{value.value:.{digits}f}"
    low, high = value.interval
    return f"{value.value:.{digits}f}\n[dim]{low:.{digits}f}-{high:.{digits}f}[/]"


def _ratio(value: Any) -> str:
    if value.interval is None:
        return f"{value.value:.3g}"
    low, high = value.interval
    return f"{value.value:.3g}\n[dim]{low:.3g}-{high:.3g}[/]"


def _triple(values: Sequence[float]) -> str:
    return "/".join(f"{v:g}" for v in values)


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
