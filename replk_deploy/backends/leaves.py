"""A PyTorch network → the time of each module that has no parts."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from replk_deploy.backends import cuda
from replk_deploy.backends.base import LayerTime
from replk_deploy.backends.cuda import Device

Pairs = Mapping[str, list[tuple[Any, Any]]]


def leaf_times(
    model: nn.Module, run: Callable[[], object], *, device: Device, repeats: int, detail: str
) -> tuple[LayerTime, ...]:
    """Time each leaf module in `repeats` runs of a network, after one to warm up; in the order of first execution.

    A module that runs several times in one inference counts once, with the sum. What is no module,
    such as an addition of two branches, is not timed. On a GPU, launches get a head start, so that a
    time is the kernels' and not the host's.
    """
    gpu = device == "cuda"
    mark, between = (cuda.event, cuda.between) if gpu else (time.perf_counter_ns, _between)
    leaves = {
        name: module
        for name, module in model.named_modules()
        if name and not any(module.children()) and not isinstance(module, nn.Identity)
    }
    samples: dict[str, list[float]] = defaultdict(list)
    for repeat in range(1 + repeats):
        if gpu:
            cuda.head_start()
        with _marked(leaves, mark) as marks:
            run()
        if gpu:
            torch.cuda.synchronize()
        for name, pairs in marks.items() if repeat else ():
            samples[name].append(sum(between(start, end) for start, end in pairs))
    return tuple(
        LayerTime(name=name, kind=type(leaves[name]).__name__, samples_ms=tuple(times), detail=detail)
        for name, times in samples.items()
    )


def _between(start_ns: int, end_ns: int) -> float:
    return (end_ns - start_ns) / 1e6


@contextmanager
def _marked(leaves: Mapping[str, nn.Module], mark: Callable[[], Any]) -> Iterator[Pairs]:
    """Note when each module starts and ends, by name, in the order in which they are first called."""
    starts: dict[str, Any] = {}
    marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def begin(name: str, *_: Any) -> None:
        starts[name] = mark()

    def end(name: str, *_: Any) -> None:
        marks[name].append((starts.pop(name), mark()))

    hooks = [
        hook
        for name, module in leaves.items()
        for hook in (
            module.register_forward_pre_hook(functools.partial(begin, name)),
            module.register_forward_hook(functools.partial(end, name)),
        )
    ]
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()
