"""Clocks through a false NVML: what is read, what is missing, what is lost, and what a measurement makes of it."""

import json
import os
import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from replk_deploy import bench, clocks, machine
from replk_deploy.clocks import Blind, Reading, Sampler
from replk_deploy.errors import UnavailableError
from tests.test_bench import FakeClock, Queued, entrant

NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, GPU_IS_LOST = 3, 4, 13, 15
UUID = "GPU-11111111-2222-3333-4444-555555555555"


def processes(*pids: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid) for pid in pids]


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return {12: "NVML Shared Library Not Found", GPU_IS_LOST: "GPU is lost"}.get(self.value, f"code {self.value}")


class FakeNvml(ModuleType):
    """Two GPUs; `answers` may be changed to another value, a function of the arguments, or an NVMLError."""

    NVMLError = NVMLError
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION = NOT_SUPPORTED, NO_PERMISSION
    NVML_ERROR_FUNCTION_NOT_FOUND = FUNCTION_NOT_FOUND

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.open = 0
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetHandleByIndex": lambda index: f"card {index}",
            "nvmlDeviceGetHandleByUUID": lambda uuid: f"card {uuid}",
            "nvmlSystemGetDriverVersion": "580.12",
            "nvmlSystemGetCudaDriverVersion": 12080,
            "nvmlDeviceGetName": lambda handle: f"A {handle}",
            "nvmlDeviceGetUUID": UUID,
            "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * 2**30),
            "nvmlDeviceGetEccMode": [1, 0],
            "nvmlDeviceGetMigMode": [0, 1],
            "nvmlDeviceGetPersistenceMode": 1,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetMaxClockInfo": lambda _, which: {1: 1980, 2: 2619}[which],
            "nvmlDeviceGetApplicationsClock": lambda _, which: {1: 1500, 2: 2619}[which],
            "nvmlDeviceGetClockInfo": lambda _, which: {1: 1755, 2: 2600}[which],
            "nvmlDeviceGetPowerUsage": 345_678,
            "nvmlDeviceGetTemperature": lambda _, sensor: {0: 61}[sensor],
            "nvmlDeviceGetCurrentClocksEventReasons": 0x4 | 0x40,
            "nvmlDeviceGetComputeRunningProcesses": processes(os.getpid(), 1),
        }

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answers = self.__dict__.get("answers", {})
        if name not in answers:
            raise AttributeError(name)

        def ask(*args: Any) -> Any:
            self.asked.append((name, args))
            self.open += {"nvmlInit": 1, "nvmlShutdown": -1}.get(name, 0)
            answer = answers[name]
            if isinstance(answer, Exception):
                raise answer
            return answer(*args) if callable(answer) else answer

        return ask


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def look(nvml: FakeNvml) -> Reading:
    del nvml
    return clocks._Gpu(None).read(7)


# ── what is read ─────────────────────────────────────────────────────────────────────────────────


def test_a_reading_has_units_and_names(nvml: FakeNvml) -> None:
    assert look(nvml) == Reading(
        at_ns=7,
        sm_mhz=1755,
        memory_mhz=2600,
        power_w=345.7,
        temperature_c=61,
        events=frozenset({"software power cap", "hardware thermal slowdown"}),
        others=1,
    )


def test_the_bits_are_those_of_the_binding() -> None:
    import pynvml

    names = {
        "GpuIdle": "idle",
        "ApplicationsClocksSetting": "applications clocks",
        "SwPowerCap": "software power cap",
        "HwSlowdown": "hardware slowdown",
        "SyncBoost": "sync boost",
        "SwThermalSlowdown": "software thermal slowdown",
        "HwThermalSlowdown": "hardware thermal slowdown",
        "HwPowerBrakeSlowdown": "hardware power brake",
        "DisplayClockSetting": "display clock",
    }
    said = {getattr(pynvml, f"nvmlClocksEventReason{name}"): ours for name, ours in names.items()}
    assert said.items() <= clocks.EVENTS.items()
    assert set(clocks.EVENTS.values()) >= clocks.HARDWARE | {clocks.POWER_CAP}
    assert (clocks.SM, clocks.MEMORY) == (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM)
    assert pynvml.NVML_TEMPERATURE_GPU == clocks.CORE_SENSOR


