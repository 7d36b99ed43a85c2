"""What is timed is the convolution between its neighbours, in each form; a time is what it adds to theirs."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from replk_deploy import backends, calibrate, costs
from replk_deploy.backends import cuda
from replk_deploy.backends.base import Array, Backend, Launch
from replk_deploy.backends.ort import OrtCpu
from replk_deploy.backends.torch import LAYOUTS, Torch
from replk_deploy.costs import Cost
from replk_deploy.errors import UnavailableError
from replk_deploy.lowerings import dense, grouped, strip
from replk_deploy.lowerings.base import LargeConv
from tests.test_lowerings import BUGS

HIGH = LargeConv(name="high", channels=3, kernel=(9, 9), map=(40, 5))  # high enough for strips
LOW = LargeConv(name="low", channels=2, kernel=(13, 13), map=(4, 6))  # 7x11 of the kernel touch the map
ALL, USUAL = ["none", "grouped", "dense", "strip"], ["none", "grouped", "dense"]
ROUND_OFF = 1e-5
every = pytest.mark.parametrize("kind", [OrtCpu, Torch])


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take next to no time over times that nobody will read, on a machine without a GPU."""
    for name, value in {"STRETCH_MS": 0.01, "STRETCHES": 1, "WARM_UPS": 1}.items():
        monkeypatch.setattr(calibrate, name, value)
    monkeypatch.setattr(cuda, "available", lambda: False)


def measured(kind: type[Backend], *sites: LargeConv, batches: tuple[int, ...] = (1,)) -> tuple[Cost, ...]:
    return calibrate.calibrate(kind, sites, batches=batches, precision="fp32").costs


@every
def test_each_form_of_each_unlike_layer_gets_one_time_at_each_batch(kind: type[Backend]) -> None:
    twin = LargeConv(name="twin", channels=2, kernel=(51, 11), map=(4, 6))  # other taps, none of which touch the map
    found = measured(kind, HIGH, LOW, twin, batches=(1, 3))
    layers = [(HIGH, n, form) for n in (1, 3) for form in ALL] + [(LOW, n, form) for n in (1, 3) for form in USUAL]
    assert [(c.channels, c.taps, c.map, c.batch, c.form) for c in found] == [
        (site.channels, site.taps, site.map, batch, form) for site, batch, form in layers
    ]
    assert LOW.taps == (7, 11)
    assert {(c.runtime, c.device, c.precision) for c in found} == {(kind.name, calibrate.device_name("cpu"), "fp32")}
    assert all(c.ms > 0 for c in found)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inside inductor
def test_a_compiler_is_measured_as_eager_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = backends.find("torch-compile")
    monkeypatch.setattr(kind, "probe", classmethod(lambda _cls: {}))
    assert {c.runtime for c in measured(kind, LOW)} == {"torch"} == {costs.ALIKE[kind.name]}


def errors(kind: type[Backend], site: LargeConv, patch: pytest.MonkeyPatch) -> list[float]:
    """Return how far each thing that is timed is from what it stands for: convolution, neighbours, other forms."""
    rng = np.random.default_rng(calibrate.SEED)
    x = torch.from_numpy(rng.standard_normal((2, site.channels, *site.map), np.float32))
    kernel = torch.from_numpy(rng.standard_normal((site.channels, 1, *site.kernel), np.float32))
    mixer = torch.from_numpy(rng.standard_normal((site.channels, site.channels, 1, 1), np.float32))
    kernel, mixer = kernel / math.prod(site.kernel), mixer / site.channels**0.5
    margin = (site.kernel[0] // 2, site.kernel[1] // 2)
    before = functional.conv2d(x, mixer).relu()
    between = functional.conv2d(before, kernel, padding=margin, groups=site.channels).relu()
    alone, whole = (functional.conv2d(y, mixer).numpy() for y in (before, between))
    off: list[float] = []
    layouts = len(LAYOUTS) if kind is Torch else 1

    def look(launch: Launch, *, queue: bool) -> float:
        assert not queue, "a CPU has no queue"
        launch.enqueue()
        launch.wait()
        (got,) = launch.answers()
        wanted = alone if len(off) // layouts == 1 else whole
        assert got.shape == wanted.shape
        off.append(float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)))
        return 1.0

    patch.setattr(calibrate, "stretch_ms", look)
    measured(kind, site, batches=(2,))
    return [max(off[at : at + layouts]) for at in range(0, len(off), layouts)]


