"""ONNX Runtime: what its providers share, and the one for CPUs.

A provider that fails to load is a warning and a slower run in ONNX Runtime, so the provider in use
is asserted and its fall-back switched off.
"""

import abc
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, final

import numpy as np
import onnx
import torch

from replk_deploy import optional
from replk_deploy.backends import ports
from replk_deploy.backends.base import DEFAULT, Array, Arrays, Backend, Launch, LayerTime, Settings, TensorSpec
from replk_deploy.errors import ContractError, ReplkError, UnavailableError, first_line
from replk_deploy.precision import Precision

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(uint8)": "uint8",
}
SEVERITY_ERROR, SEVERITY_FATAL = 3, 4  # ONNX Runtime's scale; 2 is a warning
NO_BF16 = "export it again: replk export --onnx --precision fp32 (or fp16)"
KERNEL, BLOCKED = "_kernel_time", "_nchwc"  # endings in a profile: of an execution, of a node in blocked layout
CAST = "InsertedPrecisionFreeCast_"  # before the name of a float16 value that a CPU computes in float32
Provider = str | tuple[str, Mapping[str, str]]


class OrtRuntime(Backend):
    """What all providers share: the file, its ports, the session."""

    takes: ClassVar[Literal["weights", "onnx"]] = "onnx"
    provider: ClassVar[str]  # abstract: each final class names its own

    def _start(self, artefact: Path, options: Any, providers: Sequence[Provider]) -> None:
        """Open a session and read the ports.

        Raises:
            ReplkError: not a whole ONNX file, or not a network from one image batch to floating outputs.
            UnavailableError: the file needs an operator or a type that the provider has no kernel for.
        """
        self._session: Any = session_of(onnxruntime(), artefact, options, providers)
        if self._session.get_providers()[0] != self.provider:
            raise UnavailableError(
                f"asked for {self.provider}, ONNX Runtime uses {self._session.get_providers()[0]}",
                "see what it lacks: python -c 'import onnxruntime; onnxruntime.print_debug_info()'",
            )
        said = self._session.get_modelmeta().custom_metadata_map.get("replk.precision")
        inputs, outputs = map(_specs, (self._session.get_inputs(), self._session.get_outputs()))
        self.input, self.outputs, self.precision = ports.of(artefact, inputs, outputs, said)
        if self.precision not in self.precisions:
            raise self._not_offered(self.precision, artefact)

    @abc.abstractmethod
    def _not_offered(self, precision: Precision, artefact: Path) -> UnavailableError:
        """Say why a file's precision is not executed, and what to do."""

    def close(self) -> None:
        """Drop the session; safe to call twice."""
        self._session = None

    def _open(self) -> Any:
        if self._session is None:
            raise ContractError(f"{self.name} was asked after it was closed")
        return self._session

    def _cast(self, images: Array) -> Array:
        return np.array(images, dtype=self.input.dtype, order="C")  # a copy: a launch must not see later changes


@final
class OrtCpu(OrtRuntime):
    """An ONNX file, ours or any other with one image input, on ONNX Runtime's CPU provider."""

    name: ClassVar[str] = "ort-cpu"
    cpu_only: ClassVar[bool] = True
    precisions: ClassVar[frozenset[Precision]] = frozenset({"fp32", "tf32", "fp16"})
    provider: ClassVar[str] = "CPUExecutionProvider"

    @classmethod
    def probe(cls) -> Mapping[str, str]:
        """Return the version and the provider.

        Raises:
            UnavailableError: onnxruntime is not installed.
        """
        return {"onnxruntime": onnxruntime().__version__, "device": "cpu", "provider": cls.provider}

    def __init__(self, artefact: Path, settings: Settings = DEFAULT) -> None:
        """Open an ONNX file with as many threads as PyTorch has, so that latencies of both compare.

        Raises:
            ReplkError: not a whole ONNX file, or not a network from one image batch to floating outputs.
            UnavailableError: the file needs an operator or a type that has no CPU kernel.
        """
        del settings  # it honours none
        options = _cpu_options(onnxruntime())
        self._artefact = artefact
        self._start(artefact, options, [self.provider])
        self.facts = {**self.probe(), "threads": str(options.intra_op_num_threads)}

    def _not_offered(self, precision: Precision, artefact: Path) -> UnavailableError:
        return UnavailableError(f"ONNX Runtime has no CPU kernels for {precision}: {artefact}", NO_BF16)

    def _run(self, images: Array) -> Arrays:
        session = self._open()
        try:
            answer = session.run(self.outputs, {self.input.name: self._cast(images)})
        except Exception as exc:  # ONNX Runtime's errors share no other base
            raise refusal(exc, f"cannot answer {'x'.join(map(str, images.shape))}") from exc
        return dict(zip(self.outputs, answer, strict=True))

    def prepare(self, images: Array) -> Launch:
        """Bind a batch and the outputs, so that no launch copies between Python and the runtime."""
        session = self._open()
        self.check(images)
        return _Launch(onnxruntime(), session, self.input.name, self._cast(images), self.outputs)

    def layer_times(self, images: Array, *, repeats: int) -> tuple[LayerTime, ...]:
        """Time each node with ONNX Runtime's own profiler, in a session of its own; one run more warms up.

        A fused node carries the name of the node of its own kind that went into it.
        """
        self._open()
        self.check(images)
        ort, feed = onnxruntime(), {self.input.name: self._cast(images)}
        with tempfile.TemporaryDirectory() as folder:
            options = _cpu_options(ort)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, "profile"))
            session = session_of(ort, self._artefact, options, [self.provider])
            for _ in range(1 + repeats):
                session.run(self.outputs, feed)
            trace = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return _layers(trace, Names(self._artefact), repeats)