def test_every_question_exists_in_the_binding(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks.facts()
    clocks.facts(UUID)
    nvml.answers["nvmlDeviceGetCurrentClocksEventReasons"] = NVMLError(FUNCTION_NOT_FOUND)
    look(nvml)
    asked = {name for name, _ in nvml.asked} | {"nvmlDeviceGetCurrentClocksThrottleReasons"}
    monkeypatch.undo()
    import pynvml

    assert len(asked) > 18
    assert [name for name in asked if not callable(getattr(pynvml, name, None))] == []


def test_the_facts_of_a_gpu_name_no_card(nvml: FakeNvml) -> None:
    found = clocks.facts()
    assert found == {
        "gpu": "A card 0",
        "gpu_id": found["gpu_id"],
        "gpu_compute_capability": "9.0",
        "gpu_memory_mib": 81920,
        "gpu_driver": "580.12",
        "gpu_driver_cuda": "12.8",
        "gpu_ecc": "on",
        "gpu_mig": "off",
        "gpu_persistence": "on",
        "gpu_power_limit_w": 700.0,
        "gpu_sm_mhz_max": 1980,
        "gpu_memory_mhz_max": 2619,
        "gpu_sm_mhz_set": 1500,
        "gpu_processes": 2,
    }
    assert len(found["gpu_id"]) == 12
    assert "11111111" not in json.dumps(found)
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("visible", "card"), [(None, "card 0"), ("1", "card 1"), ("1,0", "card 1"), (f"{UUID},1", f"card {UUID}")]
)
def test_the_gpu_is_the_first_that_cuda_sees(nvml: FakeNvml, visible: str | None, card: str) -> None:
    assert clocks.facts(visible)["gpu"] == f"A {card}"
    assert nvml.open == 0


@pytest.mark.parametrize("visible", [None, "0", "1", "3,1"])
def test_the_gpu_that_pytorch_uses_is_read_whatever_its_number(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.gpu_in_use() == visible
    uuids = ["00000000-0000-0000-0000-000000000000", UUID.removeprefix("GPU-")]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))
    assert machine.environment()["gpu"] == f"A card {UUID}"
    assert "nvmlDeviceGetHandleByIndex" not in {name for name, _ in nvml.asked}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-22")
    assert machine.gpu_in_use() == "MIG-22"


@pytest.mark.parametrize("visible", ["", "-1", " "])
def test_hidden_gpus_stay_hidden(nvml: FakeNvml, visible: str) -> None:
    found = clocks.facts(visible)
    assert (found["gpu"], "hides every GPU" in found["gpu_why"]) == (None, True)
    assert nvml.asked == []


# ── what is missing ──────────────────────────────────────────────────────────────────────────────


def test_without_the_binding_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = machine.environment()
    assert found["gpu"] is None
    assert found["gpu_why"] == "nvidia-ml-py is not installed (pip install 'replk-deploy[machine]')"
    with clocks.watching() as watch:
        assert watch.stopped == "nvidia-ml-py is not installed"
        assert watch.between(0, 10**18) == ()


