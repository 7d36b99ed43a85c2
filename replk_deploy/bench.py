"""Open backends → latencies, every sample kept.

Contestants run in rounds A B C C B A, one at a time, so that a machine that slowly gets faster or
slower does the same to all. Each round has an order of its own, so that nobody always follows the
same one and finds the heat and the clocks that it left. A round gives one ratio to the baseline; the
median of the ratios and its interval are the comparison.

Clocks, device times and throughput were taken on an H100; the tests use false devices.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from replk_deploy import clocks, lanes, machine
from replk_deploy.backends.base import Array, Backend
from replk_deploy.clocks import Series, Watch
from replk_deploy.errors import ReplkError
from replk_deploy.lanes import Clock, Contestant, Lane, Sleep, once
from replk_deploy.measurement import NEEDED, ROUNDS, Contract, Measurement, Ratio
from replk_deploy.progress import Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Latencies of contestants that ran together, and the machine they ran on.

    Attributes:
        baseline: backend whose rows the others are divided by.
        baseline_model: network whose row on the same backend comes first as a divisor; None where none was named.
        failures: name of a row → why it left the race; its row is there if it had finished a round.
        gpu: what was read of the GPU from the first warm-up to the end.
    """

    KIND: ClassVar[str] = "bench"
    # 2: rows of several models, device times, clocks, throughput, memory, failures; Ratio.baseline names a row
    # 1: as first released
    FORMAT: ClassVar[int] = 2

    environment: Mapping[str, str | int | float | bool | None]
    baseline: str
    baseline_model: str | None
    max_seconds: float
    rows: tuple[Measurement, ...]
    failures: Mapping[str, str]
    gpu: Series | None


def enter(
    backend: Backend,
    batches: Sequence[Array],
    *,
    model: str = "",
    cuda_graph: bool = False,
    idle_ms: float = 0.0,
    erase: Callable[[], None] | None = None,
    load_s: float | None = None,
    clock: Clock = time.perf_counter_ns,
) -> Contestant:
    """Prepare an open backend for distinct batches of one shape, and time its first inference apart.

    Args:
        backend: open.
        batches: they take turns.
        model: label of the network, where several take part.
        cuda_graph: whether the backend was opened to replay a captured graph; means nothing on a CPU.
        idle_ms: pause before each inference, outside the clock.
        erase: empties the cache of the GPU before each inference, outside all clocks.
        load_s: what opening took.
        clock: host clock in nanoseconds.

    Raises:
        ReplkError: no batch, batches of unlike shapes, one that the backend does not take, a negative pause, or a
            cache of a CPU to empty.
    """
    if not batches or len({(batch.shape, batch.dtype) for batch in batches}) != 1:
        raise ReplkError("a contestant needs one or more batches of one shape", "pass batches of equal shape and type")
    if not (idle_ms >= 0 and math.isfinite(idle_ms)):
        raise ReplkError(f"{idle_ms} ms is no pause", "give --idle-ms 0 or more")
    if erase and backend.device != "cuda":
        raise ReplkError(f"{backend.name} runs on the CPU, whose caches nobody here can empty", "leave out --cold-l2")
    start = clock()
    launches = tuple(backend.prepare(batch) for batch in batches)
    prepared = clock()
    first = once(launches[0], clock)
    raw, cuda = backend.input.dtype == "uint8", backend.device == "cuda"
    contract = Contract(
        pre_post=raw,
        batch=len(batches[0]),
        shape=batches[0].shape,
        dynamic_shapes=None in backend.input.shape,
        precision=backend.precision,
        tf32=cuda and backend.precision == "tf32",
        layout="nhwc" if raw else "nchw",
        sync="spin" if cuda else "return",  # CUDA's own choice where cores are free; no backend asks for another
        cuda_graph=cuda_graph if cuda else None,
        rotate=len(batches),
        l2="cold" if erase else "hot",
        idle_ms=idle_ms,
    )
    return Contestant(
        model=model,
        backend=backend.name,
        device=backend.device,
        launches=launches,
        contract=contract,
        facts=backend.facts,
        memory_mib=backend.memory_mib,
        load_s=load_s,
        prepare_s=(prepared - start) / 1e9,
        first_inference_ms=first.host_ms,
        erase=erase,
    )


