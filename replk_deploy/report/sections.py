"""A report → its sections: words, tables and pictures, the same for every form it is written in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from replk_deploy import charts, erf
from replk_deploy.forms import FORMS, LOWERED
from replk_deploy.precision import ALGEBRA
from replk_deploy.report.facts import Record, Report, Run

WORDS = {"pass": "PASS", "provisional": "PROVISIONAL", "unverified": "UNVERIFIED", "rejected": "FAIL", "error": "ERROR"}
LAYERS = 24  # rows of a profile that are shown, the slowest ones
MACHINE = ("cpu", "cores_physical", "gpu", "driver", "os", "python", "torch", "onnx", "onnxruntime", "replk", "git")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text under a head."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Words:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Doubt:
    """A sentence that speaks against something."""

    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to be pasted into a shell."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture, drawn where a form shows it, and what it shows in words."""

    svg: Callable[[], str]
    words: str


Part = Table | Words | Doubt | Code | Chart


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: tuple[Part, ...]


def title_of(report: Report) -> str:
    """Name the report."""
    return " · ".join(dict.fromkeys(run.label for run in report.runs))


def sentence_of(run: Run) -> str:
    """Say the verdict of a run in one sentence: why it failed, or how close it came."""
    if run.state == "error":
        return run.problem if run.code else "; ".join(f"{name} failed: {why}" for name, why in run.failures.items())
    bad = next((s for s in run.steps if s.state == run.state), None)
    if run.wrong or bad is None:
        return run.problem or moved(run)
    if run.state != "pass":
        return f"{bad.file}: {bad.why}"
    closest = max(run.steps, key=lambda s: s.worst or 0)
    return f"{len(run.steps)} files equal the network as trained; closest to its gate is {closest.file}: {closest.why}"


def moved(run: Run) -> str:
    """Say that the receptive field of the fused network is another."""
    return erf.moved(run.erf["apart"]) if run.erf else ""


def sections(report: Report) -> tuple[Section, ...]:
    """Return all sections, those with nothing to say left out."""
    found = [("Side by side", tuple(_side_by_side(report)))] if len(report.runs) > 1 else []
    for run in report.runs:
        own = f" · {run.name}" if len(report.runs) > 1 else ""
        writers = {
            "Proof": _proof,
            "Blocks": _blocks,
            "Accuracy": _accuracy,
            "Latency": _latency,
            "Layers": _layers,
            "Receptive field": _receptive,
            "Cost": _cost,
            "Files": _files,
            "Environment": _environment,
            "Reproduce": _commands,
        }
        found += [(title + own, tuple(write(run))) for title, write in writers.items()]
    return tuple(Section(title=title, parts=parts) for title, parts in found if parts)


def _side_by_side(report: Report) -> Iterator[Part]:
    rows, points, lines = [], [], []
    for run in report.runs:
        timed = run.bench["rows"] if run.bench else ()
        own = [row for row in timed if _own(row)]
        fastest = min(own, key=_per_image, default=None)
        top1 = run.accuracy[-1]["top1"] if run.accuracy else None
        rows.append(
            (
                run.name,
                WORDS[run.state],
                f"{run.inspection['parameters'] / 1e6:.2f}" if run.inspection else "–",
                f"{run.inspection['fused_macs'] / 1e9:.3f}" if run.inspection else "–",
                "–" if top1 is None else f"{top1:.2%}",
                f"{_per_image(fastest):.3f}" if fastest else "–",
                fastest["name"] if fastest else "–",
            )
        )
        if fastest and top1 is not None:
            points.append((run.name, _per_image(fastest), top1))
        elif fastest:
            lines.append((run.name, _per_image(fastest)))
        lines += [(row["name"], _per_image(row)) for row in timed if row not in own]
    head = ("run", "verdict", "M parameters", "GMAC", "top-1", "ms / image", "on")
    yield Table(head=head, rows=tuple(rows))
    if points or lines:
        yield Chart(
            partial(charts.peers, points, lines),
            "Accuracy against latency; dashed: networks whose accuracy is not known.",
        )
    machines = {tuple(run.bench["environment"].get(k) for k in ("cpu", "gpu")) for run in report.runs if run.bench}
    if len(machines) > 1:
        yield Doubt("These runs were timed on unlike machines: their latencies do not compare.")


def _own(row: Record) -> bool:
    """Tell a row of the run's own network, in whatever form, from that of a baseline."""
    return row["model"] in {"", LOWERED, *FORMS}


def _per_image(row: Record) -> float:
    return float(row["p50_ms"]["value"]) / int(row["batch"])


