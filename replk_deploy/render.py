"""Results → words, tables and progress bars on a terminal.

Results go to stdout, all else to stderr, and the last line is always one verdict. Tables are kept
narrow: what does not fit in 60 columns stands on a line of its own.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
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

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)
WORDS = {"pass": "PASS", "provisional": "PASS (provisional)", "unverified": "UNVERIFIED", "rejected": "FAIL"} | {
    "inconclusive": "INCONCLUSIVE",
    "error": "ERROR",
}
COLOURS = {
    "pass": "green",
    "provisional": "yellow",
    "unverified": "yellow",
    "rejected": "red",
    "inconclusive": "yellow",
    "error": "red",
}


@contextmanager
def bars() -> Iterator[Listener]:
    """Show each step as a bar on a terminal's stderr, and as one line elsewhere."""
    if not err.is_terminal:
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


def error(problem: ReplkError) -> None:
    """Say what is wrong and what to do, on stderr."""
    err.print(f"[red]error[/] {escape(problem.problem)}", soft_wrap=True)
    err.print(f"[green]fix[/]   {escape(problem.remedy)}", soft_wrap=True)


def note(text: str) -> None:
    """Say something beside the result, on stderr."""
    err.print(escape(text), soft_wrap=True)


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


def verdict(state: str, text: str, console: Console = out) -> None:
    """Print the last line."""
    console.print(f"[bold {COLOURS[state]}]{WORDS[state]}[/] {escape(text)}", soft_wrap=True)


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
    out.print(f"[bold]{escape(loaded.label)}[/]  {escape(loaded.file)}")
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
    out.print(table)
    for doubt in loaded.warnings:
        out.print(f"[yellow]note[/] {escape(doubt)}", soft_wrap=True)


def proof(found: Any) -> None:
    """Print how far each state is from float64."""
    table = _table("state", "rel. L2", "limit", "share", "verdict", title="against float64")
    for row in found.agreements:
        limit = max(row.bound.rel_l2.values())
        colour = COLOURS[row.state]
        table.add_row(
            escape(row.name), f"{row.rel_l2:.1e}", f"{limit:.1e}", f"{row.worst:.2f}", f"[{colour}]{row.state}[/]"
        )
    out.print(table)
    if found.modules:
        worst = max(found.modules.values())
        out.print(f"{len(found.modules)} re-parameterised blocks alone: worst {worst:.1e}, limit 1.0e-12")
    ties, flips = sum(a.ties for a in found.agreements), sum(a.flips for a in found.agreements)
    if ties or flips:
        out.print(f"top-1: {flips} flipped, {ties} between classes too close to tell apart")
    if found.doubt:
        out.print(f"[yellow]note[/] {escape(found.doubt)}", soft_wrap=True)
    if found.state == "rejected":
        out.print(f"[red]why[/]  {escape(found.sentence)}", soft_wrap=True)


def latency(found: Any) -> None:
    """Print one row a backend and batch, medians with their intervals."""
    table = _table("backend", "batch", "p50 ms", "p90 ms", "p99 ms", "ratio", title="latency")
    for row in found.bench.rows:
        alone = "baseline" if row.backend == found.bench.baseline else "–"
        ratio = _quantile(row.ratio.median, 2) if row.ratio else alone
        table.add_row(
            row.backend,
            str(row.batch),
            _quantile(row.p50_ms),
            _quantile(row.p90_ms) if row.p90_ms else "n/a",
            _quantile(row.p99_ms) if row.p99_ms else "n/a",
            ratio,
        )
    out.print(table)
    first = found.bench.rows[0].contract
    out.print(
        f"{first.precision}, host clock, input in place, 95% intervals; ratio is time over {found.bench.baseline}'s"
    )
    for row in found.bench.rows:
        for why in row.unstable:
            out.print(f"[yellow]note[/] {row.backend}, batch {row.batch}: {escape(why)}", soft_wrap=True)
    for name, judged in found.agreements.items():
        out.print(f"{name} on {escape(found.artefacts[name])}: {escape(judged.sentence)}", soft_wrap=True)


def accuracy(steps: Sequence[Any]) -> None:
    """Print how often each step is right."""
    table = _table("step", "top-1", "right", "same as trained", title="accuracy")
    for row in steps:
        whole = row["images"]
        table.add_row(
            row["step"], f"{row['top1']:.2%}", f"{row['correct']} of {whole}", f"{row['same_as_first']} of {whole}"
        )
    out.print(table)


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
    out.print(table)


def selftest(found: Any) -> None:
    """Print each planted bug and whether the gate caught it."""
    table = _table("planted bug", "rel. L2", "first wrong block", title="selftest")
    for row in found.plants:
        caught = escape(row.caught_by) if row.caught else "[red]MISSED[/]"
        table.add_row(escape(row.bug), f"{row.rel_l2:.1e}", caught)
    out.print(table)
    out.print(f"{found.clean} correct fusions: {found.false_alarms} false alarms")


def pairs(facts: dict[str, str]) -> None:
    """Print names and values, one a line."""
    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for name, value in facts.items():
        table.add_row(f"[dim]{escape(name)}[/]", escape(value))
    out.print(table)


def _table(*heads: str, title: str) -> Table:
    """Begin a table in which a narrow terminal breaks words instead of cutting them off."""
    return Table(*(Column(head, overflow="fold") for head in heads), title=title, title_justify="left")


def _quantile(value: Any, digits: int = 2) -> str:
    if value.interval is None:
        return f"{value.value:.{digits}f}"
    low, high = value.interval
    return f"{value.value:.{digits}f}\n[dim]{low:.{digits}f}-{high:.{digits}f}[/]"


def _triple(values: Sequence[float]) -> str:
    return "/".join(f"{v:g}" for v in values)


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
