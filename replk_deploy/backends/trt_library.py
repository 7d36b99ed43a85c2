"""A loaded TensorRT runtime: its log, its threads, and its silent failures turned into errors; loads none itself."""

import functools
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import onnx

from replk_deploy.errors import ReplkError, UnavailableError, first_line
from replk_deploy.progress import Progress

PULSE_S = 0.1  # Ctrl-C is noticed within this time
SHOWN = 3  # errors of a file that are told; the rest is counted
NOISE = ("catchCudaError", "Invalid Node - ")  # lines beside the one that says why
PLACE = re.compile(r"\s*\bIn \S+ at /[^\s)]+")  # where in the runtime's own sources
LOOK = "look at the driver, the GPU and its free memory: nvidia-smi"
T = TypeVar("T")


class Library(NamedTuple):
    """A loaded runtime with its logger, whose silent failures become errors."""

    trt: ModuleType
    log: Any
    name: str

    def ask(self, did: str, call: Callable[[], T | None], remedy: str = LOOK) -> T:
        """Return what the runtime answers; its None, False, negative number or exception is an UnavailableError."""
        since = len(self.log.lines)
        failure: Exception | None = None
        found: T | None = None
        try:
            found = call()
        except (TypeError, RuntimeError) as exc:  # what its bindings raise
            failure = exc
        if found is None or found is False or (isinstance(found, int) and found < 0):
            why = self.log.cause(since) or (first_line(failure) if failure else "it gives no reason")
            raise UnavailableError(f"{self.name} {did}: {why}", remedy) from failure
        return found

    def kept(self, what: str, asked: float, found: float) -> None:
        """Raise ReplkError unless a setting, read back, is what was asked for."""
        if asked != found:
            raise ReplkError(f"{self.name} refuses {what} {asked:g} and keeps {found:g}", "choose another value")

    def switch(self, config: Any, flag: Any, *, on: bool) -> None:
        """Set a builder's flag or clear it, whatever it was."""
        if on:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)
        self.kept(f"flag {flag.name}", on, config.get_flag(flag))

    def refusal(self, source: Path, parser: Any) -> ReplkError:
        """Turn a parser's errors into ours; a sound file is not to blame for what the runtime lacks."""
        errors = [_told(parser.get_error(index)) for index in range(parser.num_errors)]
        words = "; ".join(told.words for told in errors[:SHOWN]) or "there is no network in it"
        words += f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
        if any(told.lacking for told in errors) or _sound(source):
            return UnavailableError(
                f"{self.name} cannot take {source}: {words}",
                "use the backend torch or ort-cpu, or operators that it has",
            )
        return ReplkError(f"{source} is not a sound ONNX file: {words}", "export it again: replk export --onnx")


class _Told(NamedTuple):
    """An error of the parser; `lacking` when it says itself that it has no such thing."""

    words: str
    lacking: bool


def _told(error: Any) -> _Told:
    code, text = error.code(), error.desc()
    where = error.node_name() or f"node {error.node()}"
    operator = f" ({error.node_operator()})" if error.node_operator() else ""
    lacking = code.name.startswith("UNSUPPORTED") or "Plugin not found" in text
    return _Told(f"{where}{operator}: {cleaned(text)}", lacking)


def _sound(source: Path) -> bool:
    try:
        onnx.checker.check_model(source, full_check=True)
    except Exception:  # noqa: BLE001  # onnx raises several kinds; the parser has named the place
        return False
    return True


def cleaned(text: str) -> str:
    """Return the line that says why, without the place in the runtime's own sources."""
    lines = [line for line in text.splitlines() if line.strip() and not any(noise in line for noise in NOISE)]
    return PLACE.sub("", lines[0]).strip() if lines else ""


@functools.cache
def the_logger(trt: ModuleType) -> Any:
    """Return the one logger of this process; a second one draws a warning that it is ignored."""

    class Lines(trt.ILogger):  # type: ignore[misc, name-defined]  # its module has no types
        """Keeps warnings and errors; nothing goes to the terminal."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity.name not in {"INFO", "VERBOSE"}:
                self.lines.append((severity.name, msg))

        def cause(self, since: int) -> str:
            """Return the first error from a place on; those after it are its consequences."""
            errors = (cleaned(text) for severity, text in self.lines[since:] if severity != "WARNING")
            return next(filter(None, errors), "")

    return Lines()


def new_monitor(trt: ModuleType, doing: str, progress: Progress, cancelled: threading.Event) -> Any:
    """Return a monitor that tells a listener of every phase, and cancels when the event is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]  # its module has no types
        def __init__(self) -> None:
            super().__init__()
            self.failure: BaseException | None = None
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            del parent_phase
            self.steps[phase_name] = num_steps
            self.tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.tell(phase_name, step + 1)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self.tell(phase_name, self.steps[phase_name])  # some end before their last step

        def tell(self, phase: str, done: int) -> None:
            try:
                progress(f"{doing}: {phase}", done, self.steps[phase])
            except BaseException as exc:  # noqa: BLE001  # the runtime would print it and go on
                self.failure = exc
                cancelled.set()

    return Monitor()


def new_profiler(trt: ModuleType) -> Any:
    """Return a profiler that keeps the times of one run in `layers`."""

    class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]  # its module has no types
        def __init__(self) -> None:
            super().__init__()
            self.layers: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.layers.append((layer_name, ms))

    return Profiler()


def in_a_thread(work: Callable[[threading.Event], T]) -> T:
    """Run `work` beside the main thread, so that Ctrl-C sets its event instead of being lost inside the runtime.

    Raises:
        KeyboardInterrupt: once `work` has come to its end, whatever that was.
    """
    cancelled = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work, cancelled)
        interrupt: KeyboardInterrupt | None = None
        while not future.done():
            try:
                wait([future], timeout=PULSE_S)
            except KeyboardInterrupt as exc:
                interrupt = exc
                cancelled.set()
    if interrupt is not None:
        raise interrupt
    return future.result()