def _proof(run: Run) -> Iterator[Part]:
    yield Words(
        "Each file against the network as trained, in float64. The error is that of the worst image; the share is that"
        " of the allowance, 1 is the gate."
    )
    rows = []
    for step in run.steps:
        rows.append((step.file, WORDS[step.state], "" if step.worst is None else f"{step.worst:.2f}", "", ""))
        rows += [
            (f"– {c.name}", WORDS[c.state], f"{c.share:.2f}", f"{c.error:.1e}", f"{c.gate:.1e}") for c in step.checks
        ]
    yield Table(head=("file and comparison", "verdict", "share", "rel. L2", "gate"), rows=tuple(rows))
    drawn = [(_short(f"{Path(s.file).stem} · {c.name}"), c.error, c.gate) for s in run.steps for c in s.checks]
    if drawn:
        yield Chart(partial(charts.errors, drawn), "The error of every comparison, and its gate.")
    for step in run.steps:
        if step.state != "pass":
            yield Doubt(f"{step.file}: {step.why}")
    if run.problem:
        yield Doubt(run.problem)


def _blocks(run: Run) -> Iterator[Part]:
    for step in run.steps:
        if step.modules:
            worst = max(step.modules, key=lambda name: step.modules[name])
            yield Words(
                f"{len(step.modules)} re-parameterised blocks of {step.file}, each alone in float64;"
                f" the worst is {worst} with {step.modules[worst]:.1e}."
            )
            yield _per_block([(name, error, ALGEBRA) for name, error in step.modules.items()])
        if step.blocks:
            yield Words(f"{step.file} block by block, each fed what the reference feeds its own:")
            yield _per_block([(b["block"], float(b["rel_l2"]), float(b["limit"])) for b in step.blocks])


def _per_block(rows: Sequence[tuple[str, float, float]]) -> Chart:
    return Chart(partial(charts.errors, rows), "The error of every block alone, and its gate.")


def _accuracy(run: Run) -> Iterator[Part]:
    if run.accuracy:
        rows = tuple(
            (
                a["step"],
                f"{a['top1']:.2%}",
                f"{a['correct']} of {a['images']}",
                f"{a['same_as_first']} of {a['images']}",
            )
            for a in run.accuracy
        )
        yield Table(head=("step", "top-1", "right", "same class as trained"), rows=rows)


def _latency(run: Run) -> Iterator[Part]:
    if not run.bench:
        return
    timed = run.bench["rows"]
    rows = tuple(
        (
            row["name"],
            row["contract"]["precision"],
            interval(row["p50_ms"]),
            interval(row["p90_ms"]) if row["p90_ms"] else row["missing"]["p90_ms"],
            interval(row["p99_ms"]) if row["p99_ms"] else row["missing"]["p99_ms"],
            interval(row["ratio"]["median"], digits=2) if row["ratio"] else "–",
            str(row["n"]),
        )
        for row in timed
    )
    head = ("row", "precision", "p50 ms", "p90 ms", "p99 ms", "time / baseline", "samples")
    yield Table(head=head, rows=rows)
    yield Words(
        f"Host clock, 95% order-statistic intervals, rounds A B B A; no sample is dropped. Baseline:"
        f" {run.bench['baseline']}."
    )
    drawn = [(row["name"], row["samples_ms"], _marks(row["p50_ms"]), _marks(row["p99_ms"])) for row in timed]
    yield Chart(partial(charts.latencies, drawn), "All samples of every row (heights are square roots of counts).")
    series: dict[str, list[tuple[int, float]]] = {}
    for row in timed:
        graph = " graph" if row["contract"]["cuda_graph"] else ""
        rate = (row["throughput"] or {}).get("images_per_s") or row["images_per_s_from_p50"]
        if rate:
            series.setdefault(f"{row['model']} {row['backend']}{graph}".strip(), []).append((row["batch"], rate))
    curves = [(name, sorted(points)) for name, points in series.items()]
    if any(len(points) > 1 for _, points in curves):
        yield Chart(
            partial(charts.throughput, curves),
            "Images a second against batch: measured with work in flight on a GPU, batch over median elsewhere.",
        )
    doubts: dict[str, list[str]] = {}
    for row in timed:
        for doubt in row["unstable"]:
            doubts.setdefault(doubt, []).append(row["name"])
    yield from (Doubt(f"{', '.join(names)}: {doubt}") for doubt, names in doubts.items())
    known = {step.sha256 for step in run.steps}
    for row in timed:
        if _own(row) and row["facts"].get("sha256") not in {None, *known}:
            yield Doubt(f"{row['name']}: it timed a file that this run no longer holds: measure again")
    for name, why in {**run.skipped, **run.failures}.items():
        yield Doubt(f"{name}: {why}")


def _marks(quantile: Record | None) -> tuple[float, ...]:
    if quantile is None:
        return ()
    value = quantile["value"]
    return (value, *(quantile["interval"] or (value, value)))


