"""One contestant of a race: what it brings, how it is timed, and what it has shown so far.

Its pace is watched: a window during which the GPU's clocks were held down is taken again after a
pause, and its samples stay. What makes a window count as such is a recorded cause, never its times.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from replk_deploy import clocks
from replk_deploy.backends.base import Launch
from replk_deploy.clocks import Watch
from replk_deploy.errors import ContractError
from replk_deploy.measurement import (
    NEEDED,
    ROUNDS,
    TARGET,
    Contract,
    Measurement,
    Pace,
    Ratio,
    Throughput,
    WarmUp,
    block_medians,
    round_means,
    row_name,
)
from replk_deploy.quantiles import quantile

Clock = Callable[[], int]  # nanoseconds, never backwards
Sleep = Callable[[float], None]  # seconds

WARM_MS, WARM_CAP_MS, WARM_SPREAD = 500.0, 10_000.0, 0.01
WINDOW_MS = 100.0
REWARM_MS = 50.0  # caches and clocks after another contestant's block
BLOCK_MS, BLOCK_MANY, BLOCK_FEW, SLOW_MS = 200.0, 30, 3, 100.0
SLOW_CLOCK = 0.75  # of the SM clock that the warm-up ended with; a window below it is taken again
REPEATS, BACK_OFF_S = 3, 0.5  # of such windows in a block; the pause doubles each time
FLOW_MS, FLOW_SPARE = 2000.0, 1.1  # shortest stretch that gives a throughput; how much more is planned for


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One network on one backend at one batch, ready to be timed.

    Attributes:
        launches: distinct inputs that take turns.
        erase: empties the cache of the GPU, before each launch and outside all clocks; None leaves it as it is.
    """

    model: str = ""
    backend: str
    device: Literal["cpu", "cuda"] = "cpu"
    launches: tuple[Launch, ...]
    contract: Contract
    facts: Mapping[str, str]
    memory_mib: Mapping[str, float] = field(default_factory=dict)
    load_s: float | None = None
    prepare_s: float | None = None
    first_inference_ms: float | None = None
    erase: Callable[[], None] | None = None

    @property
    def name(self) -> str:
        """Give the name that its row will have."""
        return row_name(self.model, self.backend, self.contract.batch, self.contract.cuda_graph)


class Sample(NamedTuple):
    """Times of one inference; the device's is None on a CPU."""

    host_ms: float
    enqueue_ms: float
    gpu_ms: float | None


class _Window(NamedTuple):
    """What the clocks of the GPU did in one window; `slowed` says how they were held down."""

    mhz: float | None
    events: frozenset[str]
    others: int | None
    slowed: str | None


