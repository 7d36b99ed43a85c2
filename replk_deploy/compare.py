"""Bench records → same, faster, slower or ambiguous, row by row.

Two runs of one file differ by more than their intervals say: a process lays out its memory anew,
an engine picks other kernels. So each side may be several records, each from a process of its own.
Of K medians, the smallest and the largest enclose the median of all processes unless all K fell on
one side of it: with a probability of 1 - 2^(1-K). The ratio lies between the smallest new over the
largest base and the largest new over the smallest base if both sides hold.

One process a side says nothing about other processes; then the interval of its own median stands in,
with a coverage of 0.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from replk_deploy import records
from replk_deploy.bench import Bench
from replk_deploy.errors import IntegrityError, ReplkError
from replk_deploy.lowerings import NONE
from replk_deploy.measurement import misquoted, row_name

Word = Literal["SAME", "FASTER", "SLOWER", "AMBIGUOUS"]
Source = Path | Bench
Key = tuple[str, str, int, bool | None]  # model, backend, batch, cuda_graph

DELTA = 0.01  # an interval within ±1% of equality is no difference
PROCESSES = 7  # a side: the smallest number whose medians enclose theirs with 97.5%, the ratio with 95%
CAUTION = 0.02  # with fewer, what stays within ±2% is not called faster or slower; an estimate, not measured
MACHINE = ("cpu", "cores_physical", "threads_usable", "cpu_quota", "governor", "torch_threads")
GPU = (
    *("gpu", "gpu_compute_capability", "gpu_driver", "gpu_driver_cuda", "gpu_ecc", "gpu_mig", "gpu_power_limit_w"),
    *("gpu_sm_mhz_set", "torch_cuda", "cudnn"),
)
RUNTIMES = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "cuda-core")
WANTED = "name a record of latencies: what replk bench --json FILE wrote, or results/bench.json of a run"
SETTINGS, NO_SETTING = "env.", "env.CUDA_VISIBLE_DEVICES"  # which GPU it was, `gpu` says


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one side showed of a row.

    Attributes:
        p50_ms: median host time of each process.
        interval_ms: from the smallest to the largest; of one process, the interval of its own median, if it has one.
        unstable: processes whose row was in doubt.
        reasons: what spoke against them, in words.
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("coverage",)

    p50_ms: tuple[float, ...]
    interval_ms: tuple[float, float] | None
    unstable: int
    reasons: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """Give the probability with which the interval holds the median of all processes."""
        return 1 - 2.0 ** (1 - len(self.p50_ms))


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One row on both sides; the ratio is new over base, below 1 is faster."""

    DERIVED: ClassVar[tuple[str, ...]] = ("name", "ratio", "interval", "coverage", "word", "why")

    model: str
    backend: str
    batch: int
    cuda_graph: bool | None
    base: Side
    new: Side
    delta: float

    @property
    def name(self) -> str:
        """Give the name that no other row has."""
        return row_name(self.model, self.backend, self.batch, self.cuda_graph)

    @property
    def ratio(self) -> float:
        """Give the median of the new medians over that of the base."""
        return statistics.median(self.new.p50_ms) / statistics.median(self.base.p50_ms)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Give the ends between which the ratio lies; None when a side has none."""
        if self.base.interval_ms is None or self.new.interval_ms is None:
            return None
        return self.new.interval_ms[0] / self.base.interval_ms[1], self.new.interval_ms[1] / self.base.interval_ms[0]

    @property
    def coverage(self) -> float:
        """Give the least probability with which the interval holds the ratio: that neither side misses."""
        return max(0.0, self.base.coverage + self.new.coverage - 1)

    @property
    def processes(self) -> int:
        """Count the processes of the side that has fewer."""
        return min(len(self.base.p50_ms), len(self.new.p50_ms))

    @property
    def word(self) -> Word:
        """Say what the interval allows to say; nothing where a side is in doubt."""
        if self.interval is None or self.unstable:
            return "AMBIGUOUS"
        low, high = self.interval
        if 1 - self.delta <= low and high <= 1 + self.delta:
            return "SAME"
        margin = CAUTION if self.processes < PROCESSES else 0.0
        if high < 1 - margin:
            return "FASTER"
        return "SLOWER" if low > 1 + margin else "AMBIGUOUS"

    def slower_than(self, limit: float) -> bool | None:
        """Tell whether the row is slower by more than a share; None where noise leaves that open."""
        if self.interval is None:
            return None
        low, high = self.interval
        if high <= 1 + limit:
            return False
        return True if low > 1 + limit and not self.unstable else None

    @property
    def unstable(self) -> bool:
        """Tell whether a process of a side was in doubt of its row."""
        return bool(self.base.unstable or self.new.unstable)

    @property
    def why(self) -> str:
        """Say why the row is ambiguous; empty when it is not."""
        if self.word != "AMBIGUOUS":
            return ""
        said = [
            f"{name} is unstable in {side.unstable} of {len(side.p50_ms)} processes: {'; '.join(side.reasons)}"
            for name, side in (("base", self.base), ("new", self.new))
            if side.unstable
        ]
        if self.interval is None:
            said.append("a side has no interval: too few rounds, raise --max-seconds")
        return ". ".join(said) or "its interval allows more than one word: run more processes, or quiet the machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two sides, row by row.

    Attributes:
        base: names of its records.
        new: names of its records.
        rows: those on both sides.
        only_in_base: names of rows without a partner.
        only_in_new: names of rows without a partner.
        max_regress: the limit given, as a share; None for none.
        doubts: what else differed, in words.
    """

    KIND: ClassVar[str] = "comparison"
    FORMAT: ClassVar[int] = 1  # 1: as first released
    DERIVED: ClassVar[tuple[str, ...]] = ("ambiguous", "regressions", "regressed", "undecided")

    base: tuple[str, ...]
    new: tuple[str, ...]
    rows: tuple[Compared, ...]
    only_in_base: tuple[str, ...]
    only_in_new: tuple[str, ...]
    delta: float
    max_regress: float | None
    doubts: tuple[str, ...]

    @property
    def ambiguous(self) -> tuple[str, ...]:
        """Name the rows that need more processes or a quieter machine."""
        return tuple(row.name for row in self.rows if row.word == "AMBIGUOUS")

    @property
    def regressions(self) -> tuple[str, ...]:
        """Name the rows that are slower by more than the limit for certain."""
        return self._slower(certain=True)

    @property
    def undecided(self) -> tuple[str, ...]:
        """Name the rows that may be slower by more than the limit: noise leaves it open."""
        return self._slower(certain=None)

    def _slower(self, *, certain: bool | None) -> tuple[str, ...]:
        limit = self.max_regress
        return () if limit is None else tuple(r.name for r in self.rows if r.slower_than(limit) is certain)

    @property
    def regressed(self) -> bool:
        """Tell whether any row passed the limit."""
        return bool(self.regressions)


