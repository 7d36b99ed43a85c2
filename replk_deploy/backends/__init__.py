"""The registry of runtimes; importing it loads none of them."""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

from replk_deploy.errors import ReplkError

if TYPE_CHECKING:  # numpy would come with it, and `replk --help` must not wait
    from replk_deploy.backends.base import Backend

# "module:class", because importing the classes imports their runtimes
BACKENDS: dict[str, str] = {
    "torch": "replk_deploy.backends.torch:Torch",
    "torch-compile": "replk_deploy.backends.torch_compile:TorchCompile",
    "ort-cpu": "replk_deploy.backends.ort:OrtCpu",
    "ort-cuda": "replk_deploy.backends.ort_gpu:OrtCuda",
    "ort-trt": "replk_deploy.backends.ort_gpu:OrtTrt",
    "openvino": "replk_deploy.backends.openvino:OpenVino",
    "native": "replk_deploy.backends.native:Native",
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
    "cuda-core": "native",
}


def find(name: str) -> "type[Backend]":
    """Return the class of a backend.

    Raises:
        UnavailableError: its runtime is not installed.
        ReplkError: no backend has that name.
    """
    if name in BACKENDS:
        module, _, attribute = BACKENDS[name].partition(":")
        found: type[Backend] = getattr(import_module(module), attribute)
        return found
    raise _unknown(name)


def _unknown(name: str) -> ReplkError:
    known = PACKAGES | {key: key for key in BACKENDS}
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {known[near[0]]}? " if near else ""
    return ReplkError(f"there is no backend {name!r}", f"{hint}choose from {', '.join(BACKENDS)}")
