"""What an NVIDIA GPU's clocks did, read through NVML on a side thread; the only importer of `pynvml`.

A GPU lowers its clocks by itself: for heat, for a power brake, for its power limit. A latency says
nothing of that, so each stretch of a measurement is laid beside what was read during it. On a machine
without GPU, driver or binding there is nothing to read, and the reason is kept.

Read on an H100 with driver 580; the tests plant a false module.
"""

import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, final

from replk_deploy import optional
from replk_deploy.errors import UnavailableError

PERIOD_S = 0.05  # 20 readings a second, two in a window of 100 ms
POINTS = 600  # entries that a record keeps; more are thinned
EVENTS = {  # NVML's bits; their order and names have not changed since they appeared
    0x001: "idle",
    0x002: "applications clocks",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clock",
    0x200: "board limit",
    0x400: "reliability",
}
HARDWARE = frozenset({"hardware slowdown", "hardware thermal slowdown", "hardware power brake"})
POWER_CAP = "software power cap"
SM, MEMORY, CORE_SENSOR = 1, 2, 0  # NVML's numbers of two clocks and of the only sensor
ON_OFF = {0: "off", 1: "on"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One look at a GPU; None where it does not tell.

    Attributes:
        at_ns: on the clock of the measurement.
        events: why the clocks are not higher, by the names of EVENTS.
        others: compute processes beside ours; None also where ours is not among those shown.
    """

    at_ns: int
    sm_mhz: float | None = None
    memory_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    events: frozenset[str] = frozenset()
    others: int | None = None


class Watch(Protocol):
    """Knows what was read; `stopped` says why nothing more is."""

    @property
    def stopped(self) -> str | None:
        """Return why readings ended or never began; None while they come."""

    def between(self, start_ns: int, end_ns: int) -> Sequence[Reading]:
        """Return the readings of a stretch of time, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Readings in columns, one entry a stretch of `each` readings: medians, but highest heat and all events."""

    each: int
    t_s: tuple[float, ...]
    sm_mhz: tuple[float | None, ...]
    memory_mhz: tuple[float | None, ...]
    power_w: tuple[float | None, ...]
    temperature_c: tuple[float | None, ...]
    events: tuple[str, ...]
    others: tuple[int | None, ...]
    stopped: str | None


@final
class Blind:
    """A watch that sees nothing."""

    def __init__(self, stopped: str | None = None) -> None:
        self.stopped = stopped

    def between(self, start_ns: int, end_ns: int) -> Sequence[Reading]:
        """Return nothing."""
        del start_ns, end_ns
        return ()


@contextmanager
def watching(visible: str | None = None, *, clock: Callable[[], int] = time.perf_counter_ns) -> Iterator[Watch]:
    """Read a GPU 20 times a second until the end of the block; blind, with the reason, where that is impossible.

    Args:
        visible: as CUDA_VISIBLE_DEVICES; its first entry, a UUID or a number of NVML's, is the GPU that is read.
        clock: of the measurement, in nanoseconds.
    """
    try:
        gpu = _Gpu(visible)
    except UnavailableError as exc:
        yield Blind(exc.problem)
        return
    sampler = Sampler(gpu.read, clock)
    thread = threading.Thread(target=sampler.run, name="replk-clocks", daemon=True)
    thread.start()
    try:
        yield sampler
    finally:
        sampler.stop()
        thread.join()
        gpu.close()


def facts(visible: str | None = None) -> dict[str, str | int | float | bool | None]:
    """Describe the GPU that CUDA would take; `gpu` None and `gpu_why` where there is none or it cannot be asked."""
    try:
        gpu = _Gpu(visible)
    except UnavailableError as exc:
        return {"gpu": None, "gpu_why": f"{exc.problem} ({exc.remedy})"}
    try:
        return gpu.facts()
    except UnavailableError as exc:
        return {"gpu": None, "gpu_why": f"{exc.problem} ({exc.remedy})"}
    finally:
        gpu.close()


def median(values: Sequence[float | None]) -> float | None:
    """Return the median of the values that are known; None when none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def series(watch: Watch, start_ns: int, end_ns: int) -> Series | None:
    """Return the readings of a measurement in at most POINTS entries; None when there were none."""
    readings = watch.between(start_ns, end_ns)
    if not readings:
        return None
    each = -(-len(readings) // POINTS)
    groups = [readings[i : i + each] for i in range(0, len(readings), each)]
    return Series(
        each=each,
        t_s=tuple(round((group[0].at_ns - start_ns) / 1e9, 3) for group in groups),
        sm_mhz=tuple(median([r.sm_mhz for r in group]) for group in groups),
        memory_mhz=tuple(median([r.memory_mhz for r in group]) for group in groups),
        power_w=tuple(median([r.power_w for r in group]) for group in groups),
        temperature_c=tuple(
            max((r.temperature_c for r in group if r.temperature_c is not None), default=None) for group in groups
        ),
        events=tuple(", ".join(sorted(frozenset().union(*(r.events for r in group)))) for group in groups),
        others=tuple(max((r.others for r in group if r.others is not None), default=None) for group in groups),
        stopped=watch.stopped,
    )


@final
class Sampler:
    """Takes a reading again and again until told to stop, or until the GPU no longer answers."""

    def __init__(self, read: Callable[[int], Reading], clock: Callable[[], int], period_s: float = PERIOD_S) -> None:
        self.stopped: str | None = None
        self._read, self._clock, self._period_s = read, clock, period_s
        self._end = threading.Event()
        self._taken: list[Reading] = []

    def run(self) -> None:
        """Take readings until stopped; on a thread of its own."""
        while self.take() and not self._end.wait(self._period_s):
            pass

    def take(self) -> bool:
        """Take one reading; return whether another one makes sense."""
        try:
            self._taken.append(self._read(self._clock()))
        except UnavailableError as exc:
            self.stopped = exc.problem
            return False
        return True

    def stop(self) -> None:
        """Take no further reading."""
        self._end.set()

    def between(self, start_ns: int, end_ns: int) -> Sequence[Reading]:
        """Return the readings of a stretch of time, in order."""
        found = []
        for reading in reversed(self._taken):  # the stretch asked for is nearly always the last one
            if reading.at_ns < start_ns:
                break
            if reading.at_ns <= end_ns:
                found.append(reading)
        return found[::-1]


@final
class _Gpu:
    """One GPU through NVML; every failure of NVML leaves as an UnavailableError."""

    def __init__(self, visible: str | None) -> None:
        first = "0" if visible is None else visible.partition(",")[0].strip()
        if not first or first.startswith("-"):
            raise UnavailableError("CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES")
        self._nvml = _nvml()
        self._ask("nvmlInit")
        try:
            self._handle = (
                self._ask("nvmlDeviceGetHandleByIndex", int(first))
                if first.isdecimal()
                else self._ask("nvmlDeviceGetHandleByUUID", first)
            )
        except UnavailableError:
            self.close()
            raise

    def read(self, at_ns: int) -> Reading:
        """Look once; UnavailableError when the GPU no longer answers."""
        power_mw = self._tell("nvmlDeviceGetPowerUsage")
        processes = self._tell("nvmlDeviceGetComputeRunningProcesses")
        return Reading(
            at_ns=at_ns,
            sm_mhz=self._tell("nvmlDeviceGetClockInfo", SM),
            memory_mhz=self._tell("nvmlDeviceGetClockInfo", MEMORY),
            power_w=_scaled(power_mw, 1e-3),
            temperature_c=self._tell("nvmlDeviceGetTemperature", CORE_SENSOR),
            events=self._events(),
            others=_others(processes),
        )

    def facts(self) -> dict[str, str | int | float | bool | None]:
        """Say what a latency depends on; no serial number, and of the UUID only a hash."""
        cuda = self._told("nvmlSystemGetCudaDriverVersion")
        memory, processes = self._tell("nvmlDeviceGetMemoryInfo"), self._tell("nvmlDeviceGetComputeRunningProcesses")
        uuid = self._tell("nvmlDeviceGetUUID")
        capability = self._tell("nvmlDeviceGetCudaComputeCapability")
        return {
            "gpu": self._tell("nvmlDeviceGetName"),
            "gpu_id": hashlib.sha256(uuid.encode()).hexdigest()[:12] if uuid else None,
            "gpu_compute_capability": None if capability is None else ".".join(map(str, capability)),
            "gpu_memory_mib": None if memory is None else memory.total // 2**20,
            "gpu_driver": self._told("nvmlSystemGetDriverVersion"),
            "gpu_driver_cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            "gpu_ecc": _current(self._tell("nvmlDeviceGetEccMode")),
            "gpu_mig": _current(self._tell("nvmlDeviceGetMigMode")),
            "gpu_persistence": ON_OFF.get(self._tell("nvmlDeviceGetPersistenceMode")),
            "gpu_power_limit_w": _scaled(self._tell("nvmlDeviceGetEnforcedPowerLimit"), 1e-3),
            "gpu_sm_mhz_max": self._tell("nvmlDeviceGetMaxClockInfo", SM),
            "gpu_memory_mhz_max": self._tell("nvmlDeviceGetMaxClockInfo", MEMORY),
            "gpu_sm_mhz_set": self._tell("nvmlDeviceGetApplicationsClock", SM),
            "gpu_processes": None if processes is None else len(processes),
        }

    def close(self) -> None:
        """Leave NVML; a GPU that is lost cannot be left properly, and need not be."""
        try:
            self._ask("nvmlShutdown")
        except UnavailableError:
            return

    def _events(self) -> frozenset[str]:
        bits = self._tell("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # the name that drivers before 535 know
            bits = self._tell("nvmlDeviceGetCurrentClocksThrottleReasons")
        return frozenset(name for bit, name in EVENTS.items() if (bits or 0) & bit)

    def _tell(self, name: str, *args: Any) -> Any:
        """Ask about the GPU; None when this GPU, driver or user cannot be told."""
        return self._told(name, self._handle, *args)

    def _told(self, name: str, *args: Any) -> Any:
        try:
            return self._ask(name, *args)
        except _UntoldError:
            return None

    def _ask(self, name: str, *args: Any) -> Any:
        nvml = self._nvml
        function = getattr(nvml, name, None)  # a binding of another year may not have it
        if function is None:
            raise _UntoldError(f"this nvidia-ml-py has no {name}", "pip install --upgrade nvidia-ml-py")
        try:
            return function(*args)
        except nvml.NVMLError as exc:
            silent = {nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND, nvml.NVML_ERROR_NO_PERMISSION}
            kind = _UntoldError if exc.value in silent else UnavailableError
            raise kind(f"NVML's {name} says: {exc}", "see what the driver says: nvidia-smi") from exc


class _UntoldError(UnavailableError):
    """One answer is missing; others may come."""


def _nvml() -> ModuleType:
    return optional.load("pynvml", package="nvidia-ml-py", install="replk-deploy[machine]")


def _others(processes: Sequence[Any] | None) -> int | None:
    """Count the processes beside ours; None where ours is not named: a container may show it under another number."""
    pids = {process.pid for process in processes or ()}
    return len(pids) - 1 if os.getpid() in pids else None


def _current(modes: Sequence[int] | None) -> str | None:
    """Name the first of two modes: the one in force, not the one after a restart."""
    return None if modes is None else ON_OFF.get(modes[0])


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else round(value * factor, 1)
