"""Two sides of bench records: what may be said, what must be refused, and how often the interval is right."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from replk_deploy import records
from replk_deploy.bench import Bench
from replk_deploy.cli import app
from replk_deploy.compare import Compared, Comparison, Side, compare
from replk_deploy.errors import Exit, IntegrityError, ReplkError
from replk_deploy.measurement import Contract, Measurement, WarmUp

GOLDEN = Path(__file__).parent / "golden" / "bench-1.json"
ENVIRONMENT = {
    "cpu": "a CPU",
    "cores_physical": 8,
    "threads_usable": 8,
    "cpu_quota": None,
    "governor": "performance",
    "torch_threads": 8,
    "torch": "2.13.0",
    "onnxruntime": "1.32.0",
    "openvino": None,
    "load_1min": 0.1,
    "gpu": "a GPU",
    "gpu_driver": "580.1",
    "gpu_id": "12ab",
    "env.OMP_NUM_THREADS": "8",
}


def row(p50_ms: float, **changes: Any) -> Measurement:
    """Return a row of six rounds whose median is known to ±0.1%."""
    device = changes.pop("device", "cpu")
    fields = {"pre_post": False, "batch": 1, "shape": (1, 3, 8, 8), "dynamic_shapes": True, "precision": "fp32"}
    own = {name: changes.pop(name) for name in list(changes) if name in Contract.__dataclass_fields__}
    contract = Contract(**(fields | {"layout": "nchw", "rotate": 4} | own))
    spread = p50_ms * np.linspace(0.999, 1.001, 12)
    empty = dict.fromkeys(("load_s", "prepare_s", "first_inference_ms", "gpu_ms", "enqueue_ms", "pace", "throughput"))
    made: dict[str, Any] = {
        **empty,
        "model": "",
        "backend": "torch",
        "batch": contract.batch,
        "device": device,
        "contract": contract,
        "facts": {},
        "memory_mib": {},
        "ratio": None,
        "capped": False,
        "left": None,
        "percentiles": (50,),
        "warmup": WarmUp(curve_ms=(p50_ms,) * 3, seconds=1.0, converged=True),
        "samples_ms": tuple(map(float, spread)),
        "blocks": tuple(range(12)),
        "windows": tuple(range(12)),
    }
    return Measurement(**(made | changes))


def record(*rows: Measurement, **environment: Any) -> Bench:
    found = {**ENVIRONMENT, **environment}
    return Bench(
        environment={name: value for name, value in found.items() if value != "absent"},
        baseline="torch",
        baseline_model=None,
        max_seconds=60.0,
        rows=rows,
        failures={},
        gpu=None,
    )


def side(medians: Sequence[float], **changes: Any) -> list[Bench]:
    return [record(row(median, **changes)) for median in medians]


def only(found: Comparison) -> Compared:
    (one,) = found.rows
    return one


def compared(base: Sequence[float], new: Sequence[float], **kwargs: Any) -> Compared:
    return only(compare(side(base), side(new), **kwargs))


# ── the interval ─────────────────────────────────────────────────────────────────────────────────


def test_the_ratio_is_new_over_base_and_lies_between_the_extremes() -> None:
    one = compared([10.0, 10.5, 11.0], [20.0, 21.0, 25.0])
    assert one.ratio == pytest.approx(2.0)
    assert one.interval == pytest.approx((20 / 11, 25 / 10))
    assert one.word == "SLOWER"
    assert compared([20.0, 21.0, 25.0], [10.0, 10.5, 11.0]).word == "FASTER"


def test_one_process_a_side_has_its_own_interval_and_covers_no_other_process() -> None:
    one = compared([10.0], [10.0])
    low, high = (10 * (0.999 + 0.002 * rank / 11) for rank in (2, 9))  # the 3rd and the 10th of 12
    assert one.interval == pytest.approx((low / high, high / low))
    assert one.coverage == 0


def test_processes_that_differ_widen_the_interval_though_each_is_sure_of_itself() -> None:
    assert compared([10.0], [10.0]).word == "SAME"
    one = compared([9.0, 10.0, 11.0], [9.0, 10.0, 11.0])
    assert one.interval == pytest.approx((9 / 11, 11 / 9))
    assert one.word == "AMBIGUOUS"


@pytest.mark.parametrize(
    ("base", "new", "each", "both"), [(3, 3, 0.75, 0.5), (7, 7, 0.984375, 0.96875), (7, 1, 0.984375, 0.0)]
)
def test_the_coverage_is_that_neither_side_misses(base: int, new: int, each: float, both: float) -> None:
    one = compared(np.linspace(10, 11, base), np.linspace(12, 13, new))
    assert (one.base.coverage, one.coverage) == (each, both)


@pytest.mark.parametrize("processes", [3, 7])
def test_the_interval_covers_the_truth_as_often_as_it_says(processes: int) -> None:
    rng = np.random.default_rng(5)
    hits = [0, 0]

    def shown(level: float) -> Side:
        medians = level * np.exp(0.03 * rng.standard_normal(processes))
        return Side(p50_ms=tuple(medians), interval_ms=(min(medians), max(medians)), unstable=0)

    for _ in range(3000):
        fields = {"model": "", "backend": "torch", "batch": 1, "cuda_graph": None, "delta": 0.01}
        one = Compared(base=shown(10.0), new=shown(9.0), **fields)
        low, high = one.interval
        hits[0] += low <= 0.9 <= high
        hits[1] += one.base.interval_ms[0] <= 10.0 <= one.base.interval_ms[1]
    assert hits[0] / 3000 >= one.coverage - 0.03  # three standard errors of 3000 trials are 0.027 at most
    assert hits[1] / 3000 == pytest.approx(one.base.coverage, abs=0.03)


# ── the words ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("low", "high", "few", "many"),
    [
        (0.991, 1.009, "SAME", "SAME"),
        (0.991, 0.996, "SAME", "SAME"),  # known to be faster, by less than anybody should care for
        (0.989, 1.009, "AMBIGUOUS", "AMBIGUOUS"),
        (0.991, 1.011, "AMBIGUOUS", "AMBIGUOUS"),
        (0.900, 1.100, "AMBIGUOUS", "AMBIGUOUS"),
        (0.960, 0.985, "AMBIGUOUS", "FASTER"),
        (0.960, 0.979, "FASTER", "FASTER"),
        (0.960, 1.000, "AMBIGUOUS", "AMBIGUOUS"),
        (1.015, 1.040, "AMBIGUOUS", "SLOWER"),
        (1.021, 1.040, "SLOWER", "SLOWER"),
        (float("nan"), float("nan"), "AMBIGUOUS", "AMBIGUOUS"),
    ],
)
def test_a_word_is_what_the_interval_allows(low: float, high: float, few: str, many: str) -> None:
    def word(base: int, new: int) -> str:
        fields = {"model": "", "backend": "torch", "batch": 1, "cuda_graph": None, "delta": 0.01}
        sides = (
            Side(p50_ms=(1.0,) * count, interval_ms=ends, unstable=0)
            for count, ends in ((base, (1.0, 1.0)), (new, (low, high)))
        )
        return Compared(base=next(sides), new=next(sides), **fields).word

    assert word(7, 7) == many
    assert [word(6, 7), word(7, 6), word(1, 1)] == [few] * 3


def test_too_few_rounds_for_an_interval_allow_no_word_and_fail_nothing() -> None:
    short = {"samples_ms": (20.0,), "blocks": (0,), "windows": (0,)}
    found = compare(record(row(10.0)), record(row(20.0, **short)), max_regress=0.03)
    assert (only(found).interval, only(found).word, found.ambiguous) == (None, "AMBIGUOUS", ("torch b1",))
    assert "too few rounds" in only(found).why
    assert found.undecided == ("torch b1",)
    assert not found.regressed


SHAKY = {"warmup": WarmUp(curve_ms=(10.0, 12.0, 14.0), seconds=10.0, converged=False)}


@pytest.mark.parametrize("processes", [1, 7])
@pytest.mark.parametrize("shaky", ["base", "new", "both"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.97, 1.0, 1.03, 2.0, 4.0])
def test_an_unstable_side_allows_no_word_and_says_why(ratio: float, shaky: str, processes: int) -> None:
    levels = np.linspace(9.99, 10.01, processes)
    base, new = side(levels), side(ratio * levels)
    stable = only(compare(base, new, max_regress=0.02))
    assert (stable.word, stable.why) != ("AMBIGUOUS", "")
    assert stable.word == {0.25: "FASTER", 1.0: "SAME", 4.0: "SLOWER"}.get(ratio, stable.word)
    for name, records_ in (("base", base), ("new", new)):
        if shaky in {name, "both"}:
            (one,) = records_[-1].rows
            records_[-1] = dataclasses.replace(records_[-1], rows=(dataclasses.replace(one, **SHAKY),))
    found = compare(base, new, max_regress=0.02)
    assert (only(found).word, found.ambiguous, found.regressions) == ("AMBIGUOUS", ("torch b1",), ())
    assert only(found).interval == stable.interval
    named = {name for name in ("base", "new") if f"{name} is unstable in 1 of {processes}" in only(found).why}
    assert named == ({"base", "new"} if shaky == "both" else {shaky})
    assert "warm-up did not settle in 10.0 s" in only(found).why
    assert found.undecided == (("torch b1",) if stable.interval[1] > 1.02 else ()), "a slower row does not pass unseen"
    assert json.loads(records.to_json(found))["rows"][0]["why"] == only(found).why


def test_every_ambiguous_row_says_why_and_no_other() -> None:
    for low, high in ((0.9, 1.1), (0.98, 1.001), (0.995, 1.005), (0.5, 0.6), (1.5, 1.6), (np.nan, np.nan)):
        one = compared([10.0], [10.0])
        one = dataclasses.replace(one, new=Side(p50_ms=(10.0,), interval_ms=(10 * low, 10 * high), unstable=0))
        assert bool(one.why) == (one.word == "AMBIGUOUS")


@pytest.mark.parametrize(
    ("new", "limit", "state"),
    [
        ([10.30, 10.40], None, "pass"),
        ([10.30, 10.40], 0.02, "regressed"),
        ([10.30, 10.40], 0.03, "undecided"),  # the lower end counts, and is exactly there
        ([10.30, 10.40], 0.05, "pass"),  # slower, by less than the limit
        ([9.5, 22.2], 0.03, "undecided"),  # a median half as slow again, and nobody can say more
        ([9.0, 10.1], 0.03, "pass"),
        ([9.0, 9.1], 0.02, "pass"),
    ],
)
def test_what_noise_lets_pass_the_limit_is_undecided_and_what_surely_does_has_regressed(
    new: list[float], limit: float | None, state: str
) -> None:
    found = compare(side([10.0, 9.99]), side(new), max_regress=limit)
    named = ("torch b1",)
    assert found.regressions == (named if state == "regressed" else ())
    assert found.undecided == (named if state == "undecided" else ())
    said = [doubt for doubt in found.doubts if "may be slower by more than" in doubt]
    assert bool(said) == (state == "undecided" and only(found).word != "AMBIGUOUS")


def test_a_limit_below_what_counts_as_the_same_is_kept_to() -> None:
    base = side(np.linspace(9.999, 10, 7))
    found = compare(base, side(np.linspace(10.06, 10.07, 7)), max_regress=0.005)
    assert (only(found).word, found.regressed) == ("SLOWER", True)
    found = compare(base, side(np.linspace(9.999, 10.04, 7)), max_regress=0.005)
    assert (only(found).word, found.undecided) == ("SAME", ())
    found = compare(base, side(np.linspace(9.999, 10.06, 7)), max_regress=0.005)
    assert (only(found).word, found.undecided) == ("AMBIGUOUS", ("torch b1",))


@pytest.mark.parametrize("processes", [1, 6, 7])
def test_a_limit_that_so_few_processes_cannot_tell_is_refused(processes: int) -> None:
    base, new = side(np.linspace(9.999, 10, processes)), side(np.linspace(10.188, 10.192, 7))
    if processes < 7:
        with pytest.raises(ReplkError, match=f"1.00% is less than what {processes} of 7 processes a side can tell, 2%"):
            compare(base, new, max_regress=0.01)
    else:
        assert compare(base, new, max_regress=0.01).regressed


# ── rows that find each other ────────────────────────────────────────────────────────────────────


def test_rows_meet_by_model_backend_batch_and_graph() -> None:
    base = record(row(10.0), row(20.0, batch=8), row(5.0, model="rival"), row(3.0, backend="trt", cuda_graph=False))
    new = record(row(30.0), row(6.0, model="rival"), row(2.0, backend="trt", cuda_graph=True), row(7.0, backend="ort"))
    found = compare(base, new)
    assert {one.name: round(one.ratio, 6) for one in found.rows} == {"torch b1": 3.0, "rival torch b1": 1.2}
    assert found.only_in_base == ("torch b8", "trt b1")
    assert found.only_in_new == ("trt b1 graph", "ort b1")


def test_no_row_is_lost_whatever_the_two_sides_hold() -> None:
    rng = np.random.default_rng(11)
    pool = [
        row(10.0, model=model, backend=backend, batch=batch, cuda_graph=graph)
        for model, backend, batch, graph in itertools.product(("", "lowered"), ("torch", "trt"), (1, 8), (False, True))
    ]
    for _ in range(50):
        sides = [
            [record(*(pool[i] for i in sorted(rng.choice(16, rng.integers(1, 16), replace=False)))) for _ in range(2)]
            for _ in range(2)
        ]
        names = [{one.name for found in records_ for one in found.rows} for records_ in sides]
        if not names[0] & names[1]:
            continue
        found = compare(*sides)
        assert {one.name for one in found.rows} == names[0] & names[1]
        assert (set(found.only_in_base), set(found.only_in_new)) == (names[0] - names[1], names[1] - names[0])


def test_other_forms_of_large_convolutions_are_said() -> None:
    lowered = record(row(5.0, facts={"lowering": "3 dense"}), row(7.0, backend="ort"))
    (doubt,) = [d for d in compare(record(row(10.0), row(7.0, backend="ort")), lowered).doubts if "convolutions" in d]
    assert doubt == "torch b1 has large convolutions as none in base, as 3 dense in new"
    assert not any("convolutions" in doubt for doubt in compare(lowered, lowered).doubts)


def test_nothing_in_common_is_no_success() -> None:
    with pytest.raises(ReplkError, match="no row is on both sides: torch b1 and torch b8"):
        compare(record(row(10.0)), record(row(10.0, batch=8)))
    with pytest.raises(ReplkError, match="name at least one"):
        compare([], record(row(10.0)))


def test_a_row_that_some_records_lack_is_said() -> None:
    found = compare([record(row(10.0), row(5.0, backend="ort")), record(row(11.0))], side([10.5]))
    assert len(only(found).base.p50_ms) == 2
    found = compare(
        [record(row(10.0), row(5.0, backend="ort")), record(row(11.0))], record(row(10.0), row(5.0, backend="ort"))
    )
    assert "ort b1 is in 1 of 2 records of a side" in found.doubts


# ── what must be equal ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cpu": "another"}, "cpu another"),
        ({"threads_usable": 4}, "threads_usable 4"),
        ({"torch_threads": 1}, "torch_threads 1"),
        ({"cpu_quota": 2.0}, "cpu_quota 2.0"),
        ({"torch": "2.14.0"}, "torch 2.14.0"),
        ({"onnxruntime": "1.33.0"}, "onnxruntime 1.33.0"),
        ({"env.OMP_NUM_THREADS": "absent"}, "env.OMP_NUM_THREADS None"),
        ({"env.KMP_BLOCKTIME": "1"}, "env.KMP_BLOCKTIME 1"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_another_machine_setting_or_version_is_refused_by_name(changes: dict[str, Any], said: str, place: int) -> None:
    news = [record(row(10.0)), record(row(10.1))]
    news[place] = dataclasses.replace(news[place], environment=record(**changes).environment)
    with pytest.raises(ReplkError, match="not comparable") as caught:
        compare(record(row(10.2)), news)
    assert f"new has {said}, base {ENVIRONMENT.get(said.split(maxsplit=1)[0])}" in caught.value.problem
    assert caught.value.code == 2


def test_all_that_differs_is_named_at_once() -> None:
    with pytest.raises(ReplkError) as caught:
        compare(record(row(10.0, rotate=4)), record(row(10.0, rotate=1), cpu="B", torch="2.14.0"))
    assert [word in caught.value.problem for word in ("cpu B", "torch 2.14.0", "rotate 1 in row torch b1")] == [
        True
    ] * 3


@pytest.mark.parametrize("changes", [{"gpu": "another"}, {"gpu_driver": "590.0"}, {"gpu": None}])
def test_the_gpu_matters_to_rows_that_ran_on_it(changes: dict[str, Any]) -> None:
    assert compare(record(row(10.0)), record(row(10.0), **changes)).rows
    on_gpu = row(10.0, device="cuda", cuda_graph=True)
    with pytest.raises(ReplkError, match="not comparable"):
        compare(record(on_gpu), record(on_gpu, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"load_1min": 3.0},
        {"openvino": "2026.1"},  # installed since, used by no row that both have
        {"cores_physical": "absent"},  # an older format did not say
        {"env.CUDA_VISIBLE_DEVICES": "1"},
    ],
)
def test_what_does_not_matter_may_differ(changes: dict[str, Any]) -> None:
    assert only(compare(record(row(10.0)), record(row(10.0), **changes))).word == "SAME"


def test_another_card_of_the_kind_is_said() -> None:
    found = compare(record(row(10.0)), record(row(10.0), gpu_id="34cd"))
    assert any("not one card" in doubt for doubt in found.doubts)


@pytest.mark.parametrize(
    "changes", [{"precision": "fp16"}, {"dynamic_shapes": False}, {"idle_ms": 5.0}, {"tf32": True}, {"l2": "cold"}]
)
def test_unlike_contracts_are_refused_by_name(changes: dict[str, Any]) -> None:
    (name, value), *_ = changes.items()
    with pytest.raises(ReplkError, match=f"new has {name} {value} in row torch b1"):
        compare(side([10.0]), side([10.0], **changes))
    ort = row(1.0, backend="ort")
    bases, new = [record(ort), record(ort, row(10.0))], record(ort, row(10.0, **changes))
    with pytest.raises(ReplkError, match=f"{name} {value}"):  # also in a row that the first record lacks
        compare(bases, new)


def test_a_record_counts_once() -> None:
    with pytest.raises(ReplkError, match="twice"):
        compare(side([10.0, 10.0]), side([10.0]))


@pytest.mark.parametrize("limits", [{"delta": 0.0}, {"delta": 1.0}, {"max_regress": -0.1}, {"max_regress": np.nan}])
def test_limits_without_sense_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ReplkError, match="make no sense"):
        compare(side([10.0]), side([10.0]), **limits)


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def test_records_of_the_first_format_are_read_for_ever(tmp_path: Path) -> None:
    old = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert old["schema"] == "replk.bench/1"
    found = compare(GOLDEN, GOLDEN)
    assert [(one.name, one.word) for one in found.rows] == [("torch b1", "SAME"), ("ort-cpu b1", "SAME")]
    fresh = record(row(75.0, rotate=1), **dict.fromkeys(ENVIRONMENT, "absent"))
    fresh = dataclasses.replace(fresh, environment=old["environment"] | {"gpu": None, "gpu_why": "no driver"})
    path = tmp_path / "new.json"
    path.write_text(records.to_json(fresh), encoding="utf-8")
    found = compare(GOLDEN, path)
    assert only(found).ratio == pytest.approx(0.5, rel=1e-3)
    assert (found.base, found.new, found.only_in_base) == (("bench-1.json",), ("new.json",), ("ort-cpu b1",))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "replk.bench/3"}, "reads up to 2"),
        ({"schema": "replk.proof/1"}, r"holds replk.proof.*name a record of latencies"),
        ({"rows": None}, "not a whole bench record"),
        ({"rows": [{"backend": "torch"}]}, "not a whole bench record"),
        ({"environment": "none"}, "not a whole bench record"),
        ({"rows": json.loads(GOLDEN.read_text(encoding="utf-8"))["rows"] * 2}, "two rows torch b1"),
    ],
)
def test_what_is_no_bench_record_of_ours_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(json.loads(GOLDEN.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(IntegrityError, match=said):
        compare(GOLDEN, path)


def test_a_median_that_is_not_that_of_its_samples_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "base.json", tmp_path / "new.json"]
    for path, divisor in zip(paths, (1, 100), strict=True):
        raw = json.loads(records.to_json(record(row(10.0))))
        raw["rows"][0]["p50_ms"]["value"] /= divisor
        path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"new.json: torch b1 says a p50 of 0.1 ms, its samples 10"):
        compare(*paths)


@pytest.mark.parametrize("value", [0.0, -1.0, "nan", "inf", None])
def test_a_median_that_is_no_latency_is_refused(tmp_path: Path, value: Any) -> None:
    raw = json.loads(GOLDEN.read_text(encoding="utf-8"))
    raw["rows"][0]["p50_ms"]["value"] = value
    path = tmp_path / "x.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(IntegrityError, match="not a whole bench record"):
        compare(GOLDEN, path)


def test_the_comparison_is_a_record() -> None:
    found = json.loads(records.to_json(compare(side([10.0, 10.1, 10.2]), side([12.0, 12.1, 12.2]), max_regress=0.03)))
    assert (found["schema"], found["regressed"], found["regressions"]) == ("replk.comparison/1", True, ["torch b1"])
    assert (found["rows"][0]["word"], found["rows"][0]["coverage"]) == ("SLOWER", 0.5)
    assert any("3 processes a side" in doubt for doubt in found["doubts"])


@pytest.mark.parametrize(
    ("changes", "options", "code"),
    [
        ({}, ["--max-regress", "3%"], Exit.REGRESSION),
        (SHAKY, ["--max-regress", "3%"], Exit.INCONCLUSIVE),
        (SHAKY, ["--max-regress", "300%"], Exit.OK),
        ({}, ["--max-regress", "100%"], Exit.INCONCLUSIVE),  # its interval holds the limit
        ({}, ["--max-regress", "1%"], Exit.USAGE),
        ({}, ["--max-regress", "5"], Exit.USAGE),
        ({}, ["--max-regress", "1.0"], Exit.USAGE),
        ({}, ["--max-regress", "0.99"], Exit.REGRESSION),
        (SHAKY, ["--require-stable"], Exit.INCONCLUSIVE),
        (SHAKY, [], Exit.OK),
    ],
)
def test_a_slower_row_that_is_unstable_is_no_regression_and_no_pass(
    tmp_path: Path, changes: dict[str, Any], options: list[str], code: Exit
) -> None:
    paths = [tmp_path / "base.json", tmp_path / "new.json"]
    for path, made in zip(paths, (record(row(10.0)), record(row(20.0, **changes))), strict=True):
        path.write_text(records.to_json(made), encoding="utf-8")
    done = CliRunner().invoke(app, ["compare", *map(str, paths), *options], catch_exceptions=False)
    assert done.exit_code == code
    assert ("new is unstable in 1 of 1" in done.output) == bool(changes)
    assert ("did you mean 5%?" in done.output) == ("5" in options)


@pytest.mark.usefixtures("in_empty_folder")
def test_a_share_of_a_whole_or_more_is_refused_in_the_file_of_a_project_too() -> None:
    Path("base.json").write_text(records.to_json(record(row(10.0))), encoding="utf-8")
    Path("new.json").write_text(records.to_json(record(row(20.0))), encoding="utf-8")
    for said, code in (("5", Exit.USAGE), ('"5"', Exit.USAGE), ('"5%"', Exit.REGRESSION), ("0.05", Exit.REGRESSION)):
        Path("replk.toml").write_text(f"[compare]\nmax-regress = {said}\n", encoding="utf-8")
        done = CliRunner().invoke(app, ["compare", "base.json", "new.json"], catch_exceptions=False)
        assert done.exit_code == code, done.output
