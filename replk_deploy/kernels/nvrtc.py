"""CUDA C++ of this folder → machine code for one GPU, compiled at first use and kept in the user's cache.

NVRTC compiles it, through NVIDIA's Python packages: nothing is compiled when the project is installed, and no
nvcc is needed. Compiling needs neither a GPU nor a driver.
"""

import ctypes
import functools
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from replk_deploy import optional
from replk_deploy.errors import UnavailableError, first_line

Constants = tuple[tuple[str, int], ...]
OLDEST = (8, 0)  # the first with mma.sync.m16n8k16
EXTRA = "replk-deploy[native]"


@functools.cache
def _cuda() -> Any:
    return optional.load("cuda.core", package="cuda-core", install=EXTRA)


def limits() -> tuple[int, int]:
    """Return multiprocessors of the current GPU, and bytes of shared memory that one block can have."""
    found: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return found.multi_processor_count, found.shared_memory_per_block_optin


def source(name: str) -> str:
    """Return the source of a kernel."""
    return (resources.files(__package__) / "src" / f"{name}.cu").read_text(encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of NVIDIA's packages that compile and launch; UnavailableError when one is missing."""
    nvrtc = optional.load("cuda.bindings.nvrtc", package="cuda-bindings", install=EXTRA)
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as exc:  # the library behind the bindings
        raise UnavailableError(f"NVRTC does not load: {first_line(exc)}", f"pip install '{EXTRA}'") from exc
    return {"cuda-core": str(_cuda().__version__), "nvrtc": f"{major}.{minor}"}


def demand(capability: tuple[int, int]) -> None:
    """Raise UnavailableError for a GPU without the instructions that the kernels are made of."""
    if capability < OLDEST:
        raise UnavailableError(
            "the kernels need compute capability {}.{}, and this GPU has {}.{}".format(*OLDEST, *capability),
            "use the backend torch-compile",
        )


@functools.cache
def compiled(name: str, constants: Constants, capability: tuple[int, int]) -> Any:
    """Compile a kernel for a compute capability, or find it in the cache; return cuda.core's ObjectCode.

    Raises:
        UnavailableError: NVIDIA's packages are missing, the GPU is too old, or it does not compile.
    """
    demand(capability)
    cuda, cache = _cuda(), optional.load("cuda.core.utils", package="cuda-core", install=EXTRA).FileStreamProgramCache()
    options = cuda.ProgramOptions(
        arch="sm_{}{}".format(*capability), std="c++17", define_macro=[(key, str(value)) for key, value in constants]
    )
    try:
        return cuda.Program(source(name), "c++", options).compile("cubin", cache=cache)
    except (RuntimeError, OSError) as exc:
        raise UnavailableError(
            f"the kernel {name} does not compile: {first_line(exc)}", f"pip install --upgrade '{EXTRA}'"
        ) from exc


@functools.cache
def _loaded(name: str, constants: Constants, device: int, shared: int) -> Any:
    """Return a kernel that a device has in memory, with so much shared memory a block."""
    _cuda().Device(device).set_current()
    kernel = compiled(name, constants, torch.cuda.get_device_capability(device)).get_kernel(name)
    driver = optional.load("cuda.bindings.driver", package="cuda-bindings", install=EXTRA)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(attribute, shared, kernel.handle, device)
    if error:
        raise UnavailableError(
            f"the kernel {name} cannot have {shared} bytes of shared memory: {error}", "use the backend torch-compile"
        )
    return kernel


def start(
    name: str,
    constants: Constants,
    *arguments: Tensor | int | None,
    grid: tuple[int, int, int],
    threads: int,
    shared: int = 0,
) -> None:
    """Start a kernel on PyTorch's current device and stream; tensors go as addresses, numbers as 64 bits."""
    device = torch.cuda.current_device()
    kernel = _loaded(name, constants, device, shared)
    stream = _cuda().Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
    linked = torch.cuda.get_device_capability(device) >= (9, 0)  # the kernel waits by itself for the one before it
    config = _cuda().LaunchConfig(
        grid=grid, block=(threads, 1, 1), shmem_size=shared, programmatic_stream_serialization=linked
    )
    _cuda().launch(stream, config, kernel, *map(_argument, arguments))


def _argument(value: Tensor | int | None) -> Any:
    """Return an argument as the kernels declare it: an address, or 64 bits."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return 0 if value is None else ctypes.c_longlong(value)