@every
@pytest.mark.parametrize(("site", "forms"), [(HIGH, ALL), (LOW, USUAL)], ids=["high", "low"])
def test_what_is_timed_computes_the_convolution(
    kind: type[Backend], site: LargeConv, forms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    off = errors(kind, site, monkeypatch)
    assert len(off) == len(forms) + 1
    assert max(off) <= ROUND_OFF


@every
def test_a_wrong_weight_is_seen(kind: type[Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    for home in (grouped, dense, strip):
        monkeypatch.setattr(home, "centre", BUGS["P + 1 in rows"])
    convolution, neighbours, *forms = errors(kind, HIGH, monkeypatch)
    assert max(convolution, neighbours) <= ROUND_OFF
    assert min(forms) > 1e-2


def test_a_time_is_what_a_form_adds_to_its_neighbours_in_the_layout_of_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([*(5.0, 4.0), *(1.0, 1.5), *(2.0, 3.75), *(0.1, 1.25)])  # both layouts: none, neighbours, forms
    monkeypatch.setattr(calibrate, "stretch_ms", lambda _launch, *, queue: next(times))  # noqa: ARG005
    assert {c.form: c.ms for c in measured(Torch, LOW)} == {"none": 2.5, "grouped": 2.25, "dense": 0.0125}


def refusing(patch: pytest.MonkeyPatch, which: Callable[[list[str]], bool]) -> None:
    """Let ONNX Runtime open no file whose operators are such."""
    honest: Any = OrtCpu.__init__

    def opened(self: OrtCpu, path: Path, *rest: Any) -> None:
        if which([node.op_type for node in onnx.load(path).graph.node]):
            raise UnavailableError("no kernel for it", "take another")
        honest(self, path, *rest)

    patch.setattr(OrtCpu, "__init__", opened)


def test_a_form_that_the_runtime_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, lambda operators: "MatMul" in operators)
    assert [c.form for c in measured(OrtCpu, LOW)] == ["none", "grouped"]


def test_a_convolution_that_the_runtime_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="no CPU kernels for bf16"):
        calibrate.calibrate(OrtCpu, [LOW], batches=(1,), precision="bf16")
    refusing(monkeypatch, lambda operators: operators == ["Conv", "Relu"] * 2 + ["Conv"])
    with pytest.raises(UnavailableError, match="no kernel for it"):
        measured(OrtCpu, LOW)


class Queue:
    """A launch on a device: 2 ms to hand over one inference, 3 ms to wait for what is left."""

    def __init__(self) -> None:
        self.now, self.log = 0, ""

    def enqueue(self) -> None:
        self.now, self.log = self.now + 2_000_000, f"{self.log}e"

    def wait(self) -> None:
        self.now, self.log = self.now + 3_000_000, f"{self.log}w"

    def answers(self) -> list[Array]:
        return []


@pytest.mark.parametrize(
    ("queue", "log", "ms"), [(True, "ew" + 2 * "eeeew", 11 / 4), (False, "eww" + 2 * "eweweww", 18 / 3)]
)
def test_inferences_on_a_device_are_waited_for_together(
    queue: bool,  # noqa: FBT001
    log: str,
    ms: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch = Queue()
    monkeypatch.setattr(calibrate, "time", SimpleNamespace(perf_counter_ns=lambda: launch.now))
    for name, value in {"STRETCH_MS": 20.0, "STRETCHES": 2}.items():
        monkeypatch.setattr(calibrate, name, value)
    assert (calibrate.stretch_ms(launch, queue=queue), launch.log) == (ms, log)