@final
class _Launch:
    def __init__(self, ort: ModuleType, session: Any, name: str, images: Array, outputs: tuple[str, ...]) -> None:
        self._session, self._binding = session, session.io_binding()
        self._images = images  # the binding may point into it
        self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(images))
        for output in outputs:
            self._binding.bind_output(output, "cpu")

    def enqueue(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def wait(self) -> None:
        self._binding.synchronize_outputs()

    def device_ms(self) -> None:
        """Return None: a CPU has one clock."""

    def answers(self) -> list[Array]:
        """Return the outputs of the last inference."""
        return [np.array(out, np.float32) for out in self._binding.copy_outputs_to_cpu()]


def onnxruntime(extra: str = "cpu") -> ModuleType:
    """Import ONNX Runtime; UnavailableError with the line that installs the extra that brings it."""
    found = optional.load("onnxruntime", package="onnxruntime", install=f"replk-deploy[{extra}]")
    found.set_default_logger_severity(SEVERITY_FATAL)  # errors come as exceptions, too
    return found


def session_options(ort: ModuleType) -> Any:
    """Return options of a session that prints no warnings."""
    options = ort.SessionOptions()
    options.log_severity_level = SEVERITY_ERROR
    return options


def _cpu_options(ort: ModuleType) -> Any:
    options = session_options(ort)
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def session_of(ort: ModuleType, artefact: Path, options: Any, providers: Sequence[Provider]) -> Any:
    """Open a file without any fall-back; ReplkError in ONNX Runtime's words when it cannot."""
    if not artefact.is_file():
        raise ReplkError(f"{artefact} is not a file", "write it: replk export --onnx")
    try:
        session = ort.InferenceSession(str(artefact), options, providers=list(providers), enable_fallback=0)
    except Exception as exc:  # ONNX Runtime's errors share no other base
        if _is_bf16(artefact):
            raise UnavailableError(f"ONNX Runtime has no CPU kernels for bf16: {artefact}", NO_BF16) from exc
        raise refusal(exc, f"cannot open {artefact}") from exc
    session.disable_fallback()  # also when a later run fails
    return session


def refusal(exc: Exception, did: str) -> ReplkError:
    """Turn an error of ONNX Runtime into ours, with its first sentence; a missing kernel is not the file's fault."""
    words = f"ONNX Runtime {did}: {first_line(exc)}"
    if type(exc).__name__ == "NotImplemented":
        return UnavailableError(words, "use the backend torch, or a network of operators that it has")
    return ReplkError(words, "write it again: replk export --onnx")


def _specs(found: Sequence[Any]) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=port.name,
            dtype=DTYPES.get(port.type, port.type),
            shape=tuple(size if isinstance(size, int) else None for size in port.shape),
        )
        for port in found
    ]


def _is_bf16(artefact: Path) -> bool:
    """Tell whether a file that does not open takes bf16; ONNX Runtime names the operator, not the type."""
    try:
        graph = onnx.load(artefact, load_external_data=False).graph
    except Exception:  # noqa: BLE001  # damaged: protobuf's errors share no base, and ONNX Runtime's words are kept
        return False
    return any(port.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16 for port in graph.input)


class Names:
    """Which node of the file a node that ONNX Runtime executes comes from."""

    def __init__(self, artefact: Path) -> None:
        nodes = onnx.load(artefact, load_external_data=False).graph.node
        self._known = {node.name for node in nodes}
        self._makers = {value: node for node in nodes for value in node.output}

    def original(self, name: str, kind: str) -> str:
        """Return the node's name in the file, its own where it is not in the file.

        A convolution in blocked layout is named after the value that it writes, which may be that of
        an activation behind it.
        """
        if name in self._known or not name.endswith(BLOCKED):
            return name
        maker = self._makers.get(name.removesuffix(BLOCKED).removeprefix(CAST))
        while maker is not None and maker.op_type != kind:
            maker = self._makers.get(maker.input[0]) if maker.input else None
        return maker.name if maker is not None else name


def executions(trace: Sequence[Mapping[str, Any]], runs: int) -> tuple[tuple[str, str, Sequence[tuple[int, int]]], ...]:
    """Read a trace: name and operator of each node, and start and length in µs of each time that it was executed.

    Raises:
        ContractError: a node was not executed once in each run, or there is none.
    """
    found: dict[tuple[str, str, str], list[tuple[int, int]]] = defaultdict(list)
    executed = (e for e in trace if e.get("cat") == "Node" and e["name"].endswith(KERNEL))
    for event in sorted(executed, key=lambda e: int(e["ts"])):
        key = (event["args"]["node_index"], event["name"].removesuffix(KERNEL), event["args"]["op_name"])
        found[key].append((int(event["ts"]), int(event["dur"])))
    unlike = {name: len(times) for (_, name, _), times in found.items() if len(times) != runs}
    if unlike or not found:
        raise ContractError(f"ONNX Runtime's profile of {runs} runs has other counts of nodes: {unlike}")
    return tuple((name, kind, times) for (_, name, kind), times in found.items())


def _layers(trace: Sequence[Mapping[str, Any]], names: Names, repeats: int) -> tuple[LayerTime, ...]:
    """Read a trace of one run to warm up and `repeats` more."""
    return tuple(
        LayerTime(
            name=names.original(name, kind), kind=kind, samples_ms=tuple(us / 1e3 for _, us in times[1:]), detail=name
        )
        for name, kind, times in executions(trace, 1 + repeats)
    )
