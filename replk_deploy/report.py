"""A finished run → Markdown that reads well in a pull request."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def markdown(run: Record) -> str:
    """Write the report of a `replk.deployment` record; pure, no clock and no file."""
    seen, checkpoint = run["inspection"], run["inspection"]["checkpoint"]
    parts = [
        f"# {checkpoint['label']}: {run['state']}",
        _model(seen),
        "## Proof",
        "Each file against the network as trained, in float64; the share is that of the allowance used.",
        _proof(run),
    ]
    if run["accuracy"]:
        parts += ["## Accuracy", _accuracy(run["accuracy"])]
    if run["bench"]:
        parts += ["## Latency", _latency(run["bench"])]
    if run["problem"]:
        parts.append(f"> {run['problem']}")
    parts += ["## Large kernels", _large(seen), "## Files", _files(run)]
    return "\n\n".join(parts) + "\n"


def _model(seen: Record) -> str:
    checkpoint = seen["checkpoint"]
    height, width = seen["size"]
    what = f"{seen['classes']} classes" if seen["classes"] else f"backbone ({', '.join(seen['outputs'])})"
    size = f"{seen['parameters'] / 1e6:.2f} M parameters, {seen['fused_macs'] / 1e9:.3f} GMAC fused at {height}x{width}"
    lines = [f"{checkpoint['file']} ({checkpoint['form']} form, {checkpoint['wrapper']}), {what}, {size}."]
    lines += [f"> {doubt}" for doubt in checkpoint["warnings"]]
    return "\n\n".join(lines)


def _proof(run: Record) -> str:
    rows = []
    for step in (run["fuse"], *run["exports"]):
        name = step["file"].rsplit("/", 1)[-1]
        for judged in (step["proof"] or {"agreements": ()})["agreements"]:
            limit = max(map(float, judged["bound"]["rel_l2"].values()))  # NaN and infinity are stored as text
            row = (
                name,
                judged["name"],
                f"{float(judged['rel_l2']):.1e}",
                f"{limit:.1e}",
                f"{float(judged['worst']):.2f}",
                judged["state"],
            )
            rows.append(row)
        verdict = step["verdict"]
        rows.append((name, "**verdict**", "", "", _share(verdict["worst"]), f"**{verdict['state']}**"))
    return _table(("file", "state", "rel. L2", "limit", "share", "verdict"), rows)


def _accuracy(steps: Sequence[Record]) -> str:
    rows = [
        (s["step"], f"{s['top1']:.2%}", f"{s['correct']} of {s['images']}", f"{s['same_as_first']} of {s['images']}")
        for s in steps
    ]
    return _table(("step", "top-1", "right", "same class as trained"), rows)


def _latency(benched: Record) -> str:
    rows, baseline = [], benched["bench"]["baseline"]
    for row in benched["bench"]["rows"]:
        p99 = row["p99_ms"]
        ratio = row["ratio"]
        rows.append(
            (
                row["backend"],
                str(row["batch"]),
                row["contract"]["precision"],
                _interval(row["p50_ms"]),
                _interval(row["p90_ms"]) if row["p90_ms"] else row["missing"]["p90_ms"],
                _interval(p99) if p99 else row["missing"]["p99_ms"],
                _interval(ratio["median"], digits=2) if ratio else ("baseline" if row["backend"] == baseline else "–"),
                str(row["n"]),
            )
        )
    head = ("backend", "batch", "precision", "p50 ms", "p90 ms", "p99 ms", "time / baseline", "samples")
    lines = [_table(head, rows)]
    doubts = [f"> {r['backend']}, batch {r['batch']}: {d}" for r in benched["bench"]["rows"] for d in r["unstable"]]
    lines += doubts + [f"> {name} skipped: {why}" for name, why in benched["skipped"].items()]
    machine = benched["bench"]["environment"]
    lines.append("Host clock, 95% order-statistic intervals, rounds A B B A. " + _machine(machine))
    return "\n\n".join(lines)


def _machine(environment: Record) -> str:
    wanted = ("cpu", "cores_physical", "torch", "onnxruntime", "python")
    return ", ".join(f"{k} {environment[k]}" for k in wanted if environment.get(k)) + "."


def _large(seen: Record) -> str:
    groups: dict[tuple[int, int, int, int], list[Record]] = {}
    for layer in seen["large"]:
        groups.setdefault((layer["channels"], *layer["map"], layer["kernel"]), []).append(layer)
    rows = [
        (
            str(len(layers)),
            f"{kernel}x{kernel}",
            str(channels),
            f"{height}x{width}",
            f"{layers[0]['macs'] / 1e6:.1f}",
            f"{layers[0]['inside_macs'] / layers[0]['macs']:.1%}",
        )
        for (channels, height, width, kernel), layers in groups.items()
    ]
    return _table(("layers", "kernel", "channels", "map", "MMAC each", "of these inside the map"), rows)


def _files(run: Record) -> str:
    checkpoint = run["inspection"]["checkpoint"]
    rows = [(checkpoint["file"], "checkpoint", f"`{checkpoint['sha256']}`")]
    rows += [
        (s["file"].rsplit("/", 1)[-1], s["verdict"]["state"], f"`{s['verdict']['content']}`")
        for s in (run["fuse"], *run["exports"])
    ]
    return _table(("file", "verdict", "SHA-256 (of the content)"), rows)


def _interval(quantile: Record, *, digits: int = 3) -> str:
    if quantile["interval"] is None:
        return f"{quantile['value']:.{digits}f}"
    low, high = quantile["interval"]
    return f"{quantile['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _share(worst: float | None) -> str:
    return "" if worst is None else f"{worst:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows])
