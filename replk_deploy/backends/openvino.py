"""OpenVINO on the CPU, from an ONNX file.

OpenVINO computes float32 networks in bfloat16 or float16 on processors that have them unless it is told
otherwise, so the precision is set, read back, and said in `facts`. It reports its own import over the
network unless its telemetry is absent, so here it is absent.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch

from replk_deploy import optional
from replk_deploy.backends import ports
from replk_deploy.backends.base import DEFAULT, Array, Arrays, Backend, Launch, LayerTime, Settings, TensorSpec
from replk_deploy.errors import ContractError, ReplkError, UnavailableError
from replk_deploy.precision import Precision

DEVICE = "CPU"
TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "u8": "uint8"}
HINT = {"fp32": "f32", "tf32": "f32", "fp16": "f16"}  # of a file → the least precise type to compute in
PRECISION, THREADS = "INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS"
NOISE = ("Exception from ", "Check '", "FrontEnd API failed")  # lines that say where in OpenVINO, not what
CAUSE = "-- "  # before the lines of a summary
IN_PLACE = {"Reorder", "Reshape", "Squeeze", "Unsqueeze"}  # often views: some runs were seen to report none


@final
class OpenVino(Backend):
    """An ONNX file, ours or any other with one image input, on OpenVINO's CPU plugin."""

    name: ClassVar[str] = "openvino"
    cpu_only: ClassVar[bool] = True
    takes: ClassVar[Literal["weights", "onnx"]] = "onnx"
    precisions: ClassVar[frozenset[Precision]] = frozenset({"fp32", "tf32", "fp16"})

    @classmethod
    def probe(cls) -> Mapping[str, str]:
        """Return the version and what OpenVINO calls the processor.

        Raises:
            UnavailableError: openvino is not installed, or has no plugin for this processor.
        """
        ov = _openvino()
        core = ov.Core()
        if DEVICE not in core.available_devices:
            raise UnavailableError(f"OpenVINO finds no {DEVICE}", "use the backend ort-cpu")
        return {
            "openvino": ov.__version__,
            "device": "cpu",
            "processor": str(core.get_property(DEVICE, "FULL_DEVICE_NAME")),
        }

    def __init__(self, artefact: Path, settings: Settings = DEFAULT) -> None:
        """Open an ONNX file for low latency: one stream, with as many threads as PyTorch has.

        Raises:
            ReplkError: not a whole ONNX file, or not a network from one image batch to floating outputs.
            UnavailableError: OpenVINO cannot compute the file in its precision.
        """
        del settings  # it honours none
        facts = dict(self.probe())
        self._artefact = artefact
        model = _model(artefact)
        key = ["framework", "replk.precision"]
        said = model.get_rt_info(key).astype(str) if model.has_rt_info(key) else None
        inputs, outputs = ([_spec(port) for port in found] for found in (model.inputs, model.outputs))
        self.input, self.outputs, self.precision = ports.of(artefact, inputs, outputs, said)
        if self.precision not in self.precisions:
            raise UnavailableError(
                f"OpenVINO is not offered for {self.precision}: {artefact}",
                "export it again: replk export --onnx --precision fp32 (or fp16)",
            )
        for hint in (HINT[self.precision], "f32"):  # without arithmetic for fp16, some processors take bf16
            self._hint = hint
            self._compiled: Any = self._compile(model)
            in_force = self._compiled.get_property(PRECISION).to_string()
            if in_force in {"f32", hint}:
                break
        else:
            raise UnavailableError(f"OpenVINO computes {artefact} in {in_force}, though told f32", "use ort-cpu")
        names = {"threads": THREADS, "streams": "NUM_STREAMS", "hint": "PERFORMANCE_HINT"}
        self.facts = facts | {"computes_in": in_force} | {k: _text(self._compiled, v) for k, v in names.items()}

    def _compile(self, model: Any, **more: Any) -> Any:
        threads = torch.get_num_threads()
        choices = {"PERFORMANCE_HINT": "LATENCY", PRECISION: self._hint, THREADS: threads, **more}
        with _told(f"cannot compile {self._artefact}"):
            return _openvino().Core().compile_model(model, DEVICE, choices)

    def _run(self, images: Array) -> Arrays:
        launch = self._launch(self._open(), images)
        launch.enqueue()
        launch.wait()
        return {name: launch.answer(index) for index, name in enumerate(self.outputs)}

    def prepare(self, images: Array) -> Launch:
        """Put a batch into a request of its own, so that no launch copies between Python and the runtime."""
        compiled = self._open()
        self.check(images)
        return self._launch(compiled, images)

    def layer_times(self, images: Array, *, repeats: int) -> tuple[LayerTime, ...]:
        """Time each node with OpenVINO's own counters, on a network compiled for them; one run more warms up.

        OpenVINO counts in microseconds. What it has fused into a neighbour is not listed.
        """
        self._open()
        self.check(images)
        launch = self._launch(self._compile(_model(self._artefact), PERF_COUNT=True), images)
        times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for repeat in range(1 + repeats):
            launch.enqueue()
            launch.wait()
            for name, kind, detail, spent_ms in launch.executed() if repeat else ():
                times[name, kind, detail].append(spent_ms)
        for (_, kind, _), found in times.items():
            found.extend([0.0] * (repeats - len(found) if kind in IN_PLACE else 0))
        unlike = {name: len(found) for (name, _, _), found in times.items() if len(found) != repeats}
        if unlike:
            raise ContractError(f"OpenVINO executed other nodes in some of {repeats} runs: {unlike}")
        return tuple(
            LayerTime(name=name, kind=kind, samples_ms=tuple(found), detail=detail)
            for (name, kind, detail), found in times.items()
        )

    def close(self) -> None:
        """Drop the compiled network; safe to call twice."""
        self._compiled = None

    def _open(self) -> Any:
        if self._compiled is None:
            raise ContractError(f"{self.name} was asked after it was closed")
        return self._compiled

    def _launch(self, compiled: Any, images: Array) -> "_Launch":
        return _Launch(compiled, np.array(images, dtype=self.input.dtype, order="C"))  # a copy, see Backend.prepare


