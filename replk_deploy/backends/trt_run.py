"""A TensorRT context with its buffers, and what profiler and inspector say of its layers; names no runtime.

What concerns contexts has not been executed on a GPU yet.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from replk_deploy.backends import cuda
from replk_deploy.backends.base import Array, Launch, LayerTime
from replk_deploy.batch import Batch
from replk_deploy.errors import ContractError

Ask = Callable[[str, Callable[[], Any]], Any]  # (what failed, what to call): its None or False becomes an error


@final
class Bound:
    """A context, the buffers that it reads and writes, and the stream that it runs on."""

    def __init__(self, context: Any, tensors: Mapping[str, Tensor], stream: int, ask: Ask) -> None:
        """Keep them together.

        Args:
            context: without scratch memory of its own.
            tensors: by name, the input first.
            stream: handle of the stream.
            ask: calls the runtime; its failures leave as errors of ours.
        """
        self.context = context
        self._stream, self._ask = stream, ask
        self._input, *outputs = tensors
        self._tensors = dict(tensors)
        self._outputs = {name: tensors[name] for name in outputs}
        self._execute = partial(ask, "does not run", partial(context.execute_async_v3, stream))

    def bind(self, profile: int, scratch: Tensor | None) -> None:
        """Choose a profile, then give shape, scratch memory and the addresses of the buffers."""
        context, shape = self.context, tuple(self._tensors[self._input].shape)
        choose = partial(context.set_optimization_profile_async, profile, self._stream)
        self._ask(f"takes no profile {profile}", choose)
        self._ask(f"takes no shape {shape}", partial(context.set_input_shape, self._input, shape))
        self._scratch = scratch  # kept alive
        if scratch is not None and scratch.numel():
            context.set_device_memory(scratch.data_ptr(), scratch.numel())
        for name, buffer in self._tensors.items():
            self._ask(f"takes no address of {name}", partial(context.set_tensor_address, name, buffer.data_ptr()))

    def load(self, images: Array) -> None:
        """Copy a batch into the input; when this returns, any stream may read it."""
        with cuda.translated("hold the images"):
            self._tensors[self._input].copy_(torch.tensor(np.ascontiguousarray(images)))
            torch.cuda.current_stream().synchronize()

    def run(self) -> Mapping[str, Tensor]:
        """Enqueue one inference; return the outputs, which the next one overwrites."""
        self._execute()
        return self._outputs

    def profiled(self, launch: Launch, profiler: Any, repeats: int) -> list[list[tuple[str, float]]]:
        """Return name and milliseconds of each layer, run by run, after a run that does not count.

        Args:
            launch: starts `run`, without a CUDA graph.
            profiler: keeps the layers of one run in `layers`.
            repeats: runs that count.
        """
        context, runs = self.context, []
        launch.enqueue()
        launch.wait()
        context.profiler = profiler
        context.enqueue_emits_profile = False
        for _ in range(repeats):
            profiler.layers = []
            launch.enqueue()
            launch.wait()
            self._ask("reports no profile", context.report_to_profiler)
            runs.append(profiler.layers)
        return runs


class Layer(NamedTuple):
    """What the inspector says of a layer."""

    kind: str
    detail: str


def nearest(batches: Sequence[Batch], n: int) -> int:
    """Return the index of the profile that was tuned closest to `n` images, of those that take them."""
    fitting = [index for index, batch in enumerate(batches) if batch.min <= n <= batch.max]
    if not fitting:
        raise ContractError(f"no profile of {list(map(str, batches))} takes {n} images")
    return min(fitting, key=lambda index: abs(batches[index].opt - n))


def described(text: str) -> dict[str, Layer]:
    """Read the inspector's JSON, by layer name.

    The schemas of 10 and 11 differ in the fields of a tensor: `Format/Datatype` became two. A layer of a
    plan without details is only its name.
    """
    layers: Sequence[Any] = json.loads(text).get("Layers", ())
    return {layer["Name"]: _described(layer) for layer in layers if isinstance(layer, dict)}


def _described(layer: Mapping[str, Any]) -> Layer:
    tactic = str(layer.get("TacticName") or layer.get("TacticValue") or "")
    ways = [", ".join(map(_format, layer.get(side, ()))) for side in ("Inputs", "Outputs")]
    return Layer(str(layer.get("LayerType", "")), "; ".join(filter(None, (tactic, " -> ".join(filter(None, ways))))))


def _format(port: Mapping[str, Any]) -> str:
    dims = "x".join(map(str, port.get("Dimensions", ())))
    said = [str(value) for key, value in port.items() if key.lower().startswith(("format", "datatype"))]
    return " ".join(filter(None, (dims, *said)))


def joined(runs: Sequence[Sequence[tuple[str, float]]], layers: Mapping[str, Layer]) -> tuple[LayerTime, ...]:
    """Join the profiler's times with the inspector's descriptions, in the order of execution.

    Raises:
        ContractError: the runs did not go through the same layers.
    """
    names = [name for name, _ in runs[0]] if runs else []
    if any([name for name, _ in run] != names for run in runs):
        raise ContractError("the profiler reported other layers in another run")
    unknown = Layer("", "")
    return tuple(
        LayerTime(
            name=name,
            kind=layers.get(name, unknown).kind,
            samples_ms=tuple(run[index][1] for run in runs),
            detail=layers.get(name, unknown).detail,
        )
        for index, name in enumerate(names)
    )
