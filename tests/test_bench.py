"""Timing on a fake clock, a fake device and fake readings: nothing here depends on how fast the machine is."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from replk_deploy import bench, clocks, lanes, machine, measurement, records
from replk_deploy.backends.base import Backend, TensorSpec
from replk_deploy.bench import Bench
from replk_deploy.clocks import Reading
from replk_deploy.errors import ContractError, ReplkError, UnavailableError
from replk_deploy.lanes import Contestant
from replk_deploy.measurement import Contract, Measurement
from replk_deploy.quantiles import autocorrelation, quantile, ranks


class FakeClock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)


class Sleeper:
    """A launch on a CPU that lasts as long as it is told, half before and half inside `wait`."""

    def __init__(self, clock: FakeClock, lasts_ms: Callable[[], float], log: list[str], name: str) -> None:
        self.clock, self.lasts_ms, self.log, self.name = clock, lasts_ms, log, name

    def enqueue(self) -> None:
        self.log.append(self.name)
        self.half = int(self.lasts_ms() * 5e5)
        self.clock.now += self.half

    def wait(self) -> None:
        self.clock.now += self.half

    def device_ms(self) -> None:
        return None


class Queued:
    """A launch on a device that works on after `enqueue` has returned, one inference after another."""

    def __init__(
        self,
        clock: FakeClock,
        gpu_ms: float | Callable[[], float],
        *,
        enqueue_ms: float = 0.1,
        wait_ms: float = 0.0,
        said_ms: float | None = None,
        depth: float = float("inf"),
    ) -> None:
        self.clock, self.enqueue_ms, self.wait_ms, self.said_ms = clock, enqueue_ms, wait_ms, said_ms
        self.gpu_ms = gpu_ms if callable(gpu_ms) else lambda: gpu_ms
        self.depth, self.pending = depth, 0
        self.free, self.last, self.started = 0, 0.0, 0

    def enqueue(self) -> None:
        self.pending += 1
        if self.pending > self.depth:
            raise UnavailableError("out of device memory", "take a smaller batch")
        self.clock.now += int(self.enqueue_ms * 1e6)
        self.last, self.started = self.gpu_ms(), self.started + 1
        self.free = max(self.free, self.clock.now) + int(self.last * 1e6)

    def wait(self) -> None:
        self.pending = 0
        self.clock.now = max(self.free, self.clock.now) + int(self.wait_ms * 1e6)

    def device_ms(self) -> float:
        return self.last if self.said_ms is None else self.said_ms


class FakeWatch:
    """Readings every 50 ms, made by a function of the time in seconds."""

    stopped = None

    def __init__(self, look: Callable[[float], dict[str, Any]]) -> None:
        self.look = look

    def between(self, start_ns: int, end_ns: int) -> Sequence[Reading]:
        ticks = range(-(-start_ns // 50_000_000) * 50_000_000, end_ns + 1, 50_000_000)
        return [Reading(at_ns=tick, **self.look(tick / 1e9)) for tick in ticks]


@pytest.fixture(autouse=True)
def _no_real_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "environment", lambda: {"cpu": "a fake"})


def contract(**changes: object) -> Contract:
    fields = {"pre_post": False, "batch": 1, "shape": (1, 3, 8, 8), "dynamic_shapes": True, "precision": "fp32"}
    return Contract(**(fields | {"layout": "nchw", "rotate": 1} | changes))


def entrant(backend: str, launch: Any, *, model: str = "", device: str = "cpu", **changes: object) -> Contestant:
    cuda = {"cuda_graph": False, "sync": "spin"} if device == "cuda" else {}
    return Contestant(
        model=model,
        backend=backend,
        device=device,
        launches=(launch,),
        contract=contract(**(cuda | changes)),
        facts={},
    )


def race(lasts: dict[str, Callable[[FakeClock], float]], log: list[str] | None = None, **kwargs: object) -> Bench:
    clock, log = FakeClock(), log if log is not None else []
    contestants = [entrant(name, Sleeper(clock, lambda f=f: f(clock), log, name)) for name, f in lasts.items()]
    return bench.measure(contestants, clock=clock, sleep=clock.sleep, **kwargs)


def on_gpu(
    gpu_ms: float | Callable[[FakeClock], float],
    look: Callable[[float], dict[str, Any]] | None = None,
    *,
    changes: dict[str, object] | None = None,
    **launch: float,
) -> Measurement:
    clock = FakeClock()
    own = (lambda: gpu_ms(clock)) if callable(gpu_ms) else gpu_ms
    watch = FakeWatch(look) if look else clocks.Blind()
    contestant = entrant("trt", Queued(clock, own, **launch), device="cuda", **(changes or {}))
    (row,) = bench.measure([contestant], clock=clock, sleep=clock.sleep, watch=watch).rows
    return row


def noisy(level: float, sd: float, seed: int) -> Callable[[FakeClock], float]:
    rng = np.random.default_rng(seed)
    return lambda _clock: level * (1 + sd * abs(rng.standard_normal()))


@pytest.mark.parametrize(
    ("n", "q", "expected"),
    [
        *((n, 0.5, r) for n, r in ((6, (1, 6)), (9, (2, 8)), (12, (3, 10)), (20, (6, 15)), (100, (40, 61)))),
        (500, 0.5, (228, 273)),
        (1000, 0.5, (469, 532)),
        *((100, q, r) for q, r in ((0.9, (84, 96)), (0.95, (90, 100)))),
        *((1000, q, r) for q, r in ((0.9, (881, 919)), (0.95, (936, 964)), (0.99, (983, 997)))),
        *((n, 0.99, r) for n, r in ((500, (490, 500)), (2000, (1971, 1989)))),
    ],
)
def test_ranks_are_those_of_the_published_table(n: int, q: float, expected: tuple[int, int]) -> None:
    assert ranks(n, q) == expected


@pytest.mark.parametrize(("q", "smallest"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368)])
def test_too_few_samples_have_no_interval(q: float, smallest: int) -> None:
    assert ranks(smallest - 1, q) is None
    assert ranks(smallest, q) is not None
    assert quantile([1.0, 2.0], 0.5).interval is None


def test_a_bound_that_is_met_exactly_is_met() -> None:
    assert ranks(6, 0.5, coverage=1 - 2 / 64) == (1, 6)  # P(B <= 0) is 1/64, all that the tail may hold


@pytest.mark.parametrize(("n", "q"), [(12, 0.5), (101, 0.5), (100, 0.9), (600, 0.99)])
def test_intervals_cover_the_truth_as_often_as_they_say(n: int, q: float) -> None:
    rng = np.random.default_rng(7)
    truth = -np.log(1 - q)  # of an exponential: skewed, like latencies
    hits = 0
    for _ in range(600):
        low, high = quantile(rng.exponential(size=n), q).interval
        hits += low <= truth <= high
    assert hits / 600 >= 0.93  # at least 0.95 by construction; three standard errors of 600 trials are 0.027


def test_autocorrelation_tells_drift_from_noise() -> None:
    rng = np.random.default_rng(3)
    assert abs(autocorrelation(rng.standard_normal(2000))) < 0.1
    assert autocorrelation(np.arange(100.0)) > 0.9
    assert autocorrelation([1.0, 1.0, 1.0]) is None


def test_a_quiet_race_settles_in_six_rounds_and_counts_every_sample() -> None:
    log: list[str] = []
    result = race({"a": lambda _: 2.0, "b": lambda _: 3.0}, log)
    a, b = result.rows
    assert (a.rounds, b.rounds) == (6, 6)
    assert (a.unstable, b.unstable) == ((), ())
    assert (a.p50_ms.value, a.p50_ms.interval) == (2.0, (2.0, 2.0))
    assert a.images_per_s_from_p50 == 500
    assert (a.ratio, b.ratio.median.value, b.ratio.baseline) == (None, pytest.approx(1.5), "a b1")
    assert b.ratio.median.interval == pytest.approx((1.5, 1.5))
    assert a.n == len(a.blocks) == len(a.windows) >= 12 * lanes.BLOCK_MANY
    assert list(a.windows) == sorted(a.windows)
    assert a.gpu_ms is None


def test_each_round_goes_there_and_back_in_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[str] = []
    block = lanes.Lane.block

    def noted(lane: lanes.Lane) -> None:
        blocks.append(lane.contestant.backend)
        block(lane)

    monkeypatch.setattr(lanes.Lane, "block", noted)
    names = ("a", "b", "c")
    rows = race({name: lambda _: 50.0 for name in names}).rows
    rounds = [blocks[i : i + 6] for i in range(0, len(blocks), 6)]
    assert len(rounds) == rows[0].rounds == 6
    assert all(turn == turn[::-1] and sorted(turn[:3]) == list(names) for turn in rounds)
    followed = {pair for turn in rounds for pair in itertools.pairwise(turn)}
    assert followed >= set(itertools.permutations(names, 2)), "everybody runs behind everybody"
    first = [turn[0] for turn in rounds]
    assert set(first) == set(names)
    again, blocks[:] = list(blocks), []
    race({name: lambda _: 50.0 for name in names})
    assert blocks == again


def test_drift_cancels_in_paired_rounds_though_the_medians_move() -> None:
    def drifting(level: float) -> Callable[[FakeClock], float]:
        return lambda clock: level * (1 + clock.now / 60e9)

    a, b = race({"a": drifting(10.0), "b": drifting(12.0)}, max_seconds=20).rows
    assert a.p50_ms.half_width > 0.01  # each alone looks unsteady
    assert b.ratio.median.value == pytest.approx(1.2, rel=2e-3)
    assert b.ratio.median.half_width < 5e-3


def test_blocks_of_slow_networks_are_short() -> None:
    (row,) = race({"slow": lambda _: 150.0}).rows
    assert all(row.blocks.count(i) == lanes.BLOCK_FEW for i in set(row.blocks))
    assert row.n >= measurement.NEEDED[90]


def test_noise_takes_more_rounds_until_the_median_is_known() -> None:
    (row,) = race({"a": noisy(2.0, 0.2, 1)}, max_seconds=600).rows
    assert row.rounds > measurement.ROUNDS
    assert not row.capped
    assert row.p50_ms.half_width <= measurement.TARGET


def test_time_that_runs_out_is_said_and_the_interval_reached_is_given() -> None:
    (row,) = race({"a": noisy(20.0, 0.5, 2)}, max_seconds=15).rows
    assert row.capped
    assert row.rounds >= measurement.ROUNDS
    assert row.p50_ms.half_width > measurement.TARGET
    assert any("time ran out" in reason and f"{row.p50_ms.half_width:.2%}" in reason for reason in row.unstable)


def test_a_row_says_which_of_width_and_rounds_was_missed() -> None:
    (row,) = race({"a": lambda _: 20.0}, max_seconds=5).rows
    assert (row.rounds, row.p50_ms.half_width) == (3, 0)
    assert row.unstable == ("time ran out after 3 of 6 rounds. Raise --max-seconds",)


@pytest.mark.parametrize("seconds", [2.0, 2.9, 3.0, 3.3])
def test_time_that_cannot_hold_six_rounds_is_said_beforehand(seconds: float) -> None:
    (row,) = race({"a": lambda _: 2.0}, max_seconds=seconds).rows
    assert bool(bench.shortage(seconds)) == (row.rounds < measurement.ROUNDS)
    assert bench.shortage(2.0) == "--max-seconds 2 is too short to settle: 6 rounds take at least 3 s a row"


def test_less_than_six_rounds_give_no_interval_and_say_so() -> None:
    (row,) = race({"a": lambda _: 2000.0}, max_seconds=10).rows
    assert row.rounds == 1
    assert row.p50_ms.interval is None
    assert row.unstable[0] == "time ran out after 1 of 6 rounds. Raise --max-seconds"
    assert row.p90_ms is None
    assert row.missing["p90_ms"].startswith("n/a (n=6")


def test_the_interval_encloses_those_of_samples_and_blocks() -> None:
    calls = itertools.count()

    def shifting(_clock: FakeClock) -> float:  # steady within a block, unlike between blocks
        return 10.0 + (next(calls) // 30) % 2

    (row,) = race({"a": shifting}, max_seconds=8).rows
    over_samples = quantile(row.samples_ms, 0.5).interval
    over_blocks = quantile(measurement.block_medians(row.samples_ms, row.blocks), 0.5).interval
    assert row.p50_ms.interval == (min(over_samples[0], over_blocks[0]), max(over_samples[1], over_blocks[1]))


def test_a_median_lies_in_its_own_interval() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        sizes = rng.integers(1, 40, 12)  # unlike blocks: the median of all is far from that of their medians
        blocks = np.repeat(np.arange(12), sizes)
        found = measurement._median(rng.lognormal(0, 2, 12)[blocks] * rng.uniform(0.99, 1.01, len(blocks)), blocks)
        assert found.interval[0] <= found.value <= found.interval[1]


def test_samples_that_scatter_within_blocks_alike_are_not_taken_for_sure() -> None:
    samples, blocks = [9.0, 10.0, 11.0] * 12, [i // 3 for i in range(36)]  # every block has the median 10
    assert measurement._median(samples, blocks).interval == quantile(samples, 0.5).interval != (10.0, 10.0)


def test_a_warm_up_that_never_settles_ends_at_the_cap_and_is_said() -> None:
    (row,) = race({"a": lambda clock: 10.0 * (1 + clock.now / 1e9)}, max_seconds=3).rows
    assert not row.warmup.converged
    assert row.warmup.seconds >= lanes.WARM_CAP_MS / 1e3
    assert "warm-up did not settle" in row.unstable[0]


def test_warm_up_waits_for_a_slow_start() -> None:
    (row,) = race({"a": lambda clock: 10.0 * (1 + 4 * np.exp(-clock.now / 1e9))}).rows
    assert row.warmup.converged
    assert row.warmup.seconds > 1
    assert row.warmup.curve_ms[0] > 4 * row.warmup.curve_ms[-1]


def test_p99_waits_for_500_samples() -> None:
    (few,) = race({"a": lambda _: 20.0}).rows
    assert few.n < 500
    assert few.p99_ms is None
    assert few.missing["p99_ms"] == f"n/a (n={few.n}, needs 500)"
    (many,) = race({"a": lambda _: 20.0}, percentiles=(50, 99), max_seconds=600).rows
    assert many.n >= 500
    assert many.p99_ms.value == 20.0


def test_outliers_are_flagged_and_kept() -> None:
    calls = itertools.count()
    (row,) = race({"a": lambda _: 80.0 if next(calls) == 300 else 2.0}).rows
    (index,) = row.flags["far"]
    assert row.samples_ms[index] == row.max_ms == 80.0
    assert row.mean_ms > 2.0


def test_rows_under_unlike_contracts_share_no_ratio() -> None:
    clock = FakeClock()
    one, other = (
        entrant(name, Sleeper(clock, lambda: 2.0, [], name), precision=p) for name, p in (("a", "fp32"), ("b", "fp16"))
    )
    assert [row.ratio for row in bench.measure([one, other], clock=clock).rows] == [None, None]


def test_inputs_take_turns() -> None:
    clock, log = FakeClock(), []
    launches = tuple(Sleeper(clock, lambda: 5.0, log, str(i)) for i in range(3))
    bench.measure([Contestant(backend="a", launches=launches, contract=contract(rotate=3), facts={})], clock=clock)
    assert log[:6] == ["0", "1", "2", "0", "1", "2"]
    assert {b: log.count(b) for b in "012"}["2"] >= len(log) // 3 - 1


def test_progress_hears_of_each_warm_up_and_round() -> None:
    heard: list[tuple[str, int, int | None]] = []
    race({"a": lambda _: 2.0, "b": lambda _: 2.0}, progress=lambda *said: heard.append(said))
    assert heard == [("warm-up", 1, 2), ("warm-up", 2, 2), *(("bench", i, None) for i in range(1, 7))]


def test_an_interrupt_passes_through() -> None:
    def interrupted(_clock: FakeClock) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race({"a": interrupted})


@pytest.mark.parametrize("kwargs", [{"baseline": "nobody"}, {"percentiles": (42,)}])
def test_what_cannot_be_measured_is_refused(kwargs: dict[str, object]) -> None:
    with pytest.raises(ReplkError):
        race({"a": lambda _: 2.0}, **kwargs)


def test_nobody_and_twins_are_refused() -> None:
    with pytest.raises(ReplkError):
        bench.measure([])
    twin = Contestant(backend="a", launches=(), contract=contract(), facts={})
    with pytest.raises(ReplkError):
        bench.measure([twin, twin])


def test_the_record_holds_facts_and_what_follows_from_them() -> None:
    record = json.loads(records.to_json(race({"a": lambda _: 2.0, "b": lambda _: 3.0})))
    assert (record["schema"], record["environment"]) == ("replk.bench/2", {"cpu": "a fake"})
    assert (record["failures"], record["gpu"], record["baseline_model"]) == ({}, None, None)
    row = record["rows"][1]
    assert row["contract"]["cuda_graph"] is None
    assert row["warmup"]["converged"] is True
    assert len(row["samples_ms"]) == row["n"] == len(row["blocks"])
    assert row["p50_ms"]["interval"] == [3.0, 3.0]
    assert row["p90_ms"]["value"] == 3.0
    assert row["ratio"]["median"]["value"] == pytest.approx(1.5)
    assert row["unstable"] == row["notes"] == []
    assert {row[key] for key in ("gpu_p50_ms", "enqueue_ms", "pace", "throughput", "left")} == {None}


# ── the device's clock ───────────────────────────────────────────────────────────────────────────


def test_both_clocks_are_kept_and_the_host_leads() -> None:
    row = on_gpu(2.0, enqueue_ms=0.25, wait_ms=0.5)
    assert set(row.samples_ms) == {2.75}
    assert set(row.gpu_ms) == {2.0}
    assert set(row.enqueue_ms) == {0.25}
    assert (row.p50_ms.value, row.gpu_p50_ms.value, row.gpu_p90_ms.value) == (2.75, 2.0, 2.0)
    assert row.n >= 500
    assert row.gpu_p99_ms.value == 2.0
    assert row.enqueue_share == pytest.approx(0.125)
    assert row.notes == ()


def test_device_percentiles_need_as_many_samples_as_the_hosts() -> None:
    row = on_gpu(20.0)
    assert row.n < 500
    assert row.gpu_p99_ms is None
    assert row.gpu_p90_ms.value == 20.0


@pytest.mark.parametrize(("enqueue_ms", "said"), [(1.5, False), (1.7, True)])
def test_a_host_that_sets_the_pace_is_said_and_is_no_instability(enqueue_ms: float, *, said: bool) -> None:
    row = on_gpu(2.0, enqueue_ms=enqueue_ms)
    assert any("enqueueing takes 85%" in note for note in row.notes) == said
    assert row.unstable == ()


def test_a_device_that_forgets_some_times_is_our_bug() -> None:
    clock = FakeClock()
    launch = Queued(clock, 2.0)
    launch.device_ms = lambda: None if launch.started % 100 == 0 else 2.0
    with pytest.raises(ContractError, match="device times"):
        bench.measure([entrant("trt", launch, device="cuda")], clock=clock, watch=clocks.Blind())


# ── throughput ───────────────────────────────────────────────────────────────────────────────────


def test_throughput_fills_the_queue_and_is_not_one_over_latency() -> None:
    row = on_gpu(2.0, wait_ms=1.0, changes={"batch": 4})
    assert row.throughput.images_per_s == pytest.approx(2000, rel=2e-3)  # the device is never idle
    assert row.images_per_s_from_p50 == pytest.approx(4000 / 3.1)
    assert row.throughput.seconds >= 2
    assert row.throughput.images == 4 * row.throughput.launches


def test_throughput_is_measured_again_when_it_was_too_short() -> None:
    row = on_gpu(2.0, said_ms=10.0)  # five overlap, as it were
    assert row.throughput.seconds >= 2
    assert row.throughput.launches > 1.1 * 2000 / 10
    assert row.throughput.images_per_s == pytest.approx(500, rel=2e-3)


def test_where_nothing_queues_there_is_no_throughput() -> None:
    (cpu,) = race({"a": lambda _: 2.0}).rows
    assert cpu.throughput is None
    assert on_gpu(2.0, changes={"idle_ms": 5.0}).throughput is None


def test_latencies_outlive_a_queue_that_overflows() -> None:
    clock = FakeClock()
    launch = Queued(clock, 2.0, depth=50)
    result = bench.measure([entrant("trt", launch, device="cuda")], clock=clock, watch=clocks.Blind())
    assert result.failures == {"trt b1": "no throughput: out of device memory"}
    (row,) = result.rows
    assert (row.throughput, row.left, row.rounds, row.unstable) == (None, None, 6, ())


# ── several networks ─────────────────────────────────────────────────────────────────────────────

LEVELS = {("ours", "torch"): 8.0, ("ours", "ort"): 4.0, ("rival", "torch"): 10.0, ("rival", "ort"): 20.0}


def rivals(levels: dict[tuple[str, str], float], **kwargs: object) -> dict[str, tuple[str, float] | None]:
    clock = FakeClock()
    contestants = [
        entrant(backend, Sleeper(clock, lambda ms=ms: ms, [], ""), model=model)
        for (model, backend), ms in levels.items()
    ]
    result = bench.measure(contestants, clock=clock, **kwargs)
    return {row.name: row.ratio and (row.ratio.baseline, pytest.approx(row.ratio.median.value)) for row in result.rows}


def test_without_a_baseline_model_each_network_is_divided_by_its_own_row() -> None:
    assert rivals(LEVELS) == {
        "ours torch b1": None,
        "ours ort b1": ("ours torch b1", 0.5),
        "rival torch b1": None,
        "rival ort b1": ("rival torch b1", 2.0),
    }


def test_a_baseline_model_divides_the_rows_of_its_own_backend() -> None:
    assert rivals(LEVELS, baseline_model="rival") == {
        "ours torch b1": ("rival torch b1", 0.8),
        "ours ort b1": ("rival ort b1", 0.2),
        "rival torch b1": None,
        "rival ort b1": None,
    }


def test_a_backend_that_the_baseline_model_lacks_is_divided_by_its_row_on_the_baseline() -> None:
    levels = LEVELS | {("ours", "native"): 2.0}
    assert rivals(levels, baseline_model="rival", baseline="ort")["ours native b1"] == ("rival ort b1", 0.1)
    assert rivals(levels, baseline_model="rival")["ours native b1"] == ("rival torch b1", 0.2)


def test_a_baseline_that_takes_no_part_is_refused() -> None:
    for wrong in ({"baseline_model": "nobody"}, {"baseline": "trt"}):
        with pytest.raises(ReplkError, match="cannot race"):
            rivals(LEVELS, **wrong)


def test_with_and_without_a_graph_are_two_rows_that_share_no_ratio() -> None:
    clock = FakeClock()
    contestants = [
        entrant("trt", Queued(clock, ms), device="cuda", cuda_graph=graph) for graph, ms in ((False, 8.0), (True, 2.0))
    ]
    rows = bench.measure(contestants, clock=clock, watch=clocks.Blind()).rows
    assert [(row.name, row.ratio) for row in rows] == [("trt b1", None), ("trt b1 graph", None)]


# ── contestants that fail ────────────────────────────────────────────────────────────────────────


def failing(after: int, ms: float = 20.0) -> Callable[[FakeClock], float]:
    calls = itertools.count()

    def lasts(_clock: FakeClock) -> float:
        if next(calls) >= after:
            raise UnavailableError(f"GPU lost after {after}", "restart it")
        return ms

    return lasts


WARM, RE_WARM, BLOCK = 30, 3, 30  # inferences of 20 ms: five in each of six windows, three in 50 ms, a block


def test_who_fails_in_a_round_keeps_the_rounds_before_and_the_others_go_on() -> None:
    log: list[str] = []
    rounds_and_a_half = WARM + 5 * (RE_WARM + BLOCK) + 7
    lasts = {"a": lambda _: 40.0, "b": failing(rounds_and_a_half), "c": lambda _: 10.0}
    result = race(lasts, log)
    a, b, c = result.rows
    assert result.failures == {"b b1": f"GPU lost after {rounds_and_a_half}"}
    assert (a.rounds, b.rounds, c.rounds) == (6, 2, 6)
    assert (a.left, b.left, c.left) == (None, f"GPU lost after {rounds_and_a_half}", None)
    assert b.n == len(b.blocks) == len(b.windows) == 4 * BLOCK  # the broken round is not there
    assert b.blocks[-1] == 3
    assert b.ratio.rounds == pytest.approx((0.5, 0.5))
    assert c.ratio.rounds == pytest.approx((0.25,) * 6)
    assert any("left after 2 rounds: GPU lost" in why for why in b.unstable)
    assert not any("time ran out" in why for why in b.unstable)
    after = log[len(log) - log[::-1].index("b") :]
    assert {"a", "c"} == set(after)


def test_a_baseline_that_fails_divides_as_far_as_it_came() -> None:
    a, b = race({"a": failing(WARM + 4 * (RE_WARM + BLOCK)), "b": lambda _: 10.0}).rows
    assert (a.rounds, b.rounds) == (2, 6)
    assert b.ratio.rounds == pytest.approx((0.5, 0.5))
    assert b.ratio.median.interval is None


@pytest.mark.parametrize("after", [0, WARM, WARM + RE_WARM + BLOCK + 1])
def test_who_fails_before_the_end_of_the_first_round_has_no_row(after: int) -> None:
    result = race({"a": failing(after), "b": lambda _: 10.0})
    assert result.failures == {"a b1": f"GPU lost after {after}"}
    assert [row.name for row in result.rows] == ["b b1"]
    assert result.rows[0].ratio is None


@pytest.mark.parametrize(("early", "late"), [(0, 3), (WARM + 5, WARM + 3)])
def test_when_all_have_failed_the_last_failure_is_raised(early: int, late: int) -> None:
    with pytest.raises(UnavailableError, match=f"GPU lost after {late} "):
        race({"a": failing(early), "b": failing(late)})


def test_what_was_finished_before_all_failed_is_kept() -> None:
    result = race({"a": failing(0), "b": failing(WARM + 4 * (RE_WARM + BLOCK))})
    assert [(row.name, row.rounds) for row in result.rows] == [("b b1", 2)]
    assert set(result.failures) == {"a b1", "b b1"}


def test_what_is_no_error_of_ours_is_not_swallowed() -> None:
    def broken(_clock: FakeClock) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        race({"a": lambda _: 2.0, "b": broken})


# ── clocks held down ─────────────────────────────────────────────────────────────────────────────


def held(start_s: float, end_s: float, **during: Any) -> Callable[[float], dict[str, Any]]:
    return lambda at_s: {"sm_mhz": 1800.0} | (during if start_s <= at_s < end_s else {})


@pytest.mark.parametrize(
    ("during", "cause"),
    [
        *(({"events": frozenset({event, "idle"})}, event) for event in sorted(clocks.HARDWARE)),
        ({"sm_mhz": 1340.0}, "SM clock below 75% of the warm-up's"),
    ],
)
def test_a_window_under_held_clocks_is_taken_again_and_its_samples_stay(during: dict[str, Any], cause: str) -> None:
    calm, row = on_gpu(2.0, held(0, 0)), on_gpu(2.0, held(1.0, 1.2, **during))
    assert calm.pace.slowed == {}
    assert set(row.pace.slowed.values()) == {cause}
    (slowed,) = row.pace.slowed
    assert row.n > calm.n
    assert row.flags["slowed"] == tuple(i for i, window in enumerate(row.windows) if window == slowed)
    assert len(row.flags["slowed"]) == row.windows.count(slowed) > 40
    assert len(row.pace.windows_mhz) == max(row.windows) + 1 == max(calm.windows) + 2
    assert row.unstable == ()


@pytest.mark.parametrize(
    "during",
    [
        {"sm_mhz": 1360.0},
        {"sm_mhz": 1500.0, "events": frozenset({clocks.POWER_CAP})},
        {"events": frozenset({"software thermal slowdown", "sync boost", "idle"})},
    ],
)
def test_what_is_no_hardware_slowdown_is_only_reported(during: dict[str, Any]) -> None:
    row = on_gpu(2.0, held(1.0, 99.0, **during))
    assert row.pace.slowed == {}
    assert row.n == on_gpu(2.0).n
    events = during.get("events", frozenset())
    assert row.pace.events.keys() == events
    assert any("power limit" in note for note in row.notes) == (clocks.POWER_CAP in events)


def test_a_slow_window_without_a_cause_is_never_taken_again() -> None:
    row = on_gpu(lambda clock: 40.0 if 1.0e9 <= clock.now < 1.2e9 else 2.0, held(0, 0))
    assert row.flags["far"]
    assert row.pace.slowed == {}
    assert row.flags["slowed"] == ()


def test_clocks_that_stay_down_are_waited_for_a_few_times_and_then_said() -> None:
    pauses: list[float] = []
    clock = FakeClock()
    launch = Queued(clock, 2.0)
    watch = FakeWatch(held(0, 1e9, events=frozenset({"hardware power brake"})))
    (row,) = bench.measure([entrant("trt", launch, device="cuda")], clock=clock, watch=watch, sleep=pauses.append).rows
    assert pauses == [0.5, 1.0, 2.0] * 12
    assert row.rounds == 6
    assert any("samples under slowed clocks (hardware power brake)" in why for why in row.unstable)


def test_the_reference_is_the_clock_that_the_load_settles_at() -> None:
    row = on_gpu(2.0, lambda at_s: {"sm_mhz": 1980.0 if at_s < 0.2 else 1200.0})  # a power cap, soon reached
    assert row.pace.reference_mhz == 1200.0
    assert row.pace.slowed == {}


def test_a_few_held_windows_are_no_instability_and_a_fifth_is() -> None:
    def row(share: float) -> Measurement:
        made = on_gpu(2.0, held(0, 0))
        slowed = dict.fromkeys(range(round(share * (max(made.windows) + 1))), "hardware slowdown")
        return dataclasses.replace(made, pace=dataclasses.replace(made.pace, slowed=slowed))

    assert row(0.15).unstable == ()
    assert len(row(0.25).unstable) == 1


def test_cycles_are_those_of_the_network_whatever_the_clock() -> None:
    slow, fast = (on_gpu(3600.0 / mhz, lambda _, mhz=mhz: {"sm_mhz": mhz}) for mhz in (1500.0, 1800.0))
    assert slow.gpu_p50_ms.value == pytest.approx(1.2 * fast.gpu_p50_ms.value)
    assert slow.gpu_kcycles == pytest.approx(fast.gpu_kcycles) == pytest.approx(3600)
    assert (on_gpu(2.0).gpu_kcycles, on_gpu(2.0).pace) == (None, None)


def test_a_row_on_the_cpu_is_not_judged_by_the_clocks_of_the_gpu() -> None:
    clock = FakeClock()
    watch = FakeWatch(held(1.5, 1e9, events=frozenset({"hardware slowdown"})))
    cpu = entrant("torch", Sleeper(clock, lambda: 2.0, [], ""))
    gpu = entrant("trt", Queued(clock, 2.0), device="cuda")
    beside, row = bench.measure([cpu, gpu], clock=clock, sleep=clock.sleep, watch=watch).rows
    assert row.pace.slowed
    assert (beside.pace, beside.flags["slowed"]) == (None, ())


def test_a_row_that_left_keeps_the_clocks_of_its_finished_rounds_only() -> None:
    clock = FakeClock()
    lost = Queued(clock, 20.0)
    enqueue = lost.enqueue

    def enqueue_until_lost() -> None:
        if clock.now > 8e9:
            raise UnavailableError("GPU lost", "restart it")
        enqueue()

    lost.enqueue = enqueue_until_lost
    contestants = [entrant("trt", lost, device="cuda"), entrant("torch", Sleeper(clock, lambda: 10.0, [], ""))]
    row, _ = bench.measure(contestants, clock=clock, watch=FakeWatch(held(0, 0))).rows
    assert row.left == "GPU lost"
    assert len(row.pace.windows_mhz) == max(row.windows) + 1
    assert row.n == len(row.gpu_ms) == len(row.enqueue_ms)


def test_strangers_on_the_gpu_are_said() -> None:
    row = on_gpu(2.0, lambda at_s: {"sm_mhz": 1800.0, "others": 2 if at_s > 1 else 0})
    assert any("other compute processes on the GPU: 2" in note for note in row.notes)


def test_the_record_keeps_what_was_read() -> None:
    clock = FakeClock()
    watch = FakeWatch(held(0, 0, power_w=300.0))
    result = bench.measure([entrant("trt", Queued(clock, 2.0), device="cuda")], clock=clock, watch=watch)
    record = json.loads(records.to_json(result))
    assert set(record["gpu"]["sm_mhz"]) == {1800.0}
    assert record["gpu"]["t_s"][:2] == [0.0, 0.05]
    assert record["rows"][0]["pace"]["median_mhz"] == 1800.0


# ── paced load, and what a backend says of itself ────────────────────────────────────────────────


def test_pauses_come_before_each_inference_and_stay_outside_the_clock() -> None:
    clock, pauses = FakeClock(), []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock.sleep(seconds)

    log: list[str] = []
    contestant = entrant("a", Sleeper(clock, lambda: 2.0, log, "a"), idle_ms=8.0)
    (row,) = bench.measure([contestant], clock=clock, sleep=sleep).rows
    assert set(row.samples_ms) == {2.0}
    assert pauses == [0.008] * len(log)


def test_a_cold_cache_is_made_before_each_launch_and_outside_all_clocks() -> None:
    clock, log = FakeClock(), []
    launch = Queued(clock, 2.0, wait_ms=0.5)
    enqueue, wait = launch.enqueue, launch.wait

    def erase() -> None:
        log.append("erase")
        clock.sleep(0.007)

    launch.enqueue = lambda: (log.append("enqueue"), enqueue())
    launch.wait = lambda: (log.append("wait"), wait())
    entered = dataclasses.replace(entrant("trt", launch, device="cuda", l2="cold"), erase=erase)
    result = bench.measure([entered], clock=clock, sleep=clock.sleep, watch=clocks.Blind())
    (row,) = result.rows
    assert log == ["erase", "enqueue", "wait"] * (len(log) // 3), "one launch a sample, and no queue of them"
    assert ({*row.samples_ms}, {*row.gpu_ms}, {*row.enqueue_ms}) == ({2.6}, {2.0}, {0.1})
    assert row.throughput is None
    assert result.failures == {}
    assert json.loads(records.to_json(result))["rows"][0]["contract"]["l2"] == "cold"


def test_only_the_cache_of_a_gpu_is_emptied_and_the_contract_says_so() -> None:
    erase = object()
    assert enter("cuda").contract.l2 == enter("cpu").contract.l2 == "hot"
    cold = enter("cuda", erase=erase)
    assert (cold.contract.l2, cold.erase) == ("cold", erase)
    with pytest.raises(ReplkError, match=r"fake runs on the CPU.*--cold-l2"):
        enter("cpu", erase=erase)


class FakeBackend(Backend):
    name, takes, precisions = "fake", "weights", frozenset({"fp32"})
    outputs, facts, closed = ("logits",), {"driver": "1"}, 0

    def __init__(self, clock: FakeClock, device: str, precision: str = "fp32") -> None:
        self.clock, self.device, self.precision = clock, device, precision
        self.input = TensorSpec(name="images", dtype="float32", shape=(None, 3, 8, 8))

    @classmethod
    def probe(cls) -> dict[str, str]:
        return {}

    def _run(self, images: Any) -> dict[str, Any]:
        raise NotImplementedError

    def prepare(self, images: Any) -> Any:
        self.check(images)
        self.clock.sleep(0.25)
        return Queued(self.clock, 2.0) if self.device == "cuda" else Sleeper(self.clock, lambda: 2.0, [], "")

    @property
    def memory_mib(self) -> dict[str, float]:
        return {"weights": 12.5}

    def close(self) -> None:
        pass


def enter(device: str, precision: str = "fp32", **kwargs: Any) -> Contestant:
    clock = FakeClock()
    images = [np.zeros((2, 3, 8, 8), np.float32)] * 4
    return bench.enter(FakeBackend(clock, device, precision), images, clock=clock, **kwargs)


def test_a_contestant_says_what_its_backend_is() -> None:
    entered = enter("cuda", model="ours", cuda_graph=True, idle_ms=3.0, load_s=1.5)
    assert (entered.name, entered.device, entered.memory_mib) == ("ours fake b2 graph", "cuda", {"weights": 12.5})
    assert (entered.load_s, entered.prepare_s, entered.first_inference_ms) == (1.5, 1.0, 2.1)
    said = entered.contract
    assert (said.cuda_graph, said.idle_ms, said.sync, said.rotate, said.tf32) == (True, 3.0, "spin", 4, False)
    assert (said.batch, said.shape, said.layout) == (2, (2, 3, 8, 8), "nchw")


def test_a_graph_means_nothing_on_a_cpu_and_only_a_gpu_has_tf32() -> None:
    assert enter("cpu", cuda_graph=True).contract.cuda_graph is None
    assert enter("cuda").contract.cuda_graph is False
    assert enter("cpu").contract.sync == "return"
    assert [enter(d, p).contract.tf32 for d, p in (("cuda", "tf32"), ("cpu", "tf32"), ("cuda", "fp32"))] == [
        *(True, False, False)
    ]


@pytest.mark.parametrize("idle_ms", [-1.0, float("nan"), float("inf")])
def test_a_pause_that_is_none_is_refused(idle_ms: float) -> None:
    with pytest.raises(ReplkError, match="is no pause"):
        enter("cpu", idle_ms=idle_ms)


# ── intervals ────────────────────────────────────────────────────────────────────────────────────


def test_the_interval_of_the_median_covers_it_though_blocks_differ() -> None:
    rng = np.random.default_rng(17)
    blocks = np.repeat(np.arange(12), 40)
    covered = {"given": 0, "samples alone": 0}
    for _ in range(400):
        samples = 10 + 0.5 * rng.standard_normal(12)[blocks] + 0.05 * rng.standard_normal(480)
        for name, found in (
            ("given", measurement._median(samples, blocks)),
            ("samples alone", quantile(samples, 0.5)),
        ):
            low, high = found.interval
            covered[name] += low <= 10 <= high
    assert covered["given"] / 400 >= 0.92  # 96.1% by construction; four standard errors of 400 trials are 0.039
    assert covered["samples alone"] / 400 < 0.8
