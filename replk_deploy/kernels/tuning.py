"""The fastest of several ways to compute the same, measured once on a GPU and remembered.

Answers lie in the user's cache, one file a GPU, and can travel with an artefact. A way that is not among those that
are tried today is measured again.
"""

import functools
import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from replk_deploy import files, machine

CALLS, ROUNDS = 10, 5
Way = TypeVar("Way")
_known: dict[str, dict[str, str]] = {}  # by GPU, by work: the fastest way, in words
_decided: dict[tuple[str, Hashable], Any] = {}  # the same, at hand
_asked: list[dict[str, str]] = []  # what `asked` notes


def fastest(work: Hashable, ways: Sequence[Way], start: Callable[[Way], object]) -> Way:
    """Return the way to do a work that is the fastest on the current GPU.

    While a CUDA graph is captured nothing can be measured: then it is the first, unless the answer is known.

    Args:
        work: what is computed, with its shapes and types; its words and those of the ways are remembered.
        ways: how, best guess first.
        start: enqueues the work in a way on the current stream.
    """
    gpu = torch.cuda.get_device_name()
    found: Way | None = _decided.get((gpu, work))
    if found is None:
        known, words = _answers(gpu), [str(way) for way in ways]
        if known.get(str(work)) not in words:
            if torch.cuda.is_current_stream_capturing():
                return ways[0]
            known[str(work)] = words[_measured([functools.partial(start, way) for way in ways]) if len(ways) > 1 else 0]
            _write(gpu, known)
        found = _decided[gpu, work] = ways[words.index(known[str(work)])]
    for noted in _asked:
        noted[str(work)] = str(found)
    return found


def know(answers: Mapping[str, str]) -> None:
    """Take over what was measured on a GPU like this one, where nothing is known here."""
    known = _answers(torch.cuda.get_device_name())
    known.update({**answers, **known})


@contextmanager
def asked() -> Iterator[dict[str, str]]:
    """Note the answers that are given inside the block."""
    noted: dict[str, str] = {}
    _asked.append(noted)
    try:
        yield noted
    finally:
        _asked.remove(noted)


def _answers(gpu: str) -> dict[str, str]:
    """Return what is known of a GPU, to be added to; what the user's cache holds comes first."""
    if gpu not in _known:
        _known[gpu] = _read(gpu)
    return _known[gpu]


def _measured(runs: Sequence[Callable[[], object]]) -> int:
    graphs = [captured(run) for run in runs]
    times = [math.inf] * len(runs)
    for _ in range(ROUNDS):
        for index, graph in enumerate(graphs):
            times[index] = min(times[index], replayed_ms(graph))
    return times.index(min(times))


def captured(run: Callable[[], object], calls: int = CALLS) -> torch.cuda.CUDAGraph:
    """Capture calls in a row, so that no launch waits for the host; one more before compiles and chooses."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # missing in torch's stubs
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                run()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def replayed_ms(graph: torch.cuda.CUDAGraph) -> float:
    """Return the milliseconds of a replay on the GPU."""
    start, end = _event(), _event()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # missing in torch's stubs


def _path(gpu: str) -> Path:
    return machine.cache() / "replk" / f"{gpu.lower().replace(' ', '-')}.json"


def _read(gpu: str) -> dict[str, str]:
    try:
        found = json.loads(_path(gpu).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {work: way for work, way in found.items() if isinstance(way, str)} if isinstance(found, dict) else {}


def _write(gpu: str, known: Mapping[str, str]) -> None:
    """Keep the answers, with those of other processes; where that fails they are measured again next time."""
    try:
        _path(gpu).parent.mkdir(parents=True, exist_ok=True)
        files.write_text(_path(gpu), json.dumps({**_read(gpu), **known}, indent=1, sort_keys=True))
    except OSError:
        return
