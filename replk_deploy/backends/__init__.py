"""The registry of runtimes; importing it loads none of them."""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Literal, NamedTuple

from replk_deploy.errors import ReplkError, UnavailableError

if TYPE_CHECKING:  # numpy would come with it, and `replk --help` must not wait
    from replk_deploy.backends.base import Backend

Takes = Literal["weights", "onnx"]


class Planned(NamedTuple):
    """A runtime without an adapter yet: what it would need, and which file it would start from.

    Attributes:
        distribution: what brings it.
        extra: of replk-deploy; None where the base install is enough.
    """

    distribution: str
    extra: str | None
    takes: Takes


# "module:class", because importing the classes imports their runtimes
BACKENDS: dict[str, str] = {
    "torch": "replk_deploy.backends.torch:Torch",
    "torch-compile": "replk_deploy.backends.torch_compile:TorchCompile",
    "ort-cpu": "replk_deploy.backends.ort:OrtCpu",
    "ort-cuda": "replk_deploy.backends.ort_gpu:OrtCuda",
    "ort-trt": "replk_deploy.backends.ort_gpu:OrtTrt",
    "openvino": "replk_deploy.backends.openvino:OpenVino",
    "aoti": "replk_deploy.backends.aoti:Aoti",
    "trt": "replk_deploy.backends.trt:TensorRT",
    "trt-rtx": "replk_deploy.backends.trt:TensorRTRTX",
}
PACKAGES = {  # what people type who think of the package
    "tensorrt": "trt",
    "tensorrt-rtx": "trt-rtx",
    "onnxruntime": "ort-cpu",
    "onnxruntime-gpu": "ort-cuda",
    "aotinductor": "aoti",
}
PLANNED: dict[str, Planned] = {"native": Planned("cuda-core", "native", "weights")}


def find(name: str) -> "type[Backend]":
    """Return the class of a backend.

    Raises:
        UnavailableError: no adapter in this version, or its runtime is not installed.
        ReplkError: no backend has that name.
    """
    if name in BACKENDS:
        module, _, attribute = BACKENDS[name].partition(":")
        found: type[Backend] = getattr(import_module(module), attribute)
        return found
    if name in PLANNED:
        raise _unavailable(name, PLANNED[name])
    raise _unknown(name)


def takes(name: str) -> Takes:
    """Tell which file of a run a backend starts from, planned ones included.

    Raises:
        ReplkError: no backend has that name.
    """
    return PLANNED[name].takes if name in PLANNED else find(name).takes


def _unavailable(name: str, planned: Planned) -> UnavailableError:
    from replk_deploy.machine import version  # noqa: PLC0415  # `replk --help` must not wait for it

    found = version(planned.distribution)
    package = f"{planned.distribution} is {'not ' if found is None else ''}installed"
    extra = f"[{planned.extra}]" if planned.extra else ""
    return UnavailableError(
        f"this version has no adapter for {name} yet, {'and' if found is None else 'though'} {package}",
        f"pip install --upgrade 'replk-deploy{extra}' when a version brings it; today: {', '.join(BACKENDS)}",
    )


def _unknown(name: str) -> ReplkError:
    names = (*BACKENDS, *PLANNED)
    known = {planned.distribution: key for key, planned in reversed(PLANNED.items())}
    known |= PACKAGES | {key: key for key in names}
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {known[near[0]]}? " if near else ""
    return ReplkError(f"there is no backend {name!r}", f"{hint}choose from {', '.join(names)}")