def _layers(run: Run) -> Iterator[Part]:
    for profile in run.profiles:
        slowest = sorted(profile["layers"], key=lambda layer: -layer["ms"]["value"])[:LAYERS]
        batch = profile["shape"][0]
        yield Words(f"{profile['backend']} {profile['precision']}, batch {batch}. {profile['sentence']}")
        yield Chart(
            partial(
                charts.layers, [(_short(x["name"]), x["ms"]["value"], x["attainable_ms"], x["large"]) for x in slowest]
            ),
            f"The {len(slowest)} slowest of {len(profile['layers'])} layers.",
        )
        rows = tuple(
            (
                layer["name"],
                "large" if layer["large"] else layer["kind"],
                f"{layer['ms']['value']:.3f}",
                f"{layer['share']:.1%}",
                f"{layer['inside_macs'] / 1e6:.1f}",
                f"{layer['ratio']:.1f}x" if layer["ratio"] else "–",
            )
            for layer in slowest
        )
        yield Table(head=("layer", "kind", "ms", "share", "MMAC inside", "over roofline"), rows=rows)


def _receptive(run: Run) -> Iterator[Part]:
    if not run.erf:
        return
    height, width = run.erf["size"]
    yield Words(
        f"Which pixels the centre of the last feature map depends on, over {run.erf['images']} images of"
        f" {height}x{width} ({run.erf['shown']}). Fusion moved the map by {float(run.erf['apart']):.1e}."
    )
    if moved(run):
        yield Doubt(moved(run))
    yield Chart(
        partial(charts.fields, [(f["network"], f["cells"]) for f in run.erf["fields"]]),
        "Effective receptive field as trained and as fused.",
    )
    rows = tuple(
        (f["network"], *(f"{s['height']}x{s['width']} = {s['area']:.1%}" for s in f["squares"]))
        for f in run.erf["fields"]
    )
    shares = tuple(f"holds {s['share']:.0%}" for s in run.erf["fields"][0]["squares"])
    yield Table(head=("network", *shares), rows=rows)


def _cost(run: Run) -> Iterator[Part]:
    seen = run.inspection
    if not seen:
        return
    height, width = seen["size"]
    facts = {
        "parameters": f"{seen['parameters']:,}",
        f"MACs at {height}x{width}, as trained": f"{seen['macs']:,}",
        "of these inside the map": f"{seen['inside_macs']:,}",
        "MACs fused": f"{seen['fused_macs']:,}",
        "classes": str(seen["classes"]) if seen["classes"] else f"a backbone ({', '.join(seen['outputs'])})",
    }
    yield Table(head=("", "one image"), rows=tuple(facts.items()))
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for layer in seen["large"]:
        groups.setdefault((layer["kernel"], layer["channels"], *layer["map"]), []).append(layer)
    rows = tuple(
        (
            f"{kernel}x{kernel}",
            str(channels),
            f"{high}x{wide}",
            str(len(alike)),
            f"{alike[0]['macs'] / 1e6:.1f}",
            f"{alike[0]['inside_macs'] / alike[0]['macs']:.1%}",
        )
        for (kernel, channels, high, wide), alike in groups.items()
    )
    yield Table(head=("kernel", "channels", "map", "layers", "MMAC each", "inside the map"), rows=rows)
    for warning in seen["checkpoint"]["warnings"]:
        yield Doubt(warning)


def _files(run: Run) -> Iterator[Part]:
    rows = [(s.file, WORDS[s.state], "–" if s.bytes is None else f"{s.bytes:,}", s.sha256) for s in run.steps]
    if run.inspection:
        checkpoint = run.inspection["checkpoint"]
        rows.insert(0, (checkpoint["file"], "checkpoint", "–", checkpoint["sha256"]))
    yield Table(head=("file", "verdict", "bytes", "SHA-256"), rows=tuple(rows))


def _environment(run: Run) -> Iterator[Part]:
    if run.bench:
        facts: Mapping[str, Any] = run.bench["environment"]
        first = [k for k in MACHINE if facts.get(k) is not None]
        names = [*first, *(k for k in facts if k not in first and k != "gpu_why")]
        rows = tuple((name, str(facts[name])) for name in names if facts[name] is not None)
        yield Table(head=("machine and versions", ""), rows=rows)


def _commands(run: Run) -> Iterator[Part]:
    if run.commands:
        yield Code(run.commands)


def interval(quantile: Record, *, digits: int = 3) -> str:
    """Write a quantile and its interval."""
    if quantile["interval"] is None:
        return f"{quantile['value']:.{digits}f}"
    low, high = quantile["interval"]
    return f"{quantile['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _short(name: str) -> str:
    """Shorten a name for the side of a picture."""
    most = 34
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"