class Lane:
    """What one contestant has shown so far."""

    def __init__(self, contestant: Contestant, clock: Clock, sleep: Sleep, watch: Watch) -> None:
        self.contestant, self._clock, self._sleep, self._watch = contestant, clock, sleep, watch
        self._turns: Iterator[Launch] = itertools.cycle(contestant.launches)
        self._warmup: WarmUp | None = None
        self._reference_mhz: float | None = None
        self._samples: list[Sample] = []
        self._blocks: list[int] = []
        self._windows: list[int] = []
        self._seen: list[_Window] = []
        self._whole = 0  # samples of finished rounds
        self._throughput: Throughput | None = None
        self.left: str | None = None
        self.failure: str | None = None
        self.settled = False

    @property
    def rounds(self) -> int:
        """Count the finished rounds."""
        return (self._blocks[self._whole - 1] + 1) // 2 if self._whole else 0

    @property
    def queues(self) -> bool:
        """Tell whether enqueue returns before the answer is there, and inferences follow without a pause."""
        c = self.contestant
        return c.device == "cuda" and not c.contract.idle_ms and c.erase is None

    def warm_up(self) -> None:
        """Run until the last three windows agree, or the cap is reached."""
        curve: list[float] = []
        starts: list[int] = []
        start = self._clock()
        while True:
            starts.append(self._clock())
            curve.append(float(np.median([sample.host_ms for sample in self._window(WINDOW_MS)])))
            spent_ms = (self._clock() - start) / 1e6
            shown = WarmUp(curve_ms=tuple(curve), seconds=spent_ms / 1e3, converged=False)
            steady = len(curve) >= 3 and spent_ms >= WARM_MS and shown.spread <= WARM_SPREAD  # noqa: PLR2004
            if steady or spent_ms >= WARM_CAP_MS:
                self._warmup = WarmUp(curve_ms=shown.curve_ms, seconds=shown.seconds, converged=steady)
                self._reference_mhz = self._look(starts[-3:][0], self._clock()).mhz
                return

    def block(self) -> None:
        """Take one block of samples, after a short re-warm; a window under slowed clocks is taken again."""
        self._window(REWARM_MS)
        index = self._blocks[-1] + 1 if self._blocks else 0
        wanted = BLOCK_FEW if self._warm().curve_ms[-1] > SLOW_MS else BLOCK_MANY
        taken, spent_ms, repeats = 0, 0.0, 0
        while taken < wanted or spent_ms < BLOCK_MS:
            start = self._clock()
            samples = self._window(WINDOW_MS)
            end = self._clock()
            seen = self._look(start, end)
            self._samples += samples
            self._blocks += [index] * len(samples)
            self._windows += [len(self._seen)] * len(samples)
            self._seen.append(seen)
            if seen.slowed and repeats < REPEATS:
                self._sleep(BACK_OFF_S * 2**repeats)
                self._window(REWARM_MS)
                repeats += 1
            else:
                taken, spent_ms = taken + len(samples), spent_ms + (end - start) / 1e6
        if index % 2:
            self._whole = len(self._samples)

    def settle(self, percentiles: tuple[int, ...]) -> None:
        """Note whether the median is known well enough, and each percentile has its samples."""
        samples = [sample.host_ms for sample in self._samples]
        medians = quantile(block_medians(samples, self._blocks), 0.5)
        width = quantile(samples, 0.5).wider(medians).half_width
        enough = self.rounds >= ROUNDS and all(len(samples) >= NEEDED[p] for p in percentiles)
        self.settled = enough and width is not None and width <= TARGET

    def flow(self) -> None:
        """Measure images a second with a full queue over at least 2 s."""
        known = [s.gpu_ms if s.gpu_ms is not None else s.host_ms for s in self._samples]
        launches = max(2, math.ceil(FLOW_SPARE * FLOW_MS / float(np.median(known))))
        self._window(REWARM_MS)
        while True:
            start = self._clock()
            for launch in itertools.islice(self._turns, launches):
                launch.enqueue()
            for launch in self.contestant.launches:
                launch.wait()
            spent_ms = (self._clock() - start) / 1e6
            if spent_ms >= FLOW_MS:
                break
            launches = math.ceil(launches * FLOW_SPARE * FLOW_MS / max(spent_ms, 1.0))
        images = launches * self.contestant.contract.batch
        self._throughput = Throughput(launches=launches, images=images, seconds=spent_ms / 1e3)

    def row(self, ratio: Ratio | None, percentiles: tuple[int, ...]) -> Measurement:
        """Write down what was seen in finished rounds."""
        c, samples = self.contestant, self._samples[: self._whole]
        gpu = [sample.gpu_ms for sample in samples if sample.gpu_ms is not None]
        if gpu and len(gpu) != len(samples):
            raise ContractError(f"{c.name} gave {len(gpu)} device times for {len(samples)} inferences")
        windows = self._windows[: self._whole]
        return Measurement(
            model=c.model,
            backend=c.backend,
            batch=c.contract.batch,
            device=c.device,
            contract=c.contract,
            facts=c.facts,
            load_s=c.load_s,
            prepare_s=c.prepare_s,
            first_inference_ms=c.first_inference_ms,
            memory_mib=c.memory_mib,
            warmup=self._warm(),
            samples_ms=tuple(sample.host_ms for sample in samples),
            blocks=tuple(self._blocks[: self._whole]),
            windows=tuple(windows),
            gpu_ms=tuple(gpu) or None,
            enqueue_ms=tuple(sample.enqueue_ms for sample in samples) if gpu else None,
            pace=_pace(self._seen[: windows[-1] + 1], self._reference_mhz),
            throughput=self._throughput,
            percentiles=percentiles,
            ratio=ratio,
            capped=not self.settled and self.left is None,
            left=self.left,
        )

    def round_means(self) -> tuple[float, ...]:
        """Return, per finished round, the mean of its two block medians."""
        samples = [sample.host_ms for sample in self._samples[: self._whole]]
        return round_means(samples, self._blocks[: self._whole])

    def _window(self, length_ms: float) -> list[Sample]:
        idle_s = self.contestant.contract.idle_ms / 1e3
        start = self._clock()
        samples: list[Sample] = []
        while not samples or (self._clock() - start) / 1e6 < length_ms:
            if idle_s:
                self._sleep(idle_s)
            if self.contestant.erase:
                self.contestant.erase()
            samples.append(once(next(self._turns), self._clock))
        return samples

    def _look(self, start_ns: int, end_ns: int) -> _Window:
        readings = self._watch.between(start_ns, end_ns)
        mhz = clocks.median([reading.sm_mhz for reading in readings])
        events = frozenset[str]().union(*(reading.events for reading in readings))
        causes = sorted(events & clocks.HARDWARE)
        if mhz is not None and self._reference_mhz is not None and mhz < SLOW_CLOCK * self._reference_mhz:
            causes.append(f"SM clock below {SLOW_CLOCK:.0%} of the warm-up's")
        others = max((reading.others for reading in readings if reading.others is not None), default=None)
        return _Window(mhz=mhz, events=events, others=others, slowed=", ".join(causes) or None)

    def _warm(self) -> WarmUp:
        if self._warmup is None:
            raise ContractError("a block was taken before the warm-up")
        return self._warmup


def once(launch: Launch, clock: Clock) -> Sample:
    """Run one inference, and look at the clock before, in between and after."""
    start = clock()
    launch.enqueue()
    handed_over = clock()
    launch.wait()
    end = clock()
    return Sample(host_ms=(end - start) / 1e6, enqueue_ms=(handed_over - start) / 1e6, gpu_ms=launch.device_ms())


def _pace(windows: Sequence[_Window], reference_mhz: float | None) -> Pace | None:
    """Sum up the windows of a row; None when no clock was read in any."""
    if not any(window.mhz is not None or window.events for window in windows):
        return None
    return Pace(
        reference_mhz=reference_mhz,
        windows_mhz=tuple(window.mhz for window in windows),
        slowed={i: window.slowed for i, window in enumerate(windows) if window.slowed},
        events=dict(sorted(Counter(event for window in windows for event in window.events).items())),
        others=max((window.others for window in windows if window.others is not None), default=None),
    )
