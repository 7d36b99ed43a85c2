"""ONNX Runtime on the CPU.

A provider that fails to load is a warning and a slower run in ONNX Runtime, so the provider in use
is asserted and its fall-back switched off.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, final

import numpy as np

from replk_deploy import optional
from replk_deploy.backends.base import DEFAULT, Array, Arrays, Backend, Launch, Settings, TensorSpec
from replk_deploy.errors import ContractError, ReplkError, UnavailableError
from replk_deploy.precision import Precision

PROVIDER = "CPUExecutionProvider"
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(uint8)": "uint8",
}
PRECISION: dict[str, Precision] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
SEVERITY_ERROR = 3  # ONNX Runtime's scale: 2 is a warning, 4 is fatal
RANK = 4
NO_BF16 = "export it again: replk export --onnx --precision fp32 (or fp16)"


@final
class OrtCpu(Backend):
    """An ONNX file, ours or any other with one image input, on ONNX Runtime's CPU provider."""

    name: ClassVar[str] = "ort-cpu"
    takes: ClassVar[Literal["weights", "onnx"]] = "onnx"
    precisions: ClassVar[frozenset[Precision]] = frozenset({"fp32", "fp16"})

    @classmethod
    def probe(cls) -> Mapping[str, str]:
        """Return the version and the provider.

        Raises:
            UnavailableError: onnxruntime is not installed.
        """
        ort = _onnxruntime()
        return {"onnxruntime": ort.__version__, "device": "cpu", "provider": PROVIDER}

    def __init__(self, artefact: Path, settings: Settings = DEFAULT) -> None:
        """Open an ONNX file with one thread per core, as ONNX Runtime does by default.

        Raises:
            ReplkError: not a whole ONNX file, or not a network from one image batch to floating outputs.
            UnavailableError: the file needs an operator or a type that has no CPU kernel.
        """
        del settings  # it honours none
        facts = dict(self.probe())
        self._ort = _onnxruntime()
        options = self._ort.SessionOptions()
        options.log_severity_level = SEVERITY_ERROR
        self._session: Any = _open(self._ort, artefact, options)
        session = self._session
        session.disable_fallback()
        if session.get_providers()[0] != PROVIDER:
            raise ContractError(f"asked for {PROVIDER}, got {session.get_providers()}")
        inputs, outputs = session.get_inputs(), session.get_outputs()
        types = {port.name: DTYPES.get(port.type, port.type) for port in (*inputs, *outputs)}
        floating = {types[port.name] for port in outputs} <= PRECISION.keys()
        if (
            len(inputs) != 1
            or len(inputs[0].shape) != RANK
            or types[inputs[0].name] not in DTYPES.values()
            or not floating
        ):
            ports = ", ".join(f"{port.name} {types[port.name]} {port.shape}" for port in inputs)
            raise ReplkError(
                f"{artefact} does not map one batch of images to floating outputs: its inputs are {ports}",
                "name a file that replk export --onnx wrote",
            )
        self.outputs = tuple(port.name for port in outputs)
        shape = tuple(size if isinstance(size, int) else None for size in inputs[0].shape)
        self.input = TensorSpec(name=inputs[0].name, dtype=types[inputs[0].name], shape=shape)
        said = session.get_modelmeta().custom_metadata_map.get("replk.precision")
        typed = types[self.outputs[0]] if self.input.dtype == "uint8" else self.input.dtype
        self.precision = said if said in PRECISION.values() else PRECISION[typed]
        if self.precision not in self.precisions:
            raise UnavailableError(f"ONNX Runtime has no CPU kernels for {self.precision}: {artefact}", NO_BF16)
        threads = {"intra_op_threads": options.intra_op_num_threads, "inter_op_threads": options.inter_op_num_threads}
        self.facts = facts | {name: str(count or "one per core") for name, count in threads.items()}

    def _run(self, images: Array) -> Arrays:
        session = self._open_session()
        try:
            answer = session.run(self.outputs, {self.input.name: self._cast(images)})
        except Exception as exc:  # ONNX Runtime's errors share no other base
            raise _refusal(exc, f"cannot answer {'x'.join(map(str, images.shape))}") from exc
        return dict(zip(self.outputs, answer, strict=True))

    def prepare(self, images: Array) -> Launch:
        """Bind a batch and the outputs, so that no launch copies between Python and the runtime."""
        session = self._open_session()
        self.check(images)
        return _Launch(self._ort, session, self.input.name, self._cast(images), self.outputs)

    def close(self) -> None:
        """Drop the session; safe to call twice."""
        self._session = None

    def _open_session(self) -> Any:
        if self._session is None:
            raise ContractError(f"{self.name} was asked after it was closed")
        return self._session

    def _cast(self, images: Array) -> Array:
        return np.array(images, dtype=self.input.dtype, order="C")  # a copy: a launch must not see later changes


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


def _onnxruntime() -> ModuleType:
    return optional.load("onnxruntime", package="onnxruntime", install="replk-deploy[cpu]")


def _open(ort: ModuleType, artefact: Path, options: Any) -> Any:
    if not artefact.is_file():
        raise ReplkError(f"{artefact} is not a file", "write it: replk export --onnx")
    try:
        return ort.InferenceSession(str(artefact), options, providers=[PROVIDER])
    except Exception as exc:  # ONNX Runtime's errors share no other base
        if _is_bf16(artefact):
            raise UnavailableError(f"ONNX Runtime has no CPU kernels for bf16: {artefact}", NO_BF16) from exc
        raise _refusal(exc, f"cannot open {artefact}") from exc


def _is_bf16(artefact: Path) -> bool:
    """Tell whether a file that does not open takes bf16; ONNX Runtime names the operator, not the type."""
    import onnx  # noqa: PLC0415  # needed only to explain a failure

    try:
        graph = onnx.load(artefact, load_external_data=False).graph
    except Exception:  # noqa: BLE001  # damaged: protobuf's errors share no base, and ONNX Runtime's words are kept
        return False
    return any(port.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16 for port in graph.input)


def _refusal(exc: Exception, did: str) -> ReplkError:
    """Turn an error of ONNX Runtime into ours, with its first sentence; a missing kernel is not the file's fault."""
    words = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
    if type(exc).__name__ == "NotImplemented":
        return UnavailableError(
            f"ONNX Runtime {did}: {words}", "use the backend torch, or a network of operators that it has"
        )
    return ReplkError(f"ONNX Runtime {did}: {words}", "write it again: replk export --onnx")
