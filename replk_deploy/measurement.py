"""One row of a benchmark: what was inside the clock, every sample, and what follows from them.

No sample is ever dropped: the tail is part of what users feel. Samples that were taken while the
GPU held its clocks down are flagged, and count like all others.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from replk_deploy import clocks
from replk_deploy.precision import Precision
from replk_deploy.quantiles import Quantile, autocorrelation, quantile, same

NEEDED = {50: 6, 90: 36, 99: 500}  # samples without which a percentile is not given
ROUNDS = 6  # the smallest number whose median has a 95% interval
TARGET = 0.005  # half-width of the interval of the median at which a measurement is settled
FAR = 3.0  # interquartile ranges beyond a quartile; such samples are flagged, and kept
SLOWED_SHARE = 0.2  # of the samples under clocks held down; above it a row is unstable
ENQUEUE_SHARE = 0.8  # of the device's time spent on enqueueing; above it the host sets the pace


def row_name(model: str, backend: str, batch: int, cuda_graph: bool | None) -> str:  # noqa: FBT001  # the four of a row
    """Name a row by what tells it from the others: `convnext-b trt b8 graph`."""
    return " ".join(filter(None, (model, backend, f"b{batch}", "graph" if cuda_graph else "")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What was inside the clock; numbers under different contracts never share a ratio.

    Attributes:
        sync: how a caller waits: `return` where enqueue comes back with the answer done, else CUDA's way.
        cuda_graph: whether a captured graph was replayed; None on a CPU.
    """

    clock: Literal["host"] = "host"
    inputs: Literal["device", "host"] = "device"
    copies: bool = False
    pre_post: bool
    batch: int
    shape: tuple[int, ...]
    dynamic_shapes: bool
    precision: Precision
    tf32: bool = False
    layout: Literal["nchw", "nhwc"]
    in_flight: int = 1
    sync: Literal["return", "spin", "block"] = "return"
    cuda_graph: bool | None = None
    l2: Literal["hot", "cold"] = "hot"
    rotate: int
    idle_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """How a contestant came up to speed: the median of each window, until the last three agree."""

    curve_ms: tuple[float, ...]
    seconds: float
    converged: bool

    @property
    def spread(self) -> float:
        """Give the distance between the last three windows, as a share of the largest."""
        last = self.curve_ms[-3:]
        return (max(last) - min(last)) / max(last) if max(last) > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Time over the baseline's, one value a round; below 1 is faster. `baseline` names its row."""

    DERIVED: ClassVar[tuple[str, ...]] = ("median",)

    baseline: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> Quantile:
        """Give the median of the rounds with its interval."""
        return quantile(self.rounds, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What the GPU's clocks did while a row was taken.

    Attributes:
        reference_mhz: median SM clock at the end of the row's own warm-up.
        windows_mhz: median SM clock of each window; None where nothing was read.
        slowed: index of a window → how its clocks were held down; it was taken again, and its samples stay.
        events: reason for clocks not being higher → windows in which it was seen.
        others: most compute processes beside ours.
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("median_mhz",)

    reference_mhz: float | None
    windows_mhz: tuple[float | None, ...]
    slowed: Mapping[int, str]
    events: Mapping[str, int]
    others: int | None

    @property
    def median_mhz(self) -> float | None:
        """Give the median SM clock."""
        return clocks.median(self.windows_mhz)


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Images a second with a full queue: `launches` started one after another, one wait at the end."""

    DERIVED: ClassVar[tuple[str, ...]] = ("images_per_s",)

    launches: int
    images: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        """Give images over seconds."""
        return self.images / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One row: every sample of one network on one backend at one batch, and what follows from them.

    Attributes:
        model: label of the network; empty where only one takes part.
        samples_ms: host time of each inference, in the order taken.
        blocks: index of the block of each sample; two consecutive blocks are one round.
        windows: index of the stretch of about 100 ms of each sample.
        gpu_ms: device time of each inference, between two events; None on a CPU.
        enqueue_ms: host time until each inference was handed over; None on a CPU.
        pace: None where no clock could be read.
        throughput: None on a CPU, where enqueue returns when done, and for paced load.
        ratio: None for the baseline and for a contract that differs from the baseline's.
        capped: the time ran out before the median was known well enough.
        left: why it left the race after its last finished round; None when it stayed.
    """

    DERIVED: ClassVar[tuple[str, ...]] = (
        *("name", "n", "rounds", "p50_ms", "p90_ms", "p99_ms", "gpu_p50_ms", "gpu_p90_ms", "gpu_p99_ms", "missing"),
        *("min_ms", "max_ms", "mean_ms", "iqr_ms", "autocorrelation", "enqueue_share", "gpu_kcycles"),
        *("images_per_s_from_p50", "flags", "notes", "unstable"),
    )

    model: str
    backend: str
    batch: int
    device: Literal["cpu", "cuda"]
    contract: Contract
    facts: Mapping[str, str]
    load_s: float | None
    prepare_s: float | None
    first_inference_ms: float | None
    memory_mib: Mapping[str, float]
    warmup: WarmUp
    samples_ms: tuple[float, ...]
    blocks: tuple[int, ...]
    windows: tuple[int, ...]
    gpu_ms: tuple[float, ...] | None
    enqueue_ms: tuple[float, ...] | None
    pace: Pace | None
    throughput: Throughput | None
    percentiles: tuple[int, ...]
    ratio: Ratio | None
    capped: bool
    left: str | None

    @property
    def name(self) -> str:
        """Give the name that no other row of the race has."""
        return row_name(self.model, self.backend, self.batch, self.contract.cuda_graph)

    @property
    def n(self) -> int:
        """Count the samples."""
        return len(self.samples_ms)

    @property
    def rounds(self) -> int:
        """Count the finished rounds."""
        return (self.blocks[-1] + 1) // 2

    @property
    def p50_ms(self) -> Quantile:
        """Give the median; its interval encloses those over samples and over block medians."""
        return _median(self.samples_ms, self.blocks)

    @property
    def p90_ms(self) -> Quantile | None:
        """Give the 90th percentile; None below 36 samples."""
        return _tail(self.samples_ms, 90)

    @property
    def p99_ms(self) -> Quantile | None:
        """Give the 99th percentile; None below 500 samples."""
        return _tail(self.samples_ms, 99)

    @property
    def gpu_p50_ms(self) -> Quantile | None:
        """Give the median device time, with its interval as for the host's; None on a CPU."""
        return None if self.gpu_ms is None else _median(self.gpu_ms, self.blocks)

    @property
    def gpu_p90_ms(self) -> Quantile | None:
        """Give the 90th percentile of the device time; None on a CPU and below 36 samples."""
        return None if self.gpu_ms is None else _tail(self.gpu_ms, 90)

    @property
    def gpu_p99_ms(self) -> Quantile | None:
        """Give the 99th percentile of the device time; None on a CPU and below 500 samples."""
        return None if self.gpu_ms is None else _tail(self.gpu_ms, 99)

    @property
    def missing(self) -> Mapping[str, str]:
        """Say why a percentile is not given."""
        return {f"p{p}_ms": f"n/a (n={self.n}, needs {NEEDED[p]})" for p in (90, 99) if self.n < NEEDED[p]}

    @property
    def min_ms(self) -> float:
        """Give the shortest sample."""
        return min(self.samples_ms)

    @property
    def max_ms(self) -> float:
        """Give the longest sample."""
        return max(self.samples_ms)

    @property
    def mean_ms(self) -> float:
        """Give the mean of all samples."""
        return float(np.mean(self.samples_ms))

    @property
    def iqr_ms(self) -> float:
        """Give the distance between the quartiles."""
        low, high = np.quantile(self.samples_ms, (0.25, 0.75))
        return float(high - low)

    @property
    def autocorrelation(self) -> float | None:
        """Give the lag-1 autocorrelation; near 0 when samples are independent."""
        return autocorrelation(self.samples_ms)

    @property
    def enqueue_share(self) -> float | None:
        """Give the median time to enqueue over the median device time; None on a CPU."""
        gpu = self.gpu_p50_ms
        if gpu is None or self.enqueue_ms is None or not gpu.value > 0:
            return None
        return float(np.median(self.enqueue_ms)) / gpu.value

    @property
    def gpu_kcycles(self) -> float | None:
        """Give median device time times median SM clock, in thousands of cycles: it outlives a drift of the clock."""
        mhz = self.pace.median_mhz if self.pace else None
        return None if self.gpu_p50_ms is None or mhz is None else self.gpu_p50_ms.value * mhz

    @property
    def images_per_s_from_p50(self) -> float | None:
        """Give batch over median latency, one batch in flight; this is not a throughput."""
        return 1e3 * self.batch / self.p50_ms.value if self.p50_ms.value > 0 else None

    @property
    def flags(self) -> Mapping[str, tuple[int, ...]]:
        """Name by index the samples far from the rest, and those under slowed clocks; all count like the others."""
        low, high = np.quantile(self.samples_ms, (0.25, 0.75))
        margin = FAR * (high - low)
        slowed = self.pace.slowed if self.pace else {}
        return {
            "far": tuple(i for i, x in enumerate(self.samples_ms) if not low - margin <= x <= high + margin),
            "slowed": tuple(i for i, window in enumerate(self.windows) if window in slowed),
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """Say in words what the numbers depend on, though they may be steady."""
        said = []
        if self.enqueue_share is not None and self.enqueue_share > ENQUEUE_SHARE:
            said.append(
                f"enqueueing takes {self.enqueue_share:.0%} of the device's time: the host sets the pace, and gaps"
                " between kernels are in gpu_ms. Replay a CUDA graph, or raise the batch"
            )
        if self.pace:
            capped = self.pace.events.get(clocks.POWER_CAP, 0)
            if capped:
                said.append(f"the power limit held the clocks in {capped} of {len(self.pace.windows_mhz)} windows")
            if self.pace.others:
                said.append(f"other compute processes on the GPU: {self.pace.others}. Have it alone, and repeat")
        return tuple(said)

    @property
    def unstable(self) -> tuple[str, ...]:
        """Say in words what speaks against the numbers; empty when nothing does."""
        doubts = []
        if not self.warmup.converged:
            doubts.append(
                f"warm-up did not settle in {self.warmup.seconds:.1f} s: its last windows differ by"
                f" {self.warmup.spread:.1%}. Is the machine shared?"
            )
        if self.left is not None:
            doubts.append(f"left after {self.rounds} rounds: {self.left}")
        if self.capped:
            width = self.p50_ms.half_width
            if self.rounds < ROUNDS:
                doubts.append(f"time ran out after {self.rounds} of {ROUNDS} rounds. Raise --max-seconds")
            elif width is None or width > TARGET:
                known = "with no interval" if width is None else f"to ±{width:.2%}"
                doubts.append(
                    f"time ran out after {self.rounds} rounds: the median is known {known}, wanted ±{TARGET:.1%}."
                    " Raise --max-seconds, or quiet the machine"
                )
        slowed = len(self.flags["slowed"])
        if slowed > SLOWED_SHARE * self.n:
            causes = ", ".join(sorted(set(self.pace.slowed.values()))) if self.pace else ""
            doubts.append(
                f"{slowed} of {self.n} samples under slowed clocks ({causes}). Cool the card, or lower its load"
            )
        doubts += [f"p{p} has too few samples: {self.n} of {NEEDED[p]}" for p in self.percentiles if self.n < NEEDED[p]]
        return tuple(doubts)


def block_medians(samples_ms: Sequence[float], blocks: Sequence[int]) -> tuple[float, ...]:
    """Return the median of each block, in order."""
    pairs = itertools.groupby(zip(blocks, samples_ms, strict=True), key=lambda pair: pair[0])
    return tuple(float(np.median([sample for _, sample in group])) for _, group in pairs)


def round_means(samples_ms: Sequence[float], blocks: Sequence[int]) -> tuple[float, ...]:
    """Return, per finished round, the mean of its two block medians."""
    medians = block_medians(samples_ms, blocks)
    return tuple((a + b) / 2 for a, b in zip(medians[::2], medians[1::2], strict=True))


def _median(samples_ms: Sequence[float], blocks: Sequence[int]) -> Quantile:
    return quantile(samples_ms, 0.5).wider(quantile(block_medians(samples_ms, blocks), 0.5))


def _tail(samples_ms: Sequence[float], percent: int) -> Quantile | None:
    return quantile(samples_ms, percent / 100) if len(samples_ms) >= NEEDED[percent] else None


def misquoted(bench: Mapping[str, Any], *, intervals: bool = False) -> Iterator[str]:
    """Say which percentiles, ratios and, where asked, intervals of a record are not those of its samples."""
    means = {row.get("name"): round_means(row["samples_ms"], row["blocks"]) for row in bench["rows"]}
    for row in bench["rows"]:
        name = row.get("name")  # format 1 had none
        for percent in NEEDED:
            said, label = row[f"p{percent}_ms"], name or row["backend"]
            is_median = percent == 50  # noqa: PLR2004
            samples = row["samples_ms"]
            found = _median(samples, row["blocks"]) if is_median else quantile(samples, percent / 100)
            if said and not same(said["value"], found.value):
                yield f"{label} says a p{percent} of {said['value']} ms, its samples {found.value} ms"
            ends, widest = (said and said["interval"]) or (), found.interval or ()
            if intervals and ends and not (len(ends) == len(widest) and all(map(same, ends, widest))):
                yield f"{label} says a p{percent} within {ends} ms, its samples {widest}"
        if row["ratio"] and row["ratio"]["baseline"] in means:  # format 1 named a backend there
            pairs = zip(means[name], means[row["ratio"]["baseline"]], strict=False)
            ratios = [own / other for own, other in pairs]
            median = quantile(ratios, 0.5).value
            stated = [*row["ratio"]["rounds"], row["ratio"]["median"]["value"]]
            if len(stated) != len(ratios) + 1 or not all(map(same, stated, [*ratios, median])):
                yield f"the ratio of {name} is not that of its samples, {median}"