def compare(
    base: Source | Sequence[Source],
    new: Source | Sequence[Source],
    *,
    max_regress: float | None = None,
    delta: float = DELTA,
) -> Comparison:
    """Compare two sides of the same contracts, machine, settings and runtimes, each one or more bench records.

    Args:
        base: each from a process of its own.
        new: each from a process of its own.
        max_regress: share by which a row may be slower, as 0.03.
        delta: share within which two rows are the same; never more than `max_regress`.

    Raises:
        IntegrityError: not a whole bench record, or one of a newer format.
        ReplkError: what had to be equal differs, a record is named twice, no row is on both sides, or the limit is
            less than so few processes can tell.
    """
    if not 0 < delta < 1 or not (max_regress is None or 0 <= max_regress < math.inf):
        raise ReplkError(
            f"a limit of {max_regress} and ±{delta} as the same make no sense", "give shares, as --max-regress 3%"
        )
    olds, news = _side(base, "base"), _side(new, "new")
    common = [key for key in _keys(olds) if key in _keys(news)]
    if not common:
        raise ReplkError(
            f"no row is on both sides: {_listed(olds)} and {_listed(news)}",
            "bench the same backends and batches on both sides",
        )
    _demand_alike((*olds, *news), common)
    if max_regress is not None:
        delta = min(delta, max_regress)
    rows = tuple(_compared(key, olds, news, delta) for key in common)
    _demand_processes(rows, max_regress)
    return Comparison(
        base=tuple(record.name for record in olds),
        new=tuple(record.name for record in news),
        rows=rows,
        only_in_base=tuple(row_name(*key) for key in _keys(olds) if key not in common),
        only_in_new=tuple(row_name(*key) for key in _keys(news) if key not in common),
        delta=delta,
        max_regress=max_regress,
        doubts=(*_doubts(olds, news, common), *_open(rows, max_regress)),
    )