@final
class _Launch:
    def __init__(self, compiled: Any, images: Array) -> None:
        self._images = images  # the request reads it where it lies
        with _told("has no request left"):
            self._request = compiled.create_infer_request()
            self._request.set_input_tensor(_openvino().Tensor(images, shared_memory=True))

    def enqueue(self) -> None:
        with _told(f"cannot answer {'x'.join(map(str, self._images.shape))}"):
            self._request.start_async()

    def wait(self) -> None:
        with _told(f"cannot answer {'x'.join(map(str, self._images.shape))}"):
            self._request.wait()

    def device_ms(self) -> None:
        """Return None: a CPU has one clock."""

    def answers(self) -> list[Array]:
        """Return the outputs of the last inference."""
        return [np.array(tensor.data, np.float32) for tensor in self._request.output_tensors]

    def answer(self, index: int) -> Array:
        """Return an output of the last inference, which the next overwrites."""
        found: Array = self._request.get_output_tensor(index).data
        return found

    def executed(self) -> Iterator[tuple[str, str, str, float]]:
        """Give name, kind, kernel and milliseconds of each node that the last inference executed."""
        for info in self._request.get_profiling_info():
            if info.status == info.Status.EXECUTED:
                yield info.node_name, info.node_type, info.exec_type, info.real_time.total_seconds() * 1e3


def _openvino() -> ModuleType:
    """Import OpenVINO without its telemetry, which reports the import and keeps an identifier in the home folder."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # Python's sign for "not there"
    return optional.load("openvino", package="openvino", install="replk-deploy[openvino]")


def _model(artefact: Path) -> Any:
    """Read an ONNX file with OpenVINO's reader of ONNX; left to guess, it tries seven formats and prints."""
    if not artefact.is_file():
        raise ReplkError(f"{artefact} is not a file", "write it: replk export --onnx")
    _openvino()
    readers = optional.load("openvino.frontend", package="openvino", install="replk-deploy[openvino]")
    with _told(f"cannot open {artefact}"):
        reader = readers.FrontEndManager().load_by_framework("onnx")
        return reader.convert(reader.load(str(artefact)))


def _spec(port: Any) -> TensorSpec:
    kind = port.element_type.to_string()
    shape = tuple(None if size.is_dynamic else size.get_length() for size in port.partial_shape)
    return TensorSpec(name=port.any_name, dtype=TYPES.get(kind, kind), shape=shape)


def _text(compiled: Any, name: str) -> str:
    return str(compiled.get_property(name)).rpartition(".")[2]


@contextmanager
def _told(did: str) -> Iterator[None]:
    """Turn an error of OpenVINO in the block into ours, with the line that says what is wrong."""
    try:
        yield
    except Exception as exc:  # OpenVINO's errors share no other base
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
        said = [line for line in lines if not line.startswith(NOISE)]
        causes = [line.removeprefix(CAUSE) for line in said if line.startswith(CAUSE)]
        words = (causes or said or [type(exc).__name__])[0]
        raise ReplkError(f"OpenVINO {did}: {words}", "write it again: replk export --onnx") from exc
