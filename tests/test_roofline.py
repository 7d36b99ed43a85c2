"""The limits of a device, on a fake clock; what the real one says is never asserted."""

import itertools
import json

import pytest
import torch

from replk_deploy import records, roofline
from replk_deploy.errors import Exit, UnavailableError
from replk_deploy.roofline import Roofline, measure


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "COPY_MIB", 1)
    monkeypatch.setitem(roofline.SIDES, "cpu", 10)


class Watch:
    """A clock on which each try lasts as long as is written down for it, then the last entry for ever."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.calls = 0, itertools.count()
        self.lasts = itertools.chain(seconds, itertools.repeat(seconds[-1]))

    def __call__(self) -> int:
        if next(self.calls) % 2:
            self.now += int(next(self.lasts) * 1e9)
        return self.now


def made(**changes: object) -> Roofline:
    fields = {"device": "cpu", "precision": "fp32", "computes": "float32", "threads": 1, "copied_bytes": 4 * 10**9}
    return Roofline(**(fields | {"copy_s": (3.0, 2.0), "flop": 10**12, "product_s": (8.0, 4.0)} | changes))


def test_the_best_try_counts() -> None:
    found = made()
    assert (found.copy_gbps, found.matrix_gflops) == (2.0, 250.0)


@pytest.mark.parametrize(
    ("moved", "macs", "ms"),
    [(2 * 10**9, 0, 1000.0), (0, 125 * 10**9, 1000.0), (2 * 10**6, 10**9, 8.0), (20 * 10**6, 10**9, 10.0), (0, 0, 0.0)],
)
def test_a_layer_needs_the_longer_of_moving_and_multiplying(moved: int, macs: int, ms: float) -> None:
    assert made().attainable_ms(moved_bytes=moved, macs=macs) == pytest.approx(ms)


def test_both_limits_are_read_off_the_clock() -> None:
    found = measure("fp32", clock=Watch(0.5, *[0.25] * 6, 0.1))
    assert found.copied_bytes == 2 * 2**20
    assert found.copy_gbps == pytest.approx(2 * 2**20 / 0.25 / 1e9)
    assert found.flop == 2000
    assert found.matrix_gflops == pytest.approx(2000 / 0.1 / 1e9)
    assert (found.computes, found.threads) == ("float32", torch.get_num_threads())
    assert len(found.copy_s) == len(found.product_s) == roofline.TRIES


@pytest.mark.parametrize(("half", "single", "computes"), [(0.4, 0.1, "float32"), (0.1, 0.4, "float16")])
def test_a_processor_may_be_faster_in_float32(half: float, single: float, computes: str) -> None:
    tries = [0.25] * roofline.TRIES
    found = measure("fp16", clock=Watch(*tries, *[half] * min(roofline.TRIES, round(2 / half)), single))
    assert (found.computes, found.precision) == (computes, "fp16")
    assert found.matrix_gflops == pytest.approx(2000 / 0.1 / 1e9)


def test_slow_arithmetic_is_not_tried_seven_times() -> None:
    found = measure("bf16", clock=Watch(*[0.25] * roofline.TRIES, 5.0))
    assert found.product_s == (5.0,)


def test_what_is_multiplied_is_of_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, int]] = []
    multiply = torch.mm

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append((a.dtype, a.numel()))
        return multiply(a, b)

    monkeypatch.setattr(torch, "mm", watched)
    measure("bf16", clock=Watch(1.0))
    assert set(seen) == {(torch.bfloat16, 100), (torch.float32, 100)}
    seen.clear()
    measure("tf32", clock=Watch(1.0))
    assert set(seen) == {(torch.float32, 100)}


def test_a_gpu_that_is_not_there_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError) as caught:
        measure("fp16", device="cuda")
    assert caught.value.code == Exit.UNAVAILABLE


def test_the_record_holds_every_try_and_what_follows() -> None:
    record = json.loads(records.to_json(made()))
    assert (record["schema"], record["copy_gbps"], record["matrix_gflops"]) == ("replk.roofline/1", 2.0, 250.0)
    assert record["copy_s"] == [3.0, 2.0]


def test_the_real_clock_gives_positive_rates() -> None:
    found = measure("fp32")
    assert found.copy_gbps > 0
    assert found.matrix_gflops > 0