class _Row(NamedTuple):
    device: str
    contract: Mapping[str, Any]
    p50_ms: float
    interval_ms: tuple[float, float] | None
    unstable: tuple[str, ...]
    lowering: str


class _Record(NamedTuple):
    name: str
    environment: Mapping[str, Any]
    rows: Mapping[Key, _Row]


def _side(sources: Source | Sequence[Source], side: str) -> list[_Record]:
    listed = [sources] if isinstance(sources, Path | Bench) else list(sources)
    found, plain = [], []
    for source in listed:
        name = source.name if isinstance(source, Path) else side
        raw = (
            records.read(source, Bench.KIND, Bench.FORMAT, remedy=WANTED)
            if isinstance(source, Path)
            else records.plain(source)
        )
        if raw in plain:
            raise ReplkError(f"{name} is on one side twice", "each record must come from a process of its own")
        plain.append(raw)
        try:
            found.append(_record(name, raw))
            for said in misquoted(raw) if isinstance(source, Path) else ():
                raise IntegrityError(f"{name}: {said}", "measure again: replk bench --json FILE")
        except (KeyError, TypeError, ValueError) as exc:
            raise IntegrityError(
                f"{name} is not a whole bench record: {exc!r}", "make it again: replk bench --json FILE"
            ) from exc
    if not found:
        raise ReplkError(f"no record of the {side} side", "name at least one file a side")
    return found


def _record(name: str, raw: Mapping[str, Any]) -> _Record:
    rows = {}
    for row in raw["rows"]:
        key = (str(row.get("model", "")), str(row["backend"]), int(row["batch"]), row["contract"]["cuda_graph"])
        if key in rows:
            raise ValueError(f"two rows {row_name(*key)}")
        interval = row["p50_ms"]["interval"]
        rows[key] = _Row(
            device=row.get("device", "cpu"),  # format 1 knew nothing else
            contract=dict(row["contract"]),
            p50_ms=_time(row["p50_ms"]["value"]),
            interval_ms=(_time(interval[0]), _time(interval[1])) if interval else None,
            unstable=tuple(map(str, row["unstable"])),
            lowering=str(row.get("facts", {}).get("lowering", NONE)),
        )
    return _Record(name=name, environment=dict(raw["environment"]), rows=rows)


def _time(value: Any) -> float:
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{value} ms is no latency")
    return float(value)


def _keys(side: Sequence[_Record]) -> list[Key]:
    """Return the rows that any record of a side has, in order."""
    return list(dict.fromkeys(key for record in side for key in record.rows))


def _listed(side: Sequence[_Record]) -> str:
    return ", ".join(row_name(*key) for key in _keys(side)) or "nothing"


def _compared(key: Key, olds: Sequence[_Record], news: Sequence[_Record], delta: float) -> Compared:
    model, backend, batch, cuda_graph = key
    base, new = _shown(key, olds), _shown(key, news)
    return Compared(model=model, backend=backend, batch=batch, cuda_graph=cuda_graph, base=base, new=new, delta=delta)


