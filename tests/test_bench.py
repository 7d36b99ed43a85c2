"""Timing on a fake clock: nothing here depends on how fast the machine is."""

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest

from replk_deploy import bench, machine, records
from replk_deploy.bench import Bench, Contestant, Contract
from replk_deploy.errors import ReplkError
from replk_deploy.quantiles import autocorrelation, quantile, ranks


class FakeClock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Sleeper:
    """A launch that lasts as long as it is told, half before and half inside `wait`."""

    def __init__(self, clock: FakeClock, lasts_ms: Callable[[], float], log: list[str], name: str) -> None:
        self.clock, self.lasts_ms, self.log, self.name = clock, lasts_ms, log, name

    def enqueue(self) -> None:
        self.log.append(self.name)
        self.half = int(self.lasts_ms() * 5e5)
        self.clock.now += self.half

    def wait(self) -> None:
        self.clock.now += self.half


@pytest.fixture(autouse=True)
def _no_real_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "environment", lambda: {"cpu": "a fake"})


def contract(**changes: object) -> Contract:
    fields = {"pre_post": False, "batch": 1, "shape": (1, 3, 8, 8), "dynamic_shapes": True, "precision": "fp32"}
    return Contract(**(fields | {"layout": "nchw", "rotate": 1} | changes))


def race(lasts: dict[str, Callable[[FakeClock], float]], log: list[str] | None = None, **kwargs: object) -> Bench:
    clock, log = FakeClock(), log if log is not None else []
    contestants = [
        Contestant(
            backend=name,
            launches=(Sleeper(clock, lambda f=f: f(clock), log, name),),
            contract=contract(),
            facts={},
        )
        for name, f in lasts.items()
    ]
    return bench.measure(contestants, clock=clock, **kwargs)


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
    assert (a.ratio, b.ratio.median.value, b.ratio.baseline) == (None, pytest.approx(1.5), "a")
    assert b.ratio.median.interval == pytest.approx((1.5, 1.5))
    assert a.n == len(a.blocks) == len(a.windows) >= 12 * bench.BLOCK_MANY
    assert list(a.windows) == sorted(a.windows)
    assert a.gpu_ms is None


def test_contestants_take_turns_a_b_b_a_and_the_others_rest() -> None:
    log: list[str] = []
    race({"a": lambda _: 50.0, "b": lambda _: 50.0, "c": lambda _: 50.0}, log)
    turns = [name for name, _ in itertools.groupby(log)]
    assert turns == ["a", "b", "c", *["a", "b", "c", "b"] * 6, "a"]  # C C and A A join into one


def test_drift_cancels_in_paired_rounds_though_the_medians_move() -> None:
    def drifting(level: float) -> Callable[[FakeClock], float]:
        return lambda clock: level * (1 + clock.now / 60e9)

    a, b = race({"a": drifting(10.0), "b": drifting(12.0)}, max_seconds=20).rows
    assert a.p50_ms.half_width > 0.01  # each alone looks unsteady
    assert b.ratio.median.value == pytest.approx(1.2, rel=2e-3)
    assert b.ratio.median.half_width < 5e-3


def test_blocks_of_slow_networks_are_short() -> None:
    (row,) = race({"slow": lambda _: 150.0}).rows
    assert all(row.blocks.count(i) == bench.BLOCK_FEW for i in set(row.blocks))
    assert row.n >= bench.NEEDED[90]


def test_noise_takes_more_rounds_until_the_median_is_known() -> None:
    (row,) = race({"a": noisy(2.0, 0.2, 1)}, max_seconds=600).rows
    assert row.rounds > bench.ROUNDS
    assert not row.capped
    assert row.p50_ms.half_width <= bench.TARGET


def test_time_that_runs_out_is_said_and_the_interval_reached_is_given() -> None:
    (row,) = race({"a": noisy(20.0, 0.5, 2)}, max_seconds=15).rows
    assert row.capped
    assert row.rounds >= bench.ROUNDS
    assert row.p50_ms.half_width > bench.TARGET
    assert any("time ran out" in reason and f"{row.p50_ms.half_width:.2%}" in reason for reason in row.unstable)


def test_less_than_six_rounds_give_no_interval_and_say_so() -> None:
    (row,) = race({"a": lambda _: 2000.0}, max_seconds=10).rows
    assert row.rounds == 1
    assert row.p50_ms.interval is None
    assert row.unstable
    assert row.p90_ms is None
    assert row.missing["p90_ms"].startswith("n/a (n=6")


def test_the_wider_of_samples_and_blocks_is_given() -> None:
    calls = itertools.count()

    def shifting(_clock: FakeClock) -> float:  # steady within a block, unlike between blocks
        return 10.0 + (next(calls) // 30) % 2

    (row,) = race({"a": shifting}, max_seconds=8).rows
    over_samples = quantile(row.samples_ms, 0.5).interval
    over_blocks = quantile(bench.block_medians(row.samples_ms, row.blocks), 0.5).interval
    width = row.p50_ms.interval[1] - row.p50_ms.interval[0]
    assert width == max(over_samples[1] - over_samples[0], over_blocks[1] - over_blocks[0])


def test_a_warm_up_that_never_settles_ends_at_the_cap_and_is_said() -> None:
    (row,) = race({"a": lambda clock: 10.0 * (1 + clock.now / 1e9)}, max_seconds=3).rows
    assert not row.warmup.converged
    assert row.warmup.seconds >= bench.WARM_CAP_MS / 1e3
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
    clock, log = FakeClock(), []
    one, other = (
        Contestant(
            backend=name, launches=(Sleeper(clock, lambda: 2.0, log, name),), contract=contract(precision=p), facts={}
        )
        for name, p in (("a", "fp32"), ("b", "fp16"))
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
    assert (record["schema"], record["environment"]) == ("replk.bench/1", {"cpu": "a fake"})
    row = record["rows"][1]
    assert row["contract"]["cuda_graph"] is None
    assert row["warmup"]["converged"] is True
    assert len(row["samples_ms"]) == row["n"] == len(row["blocks"])
    assert row["p50_ms"]["interval"] == [3.0, 3.0]
    assert row["p90_ms"]["value"] == 3.0
    assert row["ratio"]["median"]["value"] == pytest.approx(1.5)
    assert row["unstable"] == []