def test_without_a_driver_the_environment_says_so(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml.answers["nvmlInit"] = NVMLError(12)
    assert "Shared Library Not Found" in machine.environment()["gpu_why"]
    with clocks.watching() as watch:
        assert isinstance(watch, Blind)


@pytest.mark.parametrize("code", [NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, None])
@pytest.mark.parametrize(
    ("question", "field", "empty"),
    [
        ("nvmlDeviceGetClockInfo", "sm_mhz", None),
        ("nvmlDeviceGetPowerUsage", "power_w", None),
        ("nvmlDeviceGetTemperature", "temperature_c", None),
        ("nvmlDeviceGetComputeRunningProcesses", "others", None),
        ("nvmlDeviceGetCurrentClocksEventReasons", "events", frozenset()),
    ],
)
def test_what_a_gpu_or_binding_does_not_tell_is_none_and_the_rest_is_there(
    nvml: FakeNvml, question: str, field: str, empty: object, code: int | None
) -> None:
    whole = look(nvml)
    if code is None:
        del nvml.answers[question]
    else:
        nvml.answers[question] = NVMLError(code)
    found = look(nvml)
    assert getattr(found, field) == empty
    lost = {field, "memory_mhz"} if field == "sm_mhz" else {field}
    assert {f for f in Reading.__dataclass_fields__ if getattr(found, f) != getattr(whole, f)} == lost


def test_an_older_driver_knows_the_events_by_their_older_name(nvml: FakeNvml) -> None:
    nvml.answers["nvmlDeviceGetCurrentClocksEventReasons"] = NVMLError(FUNCTION_NOT_FOUND)
    nvml.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 0x8
    assert look(nvml).events == {"hardware slowdown"}


def test_facts_that_are_not_told_are_none(nvml: FakeNvml) -> None:
    for name in list(nvml.answers):
        if name.startswith(("nvmlDeviceGet", "nvmlSystemGet")) and "Handle" not in name:
            nvml.answers[name] = NVMLError(NOT_SUPPORTED)
    assert set(clocks.facts().values()) == {None}


def test_others_are_counted_only_where_ours_is_shown_among_them(nvml: FakeNvml) -> None:
    ours = os.getpid()
    for shown, others in ((), None), ((ours,), 0), ((1, ours, 2), 2), ((1,), None), ((1, 2), None):
        nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = processes(*shown)
        assert look(nvml).others == others


# ── what is lost ─────────────────────────────────────────────────────────────────────────────────


def test_a_gpu_that_is_lost_ends_the_readings_and_is_said(nvml: FakeNvml) -> None:
    ticks = iter(range(10))
    sampler = Sampler(clocks._Gpu(None).read, lambda: next(ticks), period_s=0)
    assert (sampler.take(), sampler.take()) == (True, True)
    nvml.answers["nvmlDeviceGetTemperature"] = NVMLError(GPU_IS_LOST)
    sampler.run()  # comes back by itself
    assert "GPU is lost" in sampler.stopped
    assert [reading.at_ns for reading in sampler.between(0, 10)] == [0, 1]
    found = clocks.series(sampler, 0, 10)
    assert (len(found.t_s), found.stopped) == (2, sampler.stopped)


def test_a_gpu_that_is_lost_when_described_is_said(nvml: FakeNvml) -> None:
    nvml.answers["nvmlDeviceGetName"] = NVMLError(GPU_IS_LOST)
    nvml.answers["nvmlShutdown"] = NVMLError(GPU_IS_LOST)
    assert "GPU is lost" in clocks.facts()["gpu_why"]


def test_nvml_is_left_when_the_gpu_asked_for_is_not_there(nvml: FakeNvml) -> None:
    nvml.answers["nvmlDeviceGetHandleByIndex"] = NVMLError(6)
    assert "nvmlDeviceGetHandleByIndex" in clocks.facts("5")["gpu_why"]
    assert nvml.open == 0


# ── the side thread ──────────────────────────────────────────────────────────────────────────────


def test_a_thread_reads_while_the_block_lasts_and_ends_with_it(nvml: FakeNvml) -> None:
    read = threading.Event()
    answer = nvml.answers["nvmlDeviceGetClockInfo"]
    nvml.answers["nvmlDeviceGetClockInfo"] = lambda *args: (read.set(), answer(*args))[1]
    with clocks.watching() as watch:
        assert read.wait(60)
        assert any(t.name == "replk-clocks" for t in threading.enumerate())
    assert not any(t.name == "replk-clocks" for t in threading.enumerate())
    assert watch.between(0, 10**30)[0].sm_mhz == 1755
    assert nvml.open == 0


def test_the_thread_ends_when_the_block_is_left_by_an_error(nvml: FakeNvml) -> None:
    with pytest.raises(KeyboardInterrupt), clocks.watching():
        raise KeyboardInterrupt
    assert not any(t.name == "replk-clocks" for t in threading.enumerate())
    assert nvml.open == 0


def test_a_stretch_of_time_has_its_own_readings() -> None:
    ticks = iter(range(0, 100, 10))
    sampler = Sampler(lambda at_ns: Reading(at_ns=at_ns), lambda: next(ticks))
    while next_one := sampler.take():
        if len(sampler.between(0, 100)) == 10:
            break
    assert next_one
    assert [r.at_ns for r in sampler.between(20, 40)] == [20, 30, 40]
    assert [r.at_ns for r in sampler.between(85, 1000)] == [90]
    assert sampler.between(91, 1000) == sampler.between(41, 49) == []


def test_a_race_on_a_gpu_is_watched_by_nvml_and_one_on_a_cpu_is_not(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    clock = FakeClock()
    bench.measure([entrant("a", Queued(clock, 50.0))], clock=clock)
    handles = [args for name, args in nvml.asked if name == "nvmlDeviceGetClockInfo"]
    assert handles == []
    read = threading.Event()
    nvml.answers["nvmlDeviceGetClockInfo"] = lambda *_: (read.set(), 1000.0)[1]
    launch = Queued(clock, 50.0)
    first, enqueue = iter([True]), launch.enqueue
    launch.enqueue = lambda: (read.wait(60) if next(first, False) else None, enqueue())
    result = bench.measure([entrant("a", launch, device="cuda")], clock=clock)
    assert ("nvmlDeviceGetClockInfo", ("card 1", clocks.SM)) in nvml.asked
    assert result.gpu.sm_mhz[0] == 1000.0
    assert result.environment["gpu"] == "A card 1"


# ── the record ───────────────────────────────────────────────────────────────────────────────────


class Listed:
    stopped = None

    def __init__(self, readings: list[Reading]) -> None:
        self.readings = readings

    def between(self, start_ns: int, end_ns: int) -> list[Reading]:
        return [r for r in self.readings if start_ns <= r.at_ns <= end_ns]


def test_a_long_series_is_thinned_and_loses_no_event_and_no_heat() -> None:
    readings = [Reading(at_ns=i * 10**9, sm_mhz=1000.0 + i % 3, temperature_c=50.0, others=0) for i in range(1700)]
    readings[1234] = Reading(
        at_ns=1234 * 10**9, temperature_c=95.0, events=frozenset({"hardware slowdown", "idle"}), others=1
    )
    found = clocks.series(Listed(readings), 0, 10**18)
    assert found.each == 3
    assert {len(column) for column in (found.t_s, found.sm_mhz, found.power_w, found.events, found.others)} == {567}
    assert set(found.sm_mhz[:411]) == {1001.0}
    assert found.t_s[1] == 3.0
    assert [i for i, e in enumerate(found.events) if e == "hardware slowdown, idle"] == [1234 // 3]
    assert (max(found.temperature_c), max(found.others), set(found.power_w)) == (95.0, 1, {None})


def test_times_count_from_the_start_and_only_what_lies_between_is_kept() -> None:
    readings = [Reading(at_ns=i * 10**9) for i in range(10)]
    assert clocks.series(Listed(readings), 3 * 10**9, 5 * 10**9).t_s == (0.0, 1.0, 2.0)
    assert clocks.series(Listed([]), 0, 1) is None


def test_a_median_leaves_out_what_is_not_known() -> None:
    assert clocks.median([None, 3.0, 1.0, None, 2.0]) == 2.0
    assert clocks.median([None]) is None


def test_no_answer_of_nvml_passes_for_a_failure_of_ours(nvml: FakeNvml) -> None:
    nvml.answers["nvmlDeviceGetPowerUsage"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        look(nvml)
    nvml.answers["nvmlDeviceGetPowerUsage"] = NVMLError(999)
    with pytest.raises(UnavailableError, match="nvmlDeviceGetPowerUsage says: code 999"):
        look(nvml)