def measure(
    contestants: Sequence[Contestant],
    *,
    baseline: str | None = None,
    baseline_model: str | None = None,
    percentiles: tuple[int, ...] = (50, 90),
    max_seconds: float = 60.0,
    clock: Clock = time.perf_counter_ns,
    sleep: Sleep = time.sleep,
    watch: Watch | None = None,
    progress: Progress = silent,
) -> Bench:
    """Time contestants in turns until each median is known to ±0.5%, or the time is up.

    A contestant that fails leaves the race and keeps the rounds that it finished.

    Args:
        contestants: unlike in model, backend, batch or graph.
        baseline: backend whose row of the same model and contract the others are divided by; the first by default.
        baseline_model: network whose row on the same backend the others are divided by, or, where it has none
            there, its row on the baseline.
        percentiles: of 50, 90 and 99; enough samples are taken for each.
        max_seconds: of timed rounds, per contestant; no round starts that would probably pass it,
            but the first is always finished.
        clock: host clock in nanoseconds.
        sleep: pauses, in seconds.
        watch: reads the clocks of the GPU; by default NVML, if a contestant runs on one.
        progress: told after each warm-up, round and throughput.

    Raises:
        ReplkError: no contestant, two alike, or a baseline that is not among them; the last failure when
            none has finished a round.
    """
    chosen = _chosen(contestants, baseline, baseline_model)
    demand(percentiles, max_seconds)
    environment = machine.environment()
    with contextlib.ExitStack() as held:
        if watch is None and any(c.device == "cuda" for c in contestants):
            watch = held.enter_context(clocks.watching(machine.gpu_in_use(), clock=clock))
        watch, blind = watch or clocks.Blind(), clocks.Blind()
        begun = clock()
        lanes = [Lane(c, clock, sleep, watch if c.device == "cuda" else blind) for c in contestants]
        _race(lanes, percentiles, max_seconds, clock, progress)
        series = clocks.series(watch, begun, clock())
    return Bench(
        environment=environment,
        baseline=chosen,
        baseline_model=baseline_model,
        max_seconds=max_seconds,
        rows=tuple(
            lane.row(_ratio(lane, _base(lane, lanes, chosen, baseline_model)), percentiles)
            for lane in lanes
            if lane.rounds
        ),
        failures={lane.contestant.name: lane.failure for lane in lanes if lane.failure},
        gpu=series,
    )


def demand(percentiles: Sequence[int], max_seconds: float) -> None:
    """Raise ReplkError unless these percentiles are known and there is time for them."""
    if not set(percentiles) <= NEEDED.keys():
        asked = ", ".join(map(str, percentiles))
        raise ReplkError(f"percentiles {asked} are not all known", f"choose from {', '.join(map(str, NEEDED))}")
    if not max_seconds > 0:
        raise ReplkError(f"{max_seconds} seconds are no time", "give --max-seconds above 0")


def shortage(max_seconds: float) -> str:
    """Say that no row can settle in so little time; empty where one can."""
    least = ROUNDS * 2 * (lanes.REWARM_MS + lanes.BLOCK_MS) / 1e3
    if max_seconds >= least:
        return ""
    return f"--max-seconds {max_seconds:g} is too short to settle: {ROUNDS} rounds take at least {least:.2g} s a row"


def _chosen(contestants: Sequence[Contestant], baseline: str | None, model: str | None) -> str:
    """Return the backend that is the baseline."""
    names = [c.name for c in contestants]
    chosen = baseline if baseline is not None else next((c.backend for c in contestants), "")
    known = {c.backend for c in contestants}, {c.model for c in contestants} | {None}
    if len(set(names)) != len(names) or chosen not in known[0] or model not in known[1]:
        against = " ".join(filter(None, (model, chosen)))
        raise ReplkError(
            f"cannot race {names} against {against!r}", "name each contestant once, and a baseline among them"
        )
    return chosen


def _race(
    lanes: Sequence[Lane], percentiles: tuple[int, ...], max_seconds: float, clock: Clock, progress: Progress
) -> None:
    """Warm up, run rounds until all have settled or the time is up, then fill the queues.

    Raises:
        ReplkError: the last failure, when no contestant has finished a round.
    """
    running, fallen = list(lanes), list[ReplkError]()

    def attempt(lane: Lane, step: Callable[[], None]) -> None:
        if lane in running:
            try:
                step()
            except ReplkError as exc:
                lane.left = lane.failure = exc.problem
                running.remove(lane)
                fallen.append(exc)

    for done, lane in enumerate(lanes, start=1):
        attempt(lane, lane.warm_up)
        progress("warm-up", done, len(lanes))
    limit_ns = max_seconds * len(lanes) * 1e9
    start, longest, done = clock(), 0, 0
    orders = np.random.default_rng(0)  # the same ones in each race
    while running:
        begun = clock()
        order = [running[i] for i in orders.permutation(len(running))]
        for lane in (*order, *reversed(order)):
            attempt(lane, lane.block)
        for lane in running:
            lane.settle(percentiles)
        longest, done = max(longest, clock() - begun), done + 1
        progress("bench", done, None)
        if all(lane.settled for lane in running) or clock() - start + longest > limit_ns:
            break
    if not any(lane.rounds for lane in lanes):
        raise fallen[-1]
    queueing = [lane for lane in running if lane.queues]
    for done, lane in enumerate(queueing, start=1):
        try:
            lane.flow()
        except ReplkError as exc:  # its latencies stand
            lane.failure = f"no throughput: {exc.problem}"
        progress("throughput", done, len(queueing))


def _base(lane: Lane, lanes: Sequence[Lane], backend: str, model: str | None) -> Lane | None:
    """Return the contestant that one is divided by; None when it is the baseline itself, or has none."""
    own = lane.contestant
    known = {
        (other.contestant.model, other.contestant.backend): other
        for other in lanes
        if other.contestant.contract == own.contract and other.rounds
    }
    wanted = [(own.model, backend)] if model is None else [(model, own.backend), (model, backend)]
    base = next((known[key] for key in wanted if key in known), None)
    return None if base is lane else base


def _ratio(lane: Lane, base: Lane | None) -> Ratio | None:
    if base is None:
        return None
    pairs = zip(lane.round_means(), base.round_means(), strict=False)  # one may have left earlier
    return Ratio(baseline=base.contestant.name, rounds=tuple(own / other for own, other in pairs))
