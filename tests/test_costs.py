"""Which form a convolution takes: from times that were measured, or from a fit that gives back what made them."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replk_deploy import costs, lower
from replk_deploy.costs import Calibration, Cost, Decision, Model, decide
from replk_deploy.errors import Exit, IntegrityError
from replk_deploy.lowerings import LOWERINGS
from replk_deploy.lowerings.base import LargeConv
from replk_deploy.models.replknet import VARIANTS, RepLKNet
from replk_deploy.pipeline.lowering import GROWTH
from replk_deploy.precision import TOLERANCES

GPU = "NVIDIA H100 80GB HBM3"
SHIPPED = costs.calibrations()
FACTORS = {  # ms, ms a byte, ms a byte, ms an output and column, ms a multiply-add
    "none": (0.03, 2e-7, 5e-8, 3e-8, 4e-9),
    "grouped": (0.05, 3e-7, 4e-8, 1e-8, 2e-10),
    "dense": (0.08, 1e-7, 6e-8, 2e-8, 1e-10),
}


def place(channels: int, kernel: int, high: int, wide: int, name: str = "") -> LargeConv:
    said = name or f"{channels} {kernel} {high}x{wide}"
    return LargeConv(name=said, channels=channels, kernel=(kernel, kernel), map=(high, wide))


LAYERS = [place(8, 7, 9, 9), place(16, 13, 7, 12), place(8, 13, 16, 16), place(24, 9, 20, 10), place(4, 21, 14, 18)]
UNSEEN = [place(12, 11, 12, 12), place(30, 7, 10, 16), place(6, 31, 17, 9)]


def truth(form: str, site: LargeConv, batch: int, itemsize: int = 4) -> float:
    """Compute what a layer costs on the machine of the tests, terms and all, from the shapes alone."""
    (high, wide), (rows, columns) = site.map, site.taps
    outputs = batch * site.channels * high * wide
    weight, each = {
        "none": (rows * columns, rows * columns),
        "grouped": (high * high * columns, high * columns),
        "dense": ((high * wide) ** 2, high * wide),
    }[form]
    terms = (1, site.channels * weight * itemsize, 2 * outputs * itemsize, outputs * columns, outputs * each)
    return sum(factor * term for factor, term in zip(FACTORS[form], terms, strict=True))


def row(site: LargeConv, form: str, ms: float, batch: int = 1, **changes: object) -> Cost:
    fields = {"runtime": "ort-cpu", "device": "cpu", "precision": "fp32", "batch": batch, "form": form, "ms": ms}
    return Cost(**(fields | {"channels": site.channels, "taps": site.taps, "map": site.map} | changes))


def known(*rows: Cost) -> Calibration:
    return Calibration(environment={"cpu": "a processor"}, costs=rows)


MEASURED = known(*(row(s, f, truth(f, s, n), n) for s in LAYERS for f in FACTORS for n in (1, 4)))


def model(*rows: Cost, device: str = "cpu") -> Model:
    return Model([known(*rows)], "ort-cpu", device, "fp32")


def choose(found: Model, *sites: LargeConv, batch: int = 1, growth: float = math.inf) -> tuple[Decision, ...]:
    return decide(sites, found, batch=batch, precision="fp32", weight_bytes=1000, max_growth=growth)


def test_a_measured_layer_costs_what_was_measured_there_and_nowhere_else() -> None:
    odd = [row(LAYERS[2], form, ms) for form, ms in (("none", 70.0), ("grouped", 60.0))]
    found = Model([known(*odd, *MEASURED.costs[:6], *MEASURED.costs[18:])], "ort-cpu", "cpu", "fp32")
    assert found.times(LAYERS[2], 1) == ({"none": 70.0, "grouped": 60.0}, "measured")
    wider = LargeConv(name="", channels=8, kernel=(41, 41), map=(9, 9))  # 17x17 touch the map: another layer
    for site in (place(8, 11, 16, 16), place(9, 13, 16, 16), wider):
        assert found.times(site, 1)[1] != "measured"


def test_a_batch_between_costs_what_speaks_against_the_form_at_its_neighbours() -> None:
    site = LAYERS[0]
    at = {4: {"none": 10.0, "grouped": 5.0, "dense": 9.0}, 16: {"none": 40.0, "grouped": 36.0, "dense": 4.0}}
    found = model(*(row(site, form, ms, batch) for batch, times in at.items() for form, ms in times.items()))
    assert found.times(site, 8) == ({"none": 10.0, "grouped": 9.0, "dense": 9.0}, "measured at batch 4 and 16")
    assert found.times(site, 99) == ({"none": 40.0, "grouped": 36.0, "dense": 4.0}, "measured at batch 16")
    assert found.times(site, 2) == ({}, ""), "a smaller batch may be another matter"
    assert [choose(found, site, batch=batch)[0].form for batch in (2, 4, 8, 99)] == ["none", "grouped", "none", "dense"]


def test_other_layers_cost_what_made_the_measured_ones() -> None:
    found = Model([MEASURED], "ort-cpu", "cpu", "fp32")
    for site in UNSEEN:
        for batch in (1, 3, 12):
            times, how = found.times(site, batch)
            assert how == "modelled"
            assert times == pytest.approx({form: truth(form, site, batch) for form in FACTORS}, rel=1e-6)


def test_a_fit_is_moved_against_a_form_by_its_worst_error_on_a_layer_left_out() -> None:
    site, exact = UNSEEN[0], model(*MEASURED.costs).times(UNSEEN[0], 1)[0]
    for form, against in (("grouped", 1), ("none", -1)):
        odd = next(cost for cost in MEASURED.costs if cost.form == form)
        rows = [dataclasses.replace(c, ms=c.ms * 3.0**against) if c is odd else c for c in MEASURED.costs]
        times, _ = model(*rows).times(site, 1)
        assert times[form] ** against > 1.5 * exact[form] ** against
        assert {f: ms for f, ms in times.items() if f != form} == {f: ms for f, ms in exact.items() if f != form}


@pytest.mark.parametrize("calibration", SHIPPED, ids=lambda found: found.costs[0].device)
@pytest.mark.parametrize("whole", [False, True], ids=["one batch", "all batches"])
def test_no_measured_layer_that_is_left_out_is_made_slower(calibration: Calibration, *, whole: bool) -> None:
    for cost in (cost for cost in calibration.costs if cost.form == "none"):
        site, alike = costs._site(cost), (cost.runtime, cost.precision, cost.channels, cost.taps, cost.map)
        layer = [c for c in calibration.costs if (c.runtime, c.precision, c.channels, c.taps, c.map) == alike]
        hidden = {id(c) for c in layer if whole or c.batch == cost.batch}
        rest = known(*(c for c in calibration.costs if id(c) not in hidden))
        found = Model([rest], cost.runtime, cost.device, cost.precision)
        (decision,) = choose(found, site, batch=cost.batch)
        true = {c.form: c.ms for c in layer if c.batch == cost.batch}
        assert true[decision.form] <= true["none"] / 0.97


def test_a_fit_says_nothing_of_far_larger_or_smaller_layers() -> None:
    found = Model([MEASURED], "ort-cpu", "cpu", "fp32")  # from 8 channels of the first, to a batch of 4 of the last
    small = place(2, 7, 9, 9)
    assert found.times(small, 1)[0]
    assert found.times(place(1, 7, 9, 9), 1) == ({}, "")
    largest = max(costs._macs(site, 4) for site in LAYERS)
    channels = costs.REACH * largest // costs._macs(place(1, 13, 16, 16), 1)
    assert found.times(place(channels, 13, 16, 16), 1)[0]
    assert found.times(place(channels + 1, 13, 16, 16), 1) == ({}, "")


def test_no_factor_is_negative_and_too_few_layers_are_no_fit() -> None:
    shrinking = [row(s, "none", 9 - n, b) for n, s in enumerate(LAYERS) for b in (1, 4)]  # the larger, the faster
    few = [row(s, "grouped", 0.1) for s in LAYERS]
    factors, _, _ = costs._fit(tuple(shrinking), "fp32")
    assert (factors >= 0).all()
    for nothing in (model(*shrinking, *few), model(*shrinking[:4]), model()):
        (decision,) = choose(nothing, UNSEEN[0])
        assert (decision.form, decision.why, decision.ms) == ("none", "nothing like it was measured", {})
        assert decision.gain_ms == 0


@pytest.mark.parametrize(
    ("runtime", "device", "precision", "ms"),
    [
        ("ort-cuda", GPU, "fp16", 2.0),
        ("ort-cuda", "NVIDIA A100", "fp16", 1.0),
        ("ort-cuda", "NVIDIA L4", "fp16", 1.0),
        ("ort-cuda", GPU, "bf16", 2.0),
        ("ort-cuda", "NVIDIA L4", "bf16", 1.0),
        ("ort-cuda", GPU, "tf32", None),
        ("ort-cuda", "cpu", "fp16", 4.0),
        ("ort-cuda", "cpu of another kind", "fp16", None),
        ("torch", "cpu", "fp32", 3.0),
        ("torch-compile", "cpu", "fp32", 3.0),
        ("aoti", "cpu", "fp32", 3.0),
        ("torch", GPU, "fp32", None),
        ("ort-cpu", "cpu", "fp32", None),
    ],
)
def test_what_fits_best_is_taken_and_a_processor_is_no_gpu(
    runtime: str, device: str, precision: str, ms: float | None
) -> None:
    site = LAYERS[0]
    half = {"runtime": "ort-cuda", "precision": "fp16"}
    stored = [
        known(
            row(site, "none", 1.0, device="NVIDIA A100", **half),
            row(site, "grouped", 0.1, device="NVIDIA A100", **half),
            row(site, "none", 2.0, device=GPU, **half),
            row(site, "grouped", 0.2, device=GPU, **half),
        ),
        known(
            row(site, "none", 3.0, runtime="torch"),
            row(site, "grouped", 0.3, runtime="torch"),
            row(site, "none", 4.0, **half),
            row(site, "grouped", 0.4, **half),
        ),
    ]
    found = Model(stored, runtime, device, precision)
    times, _ = found.times(site, 1)
    assert times == ({} if ms is None else {"none": ms, "grouped": ms / 10})
    assert bool(found.source) is (ms is not None)
    if precision == "bf16":
        assert found.source.startswith("fp16 on NVIDIA")


@pytest.mark.parametrize(("share", "form"), [(costs.MEASURED - 0.01, "grouped"), (costs.MEASURED + 0.01, "none")])
def test_a_measured_form_must_gain_more_than_a_measurement_errs(share: float, form: str) -> None:
    (decision,) = choose(model(row(LAYERS[0], "none", 2.0), row(LAYERS[0], "grouped", 2.0 * share)), LAYERS[0])
    assert (decision.form, decision.why, decision.measured) == (form, "measured", True)
    assert decision.gain_ms == pytest.approx(2.0 * (1 - share) if form == "grouped" else 0)


@pytest.mark.parametrize(("share", "form"), [(costs.MODELLED - 0.01, "grouped"), (costs.MODELLED + 0.01, "none")])
def test_a_modelled_form_must_gain_more_than_a_fit_errs(share: float, form: str) -> None:
    flat = [row(s, "none", 1.0, n) for s in LAYERS for n in (1, 2)]
    flat += [row(s, "grouped", share, n) for s in LAYERS for n in (1, 2)]
    (decision,) = choose(model(*flat), UNSEEN[0])
    assert (decision.form, decision.why, decision.measured) == (form, "modelled", False)


def test_the_fastest_form_is_taken() -> None:
    rows = [row(LAYERS[0], f, ms) for f, ms in (("none", 4.0), ("grouped", 2.0), ("dense", 1.0))]
    (decision,) = choose(model(*rows), LAYERS[0])
    assert (decision.form, decision.gain_ms) == ("dense", 3.0)
    assert decision.ms == {"none": 4.0, "grouped": 2.0, "dense": 1.0}
    assert choose(model(*rows), LAYERS[0], growth=1)[0].form == "none"


def added(decision: Decision) -> int:
    """Count the bytes that a form adds to a network of float32."""
    if decision.form == "none":
        return 0
    site = decision.site
    return 4 * (LOWERINGS[decision.form].elements(site) - site.channels * math.prod(site.kernel))


def test_the_least_time_for_its_bytes_is_given_up_first_and_said() -> None:
    dear, cheap = place(8, 9, 12, 12, "dear"), place(9, 9, 12, 12, "cheap")
    rows = [row(dear, "none", 10.0), row(dear, "grouped", 9.0), row(cheap, "none", 10.0), row(cheap, "grouped", 2.0)]
    found = model(*rows)
    whole = choose(found, dear, cheap)
    room = sum(map(added, whole))
    assert [d.form for d in whole] == ["grouped", "grouped"]
    assert choose(found, dear, cheap, growth=1 + room / 1000) == whole
    first, second = choose(found, dear, cheap, growth=1 + (room - 1) / 1000)
    assert (first.form, second) == ("none", whole[1])
    assert first.why == f"grouped would pass {1 + (room - 1) / 1000:g} times the weights"
    assert [d.form for d in choose(found, dear, cheap, growth=1 + (added(second) - 1) / 1000)] == ["none", "none"]


def test_a_smaller_form_that_still_gains_takes_the_place_of_a_large_one() -> None:
    site = LAYERS[2]
    rows = [row(site, f, ms) for f, ms in (("none", 4.0), ("grouped", 2.0), ("dense", 1.0))]
    sizes = {d.form: added(d) for d in costs._options(site, model(*rows), 1)}
    assert sizes["none"] < sizes["grouped"] < sizes["dense"]
    for room, form in ((sizes["dense"], "dense"), (sizes["dense"] - 1, "grouped"), (sizes["grouped"] - 1, "none")):
        (decision,) = choose(model(*rows), site, growth=1 + room / 1000)
        assert decision.form == form
    useless = [row(site, f, ms) for f, ms in (("none", 4.0), ("grouped", 3.9), ("dense", 1.0))]
    (decision,) = choose(model(*useless), site, growth=1 + (sizes["dense"] - 1) / 1000)
    assert decision.form == "none"


TIMES = st.floats(0.1, 10.0)
NETWORKS = st.lists(
    st.tuples(
        st.integers(1, 40), st.sampled_from([7, 9, 31]), st.integers(1, 14), st.integers(1, 14), TIMES, TIMES, TIMES
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda layer: layer[0],
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(layers=NETWORKS, growth=st.floats(1, 500))
def test_the_weights_stay_within_what_they_may_grow(layers: list[tuple], growth: float) -> None:
    sites, rows = [], []
    for channels, kernel, high, wide, *times in layers:
        sites.append(place(channels, kernel, high, wide))
        rows += [row(sites[-1], form, ms) for form, ms in zip(FACTORS, times, strict=True)]
    found = model(*rows)
    free, bound = choose(found, *sites), choose(found, *sites, growth=growth)
    assert sum(map(added, bound)) <= (growth - 1) * 1000
    assert bound == free or sum(map(added, free)) > (growth - 1) * 1000
    for one, best in zip(bound, free, strict=True):
        assert one.site == best.site
        assert one.form == "none" or one.ms[one.form] <= costs.MEASURED * one.ms["none"]
        assert one == best or ("times the weights" in one.why and added(one) < added(best))
        assert one == best or added(best) > 0


def test_what_was_measured_here_comes_before_what_came_with_the_package(tmp_path: Path) -> None:
    theirs = next(c for c in SHIPPED[-1].costs if c.form == "none")
    assert costs.calibrations(tmp_path) == SHIPPED
    site = costs._site(theirs)
    own = known(
        row(site, "none", 1e6, theirs.batch, runtime=theirs.runtime, precision=theirs.precision, device=theirs.device),
        row(site, "grouped", 1.0, theirs.batch, runtime=theirs.runtime, precision=theirs.precision,
            device=theirs.device),
    )  # fmt: skip
    costs.add(tmp_path / costs.FILE, own)
    found = costs.calibrations(tmp_path)
    assert found == (own, *SHIPPED)
    times, _ = Model(found, theirs.runtime, theirs.device, theirs.precision).times(site, theirs.batch)
    assert times == {"none": 1e6, "grouped": 1.0}


def test_a_calibration_replaces_what_the_record_said_of_the_same_layers(tmp_path: Path) -> None:
    path = tmp_path / "runs" / costs.FILE
    first = [row(LAYERS[0], "none", 1.0), row(LAYERS[0], "grouped", 2.0), row(LAYERS[0], "none", 3.0, 4)]
    costs.add(path, known(*first))
    assert costs.read(path) == known(*first)
    later = Calibration(
        environment={"cpu": "another"},
        costs=(row(LAYERS[0], "none", 9.0), row(LAYERS[0], "none", 8.0, precision="fp16"), row(LAYERS[1], "none", 7.0)),
    )
    costs.add(path, later)
    found = costs.read(path)
    assert found.environment == {"cpu": "another"}
    assert set(found.costs) == {*first[1:], *later.costs}
    assert len(found.costs) == 5


def spoilt(change: Mapping[str, object]) -> str:
    said = {"runtime": "torch", "device": "cpu", "precision": "fp32", "batch": 1, "channels": 2, "taps": [7, 7]}
    cost = said | {"map": [8, 8], "form": "none", "ms": 1.0} | change
    kept = {name: value for name, value in cost.items() if value is not None}
    return json.dumps({"schema": "replk.calibration/1", "environment": {}, "costs": [kept]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": "replk.calibration/1"}',
        '{"schema": "replk.calibration/1", "environment": {}, "costs": 3}',
        '{"schema": "replk.calibration/99", "environment": {}, "costs": []}',
        '{"schema": "replk.bench/1", "environment": {}, "costs": []}',
        spoilt({"form": None}),
        spoilt({"colour": "red"}),
        spoilt({"taps": [7]}),
        spoilt({"map": 8}),
        spoilt({"ms": "fast"}),
    ],
)
def test_a_record_that_cannot_be_read_is_neither_used_nor_written_over(text: str, tmp_path: Path) -> None:
    path = tmp_path / costs.FILE
    path.write_text(text)
    for use in (lambda: costs.calibrations(tmp_path), lambda: costs.add(path, MEASURED)):
        with pytest.raises(IntegrityError) as caught:
            use()
        assert (caught.value.code, bool(caught.value.remedy)) == (Exit.INTEGRITY, True)
    assert path.read_text() == text
    path.write_text(spoilt({}))
    assert len(costs.calibrations(tmp_path)[0].costs) == 1


def test_every_record_in_the_folder_of_the_package_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(costs, "resources", SimpleNamespace(files=lambda _package: tmp_path))
    for name, one in (("b", SHIPPED[0]), ("a", MEASURED)):
        costs.add(tmp_path / "calibrations" / f"{name}.json", one)
    assert costs.calibrations() == (MEASURED, SHIPPED[0])


def test_without_any_record_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(costs, "resources", SimpleNamespace(files=lambda _package: tmp_path))
    assert costs.calibrations(tmp_path) == ()


def test_what_comes_with_the_package_never_chooses_what_was_measured_slower() -> None:
    assert len(SHIPPED) == 2
    seen = 0
    for calibration in SHIPPED:
        for key in {(c.runtime, c.device, c.precision, c.batch) for c in calibration.costs}:
            runtime, device, precision, batch = key
            rows = [c for c in calibration.costs if (c.runtime, c.device, c.precision, c.batch) == key]
            times: dict[LargeConv, dict[str, float]] = {}
            for cost in rows:
                times.setdefault(costs._site(cost), {})[cost.form] = cost.ms
            assert all("none" in forms for forms in times.values())
            found = Model([calibration], runtime, device, precision)
            for decision in decide(
                list(times), found, batch=batch, precision=precision, weight_bytes=1, max_growth=math.inf
            ):
                met = times[decision.site]
                assert met[decision.form] <= met["none"], (key, decision)
                assert decision.ms[decision.form] == met[decision.form]
                seen += decision.form != "none"
    assert seen > 20


def test_a_batch_of_64_on_an_h100_rewrites_every_large_convolution() -> None:
    network = RepLKNet.empty(VARIANTS["RepLKNet-31B"], "folded")
    sites = lower.find_network(network, (224, 224))
    assert len(sites) == 24
    itemsize = TOLERANCES["fp16"].torch_dtype.itemsize
    size = itemsize * sum(p.numel() for p in network.parameters())
    found = Model(SHIPPED, "ort-cuda", GPU, "fp16")
    chosen = {
        batch: decide(sites, found, batch=batch, precision="fp16", weight_bytes=size, max_growth=GROWTH)
        for batch in (1, 64)
    }
    assert all(d.form != "none" for d in chosen[64])
    assert all(d.measured for batch in chosen for d in chosen[batch])
    assert all(d.ms[d.form] <= d.ms["none"] for batch in chosen for d in chosen[batch])
    assert sum(map(added, chosen[64])) / 4 * itemsize <= (GROWTH - 1) * size


@pytest.mark.parametrize(("device", "form"), [(GPU, "grouped"), ("NVIDIA L4", "none")])
def test_what_another_gpu_showed_must_gain_as_much_as_a_fit(device: str, form: str) -> None:
    at = {"runtime": "ort-cuda", "precision": "fp16", "device": GPU}
    rows = [row(LAYERS[0], "none", 2.0, **at), row(LAYERS[0], "grouped", 1.6, **at)]
    found = Model([known(*rows)], "ort-cuda", device, "fp16")
    (decision,) = decide([LAYERS[0]], found, batch=1, precision="fp16", weight_bytes=1000, max_growth=math.inf)
    assert (decision.form, decision.measured) == (form, device == GPU)