def _shown(key: Key, side: Sequence[_Record]) -> Side:
    rows = [record.rows[key] for record in side if key in record.rows]
    medians = tuple(row.p50_ms for row in rows)
    interval = rows[0].interval_ms if len(rows) == 1 else (min(medians), max(medians))
    return Side(
        p50_ms=medians,
        interval_ms=interval,
        unstable=sum(bool(row.unstable) for row in rows),
        reasons=tuple(dict.fromkeys(reason for row in rows for reason in row.unstable)),
    )


def _demand_alike(all_records: Sequence[_Record], common: Sequence[Key]) -> None:
    """Raise ReplkError naming each field that had to be equal and is not."""
    first, *others = all_records
    gpu = any(record.rows[key].device == "cuda" for record in all_records for key in common if key in record.rows)
    differ = [
        f"{other.name} has {name} {theirs}, {first.name} {mine}"
        for other in others
        for name, mine, theirs in _settings(first.environment, other.environment, gpu=gpu)
    ]
    for key in common:
        holder, *rest = (record for record in all_records if key in record.rows)
        contract = holder.rows[key].contract
        differ += [
            f"{other.name} has {name} {theirs.get(name)} in row {row_name(*key)}, {holder.name} {contract.get(name)}"
            for other in rest
            for theirs in [other.rows[key].contract]
            for name in sorted(contract.keys() | theirs.keys())
            if contract.get(name) != theirs.get(name)
        ]
    if differ:
        raise ReplkError(
            f"not comparable: {'; '.join(differ)}",
            "measure both on one machine, with the same settings and versions: replk bench --json FILE",
        )


def _demand_processes(rows: Sequence[Compared], limit: float | None) -> None:
    """Raise ReplkError for a limit that is less than so few processes can tell."""
    few = min(row.processes for row in rows)
    if limit is not None and limit < CAUTION and few < PROCESSES:
        raise ReplkError(
            f"a limit of {limit:.2%} is less than what {few} of {PROCESSES} processes a side can tell, {CAUTION:.0%}",
            f"give {CAUTION:.0%} or more, or a folder of {PROCESSES} records a side, each from a process of its own",
        )


def _open(rows: Sequence[Compared], limit: float | None) -> Iterator[str]:
    """Say of each row that has a word why it is undecided all the same; an ambiguous one says it itself."""
    for row in rows if limit is not None else ():
        if row.word != "AMBIGUOUS" and row.interval and row.slower_than(limit or 0.0) is None:
            yield (
                f"{row.name} may be slower by more than {limit:.1%}: its interval ends at {row.interval[1]:.3f}; run"
                " more processes, or quiet the machine"
            )


def _settings(one: Mapping[str, Any], other: Mapping[str, Any], *, gpu: bool) -> Iterator[tuple[str, Any, Any]]:
    """Name what differs between two environments; a field that an older format did not have is not asked for."""
    fields = [name for name in (*MACHINE, *(GPU if gpu else ())) if name in one and name in other]
    fields += [name for name in RUNTIMES if one.get(name) is not None and other.get(name) is not None]
    fields += sorted(name for name in one.keys() | other.keys() if name.startswith(SETTINGS) and name != NO_SETTING)
    return ((name, one.get(name), other.get(name)) for name in fields if one.get(name) != other.get(name))


def _doubts(olds: Sequence[_Record], news: Sequence[_Record], common: Sequence[Key]) -> Iterator[str]:
    few = min(len(olds), len(news))
    if few < PROCESSES:
        yield (
            f"{few} processes a side: what stays within ±{CAUTION:.0%} is not called faster or slower; run"
            f" {PROCESSES} fresh processes a side"
        )
    if len({record.environment.get("gpu_id") for record in (*olds, *news)}) > 1:
        yield "the GPUs are of one kind, but not one card"
    for key in common:
        old, new = (sorted({r.rows[key].lowering for r in side if key in r.rows}) for side in (olds, news))
        if old != new:
            yield f"{row_name(*key)} has large convolutions as {', '.join(old)} in base, as {', '.join(new)} in new"
    for side in (olds, news):
        for key in common:
            count = sum(key in record.rows for record in side)
            if count < len(side):
                yield f"{row_name(*key)} is in {count} of {len(side)} records of a side"
