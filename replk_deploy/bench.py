"""Open backends → latencies, every sample kept.

Contestants run in rounds A B C C B A, one at a time, so that a machine that slowly gets faster or
slower does the same to all. A round gives one ratio to the baseline; the median of the ratios and
its interval are the comparison. No sample is ever dropped: the tail is part of what users feel.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from replk_deploy import machine
from replk_deploy.backends.base import Array, Backend, Launch
from replk_deploy.errors import ContractError, ReplkError
from replk_deploy.precision import Precision
from replk_deploy.progress import Progress, silent
from replk_deploy.quantiles import Quantile, autocorrelation, quantile

Clock = Callable[[], int]  # nanoseconds, never backwards

WARM_MS, WARM_CAP_MS, WARM_SPREAD = 500.0, 10_000.0, 0.01
WINDOW_MS = 100.0
REWARM_MS = 50.0  # caches and clocks after another contestant's block
BLOCK_MS, BLOCK_MANY, BLOCK_FEW, SLOW_MS = 200.0, 30, 3, 100.0
ROUNDS = 6  # the smallest number whose median has a 95% interval
TARGET = 0.005  # half-width of the interval of the median at which a measurement is settled
NEEDED = {50: 6, 90: 36, 99: 500}  # samples without which a percentile is not given
FAR = 3.0  # interquartile ranges beyond a quartile; such samples are flagged, and kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What was inside the clock; numbers under different contracts never share a ratio."""

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
class Contestant:
    """One backend at one batch, ready to be timed; `launches` hold distinct inputs that take turns."""

    backend: str
    launches: tuple[Launch, ...]
    contract: Contract
    facts: Mapping[str, str]
    load_s: float | None = None
    prepare_s: float | None = None
    first_inference_ms: float | None = None


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
    """Time over the baseline's, one value a round; below 1 is faster."""

    DERIVED: ClassVar[tuple[str, ...]] = ("median",)

    baseline: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> Quantile:
        """Give the median of the rounds with its interval."""
        return quantile(self.rounds, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One row: every sample of one backend at one batch, and what follows from them.

    Attributes:
        samples_ms: host time of each inference, in the order taken.
        blocks: index of the block of each sample; two consecutive blocks are one round.
        windows: index of the stretch of about 100 ms of each sample.
        gpu_ms: device time; None on a CPU.
        ratio: None for the baseline and for a contract that differs from the baseline's.
        capped: the time ran out before the median was known well enough.
    """

    DERIVED: ClassVar[tuple[str, ...]] = (
        *("n", "rounds", "p50_ms", "p90_ms", "p99_ms", "missing", "min_ms", "max_ms", "mean_ms", "iqr_ms"),
        *("autocorrelation", "images_per_s_from_p50", "flags", "unstable"),
    )

    backend: str
    batch: int
    contract: Contract
    facts: Mapping[str, str]
    load_s: float | None
    prepare_s: float | None
    first_inference_ms: float | None
    warmup: WarmUp
    samples_ms: tuple[float, ...]
    blocks: tuple[int, ...]
    windows: tuple[int, ...]
    gpu_ms: tuple[float, ...] | None = None
    percentiles: tuple[int, ...]
    ratio: Ratio | None
    capped: bool

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
        """Give the median; its interval is the wider of those over samples and over block medians."""
        medians = block_medians(self.samples_ms, self.blocks)
        return quantile(self.samples_ms, 0.5).wider(quantile(medians, 0.5))

    @property
    def p90_ms(self) -> Quantile | None:
        """Give the 90th percentile; None below 36 samples."""
        return self._tail(90)

    @property
    def p99_ms(self) -> Quantile | None:
        """Give the 99th percentile; None below 500 samples."""
        return self._tail(99)

    def _tail(self, percent: int) -> Quantile | None:
        return quantile(self.samples_ms, percent / 100) if self.n >= NEEDED[percent] else None

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
    def images_per_s_from_p50(self) -> float | None:
        """Give batch over median latency, one batch in flight; this is not a throughput."""
        return 1e3 * self.batch / self.p50_ms.value if self.p50_ms.value > 0 else None

    @property
    def flags(self) -> Mapping[str, tuple[int, ...]]:
        """Name the samples far from the rest, by index; they count like all others."""
        low, high = np.quantile(self.samples_ms, (0.25, 0.75))
        margin = FAR * (high - low)
        return {"far": tuple(i for i, x in enumerate(self.samples_ms) if not low - margin <= x <= high + margin)}

    @property
    def unstable(self) -> tuple[str, ...]:
        """Say in words what speaks against the numbers; empty when nothing does."""
        doubts = []
        if not self.warmup.converged:
            doubts.append(
                f"warm-up did not settle in {self.warmup.seconds:.1f} s: its last windows differ by"
                f" {self.warmup.spread:.1%}. Is the machine shared?"
            )
        if self.capped:
            width = self.p50_ms.half_width
            known = "with no interval" if width is None else f"to ±{width:.2%}"
            doubts.append(
                f"time ran out after {self.rounds} rounds: the median is known {known}, wanted ±{TARGET:.1%} in"
                f" {ROUNDS} rounds. Raise --max-seconds, or quiet the machine"
            )
        doubts += [f"p{p} has too few samples: {self.n} of {NEEDED[p]}" for p in self.percentiles if self.n < NEEDED[p]]
        return tuple(doubts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Latencies of contestants that ran together, and the machine they ran on."""

    KIND: ClassVar[str] = "bench"
    FORMAT: ClassVar[int] = 1

    environment: Mapping[str, str | int | float | bool | None]
    baseline: str
    max_seconds: float
    rows: tuple[Measurement, ...]


def enter(
    backend: Backend, batches: Sequence[Array], *, load_s: float | None = None, clock: Clock = time.perf_counter_ns
) -> Contestant:
    """Prepare an open backend for distinct batches of one shape, and time its first inference apart.

    Raises:
        ReplkError: no batch, batches of unlike shapes, or one that the backend does not take.
    """
    if not batches or len({(batch.shape, batch.dtype) for batch in batches}) != 1:
        raise ReplkError("a contestant needs one or more batches of one shape", "pass batches of equal shape and type")
    start = clock()
    launches = tuple(backend.prepare(batch) for batch in batches)
    prepared = clock()
    first_ms = _once(launches[0], clock)
    raw = backend.input.dtype == "uint8"
    contract = Contract(
        pre_post=raw,
        batch=len(batches[0]),
        shape=batches[0].shape,
        dynamic_shapes=None in backend.input.shape,
        precision=backend.precision,
        layout="nhwc" if raw else "nchw",
        rotate=len(batches),
    )
    return Contestant(
        backend=backend.name,
        launches=launches,
        contract=contract,
        facts=backend.facts,
        load_s=load_s,
        prepare_s=(prepared - start) / 1e9,
        first_inference_ms=first_ms,
    )


def measure(
    contestants: Sequence[Contestant],
    *,
    baseline: str | None = None,
    percentiles: tuple[int, ...] = (50, 90),
    max_seconds: float = 60.0,
    clock: Clock = time.perf_counter_ns,
    progress: Progress = silent,
) -> Bench:
    """Time contestants in turns until each median is known to ±0.5%, or the time is up.

    Args:
        contestants: unlike in backend or batch.
        baseline: backend whose row of the same contract the others are divided by; the first by default.
        percentiles: of 50, 90 and 99; enough samples are taken for each.
        max_seconds: of timed rounds, per contestant; no round starts that would probably pass it,
            but the first is always finished.
        clock: host clock in nanoseconds.
        progress: told after each warm-up and each round.

    Raises:
        ReplkError: no contestant, two alike, or a baseline that is not among them.
    """
    names = [(c.backend, c.contract.batch) for c in contestants]
    chosen = baseline if baseline is not None else next(iter(names), ("", 0))[0]
    if not contestants or len(set(names)) != len(names) or chosen not in {name for name, _ in names}:
        raise ReplkError(
            f"cannot race {names} against {chosen!r}", "name each backend and batch once, and a baseline among them"
        )
    if not set(percentiles) <= NEEDED.keys():
        raise ReplkError(f"percentiles {percentiles} are not all known", f"choose from {', '.join(map(str, NEEDED))}")
    if not max_seconds > 0:
        raise ReplkError(f"{max_seconds} seconds are no time", "give --max-seconds above 0")
    environment = machine.environment()
    lanes = [_Lane(c, clock) for c in contestants]
    for done, lane in enumerate(lanes, start=1):
        lane.warm_up()
        progress("warm-up", done, len(lanes))
    limit_ns = max_seconds * len(lanes) * 1e9
    start, longest, done = clock(), 0, 0
    while True:
        begun = clock()
        for lane in (*lanes, *reversed(lanes)):
            lane.block()
        longest, done = max(longest, clock() - begun), done + 1
        progress("bench", done, None)
        settled = [done >= ROUNDS and lane.settled(percentiles) for lane in lanes]
        if all(settled) or clock() - start + longest > limit_ns:
            break
    rows = tuple(
        lane.row(_ratio(lane, lanes, chosen), percentiles, capped=not ok)
        for lane, ok in zip(lanes, settled, strict=True)
    )
    return Bench(environment=environment, baseline=chosen, max_seconds=max_seconds, rows=rows)


def block_medians(samples_ms: Sequence[float], blocks: Sequence[int]) -> tuple[float, ...]:
    """Return the median of each block, in order."""
    pairs = itertools.groupby(zip(blocks, samples_ms, strict=True), key=lambda pair: pair[0])
    return tuple(float(np.median([sample for _, sample in group])) for _, group in pairs)


class _Lane:
    """What one contestant has shown so far."""

    def __init__(self, contestant: Contestant, clock: Clock) -> None:
        self.contestant, self._clock = contestant, clock
        self._turns: Iterator[Launch] = itertools.cycle(contestant.launches)
        self._warmup: WarmUp | None = None
        self.samples: list[float] = []
        self.blocks: list[int] = []
        self.windows: list[int] = []

    def warm_up(self) -> None:
        """Run until the last three windows agree, or the cap is reached."""
        curve: list[float] = []
        start = self._clock()
        while True:
            curve.append(float(np.median(self._window(WINDOW_MS))))
            spent_ms = (self._clock() - start) / 1e6
            shown = WarmUp(curve_ms=tuple(curve), seconds=spent_ms / 1e3, converged=False)
            steady = len(curve) >= 3 and spent_ms >= WARM_MS and shown.spread <= WARM_SPREAD  # noqa: PLR2004
            if steady or spent_ms >= WARM_CAP_MS:
                self._warmup = WarmUp(curve_ms=shown.curve_ms, seconds=shown.seconds, converged=steady)
                return

    def block(self) -> None:
        """Take one block of samples, after a short re-warm."""
        self._window(REWARM_MS)
        index = self.blocks[-1] + 1 if self.blocks else 0
        window = self.windows[-1] + 1 if self.windows else 0
        start, taken = self._clock(), 0
        usual_ms = self._warm().curve_ms[-1]
        wanted = BLOCK_FEW if usual_ms > SLOW_MS else BLOCK_MANY
        while taken < wanted or (self._clock() - start) / 1e6 < BLOCK_MS:
            stretch = int((self._clock() - start) / 1e6 // WINDOW_MS)
            self.samples.append(_once(next(self._turns), self._clock))
            self.blocks.append(index)
            self.windows.append(window + stretch)
            taken += 1

    def settled(self, percentiles: tuple[int, ...]) -> bool:
        """Tell whether the median is known well enough, and each percentile has its samples."""
        medians = quantile(block_medians(self.samples, self.blocks), 0.5)
        width = quantile(self.samples, 0.5).wider(medians).half_width
        return width is not None and width <= TARGET and all(len(self.samples) >= NEEDED[p] for p in percentiles)

    def row(self, ratio: Ratio | None, percentiles: tuple[int, ...], *, capped: bool) -> Measurement:
        """Write down what was seen."""
        c = self.contestant
        return Measurement(
            backend=c.backend,
            batch=c.contract.batch,
            contract=c.contract,
            facts=c.facts,
            load_s=c.load_s,
            prepare_s=c.prepare_s,
            first_inference_ms=c.first_inference_ms,
            warmup=self._warm(),
            samples_ms=tuple(self.samples),
            blocks=tuple(self.blocks),
            windows=tuple(self.windows),
            percentiles=percentiles,
            ratio=ratio,
            capped=capped,
        )

    def round_means(self) -> tuple[float, ...]:
        """Return, per round, the mean of its two block medians."""
        medians = block_medians(self.samples, self.blocks)
        return tuple((a + b) / 2 for a, b in zip(medians[::2], medians[1::2], strict=True))

    def _window(self, length_ms: float) -> list[float]:
        start = self._clock()
        times: list[float] = []
        while not times or (self._clock() - start) / 1e6 < length_ms:
            times.append(_once(next(self._turns), self._clock))
        return times

    def _warm(self) -> WarmUp:
        if self._warmup is None:
            raise ContractError("a block was taken before the warm-up")
        return self._warmup


def _once(launch: Launch, clock: Clock) -> float:
    start = clock()
    launch.enqueue()
    launch.wait()
    return (clock() - start) / 1e6


def _ratio(lane: _Lane, lanes: Sequence[_Lane], baseline: str) -> Ratio | None:
    contract = lane.contestant.contract
    base = next((b for b in lanes if b.contestant.backend == baseline and b.contestant.contract == contract), None)
    if base is None or base is lane:
        return None
    pairs = zip(lane.round_means(), base.round_means(), strict=True)
    return Ratio(baseline=baseline, rounds=tuple(own / other for own, other in pairs))
