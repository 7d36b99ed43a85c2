"""CUDA C++ of this folder → machine code for one GPU, compiled at first use and kept in the user's cache.

NVRTC compiles it, through NVIDIA's Python packages: nothing is compiled when the project is installed, and no
nvcc is needed. Compiling needs neither a GPU nor a driver.
"""

import ctypes
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from replk_deploy import machine, optional
from replk_deploy.errors import ReplkError, UnavailableError, first_line

Constants = tuple[tuple[str, int], ...]
OLDEST = (8, 0)  # the first with mma.sync.m16n8k16
EXTRA = "replk-deploy[native]"
MOST = 2**31 - 1
BLOCKS = 2**16 - 1  # in the second and the third direction of a grid


_IMPORT = threading.Lock()  # its parts import one another: two threads that begin at once get half of it


@functools.cache
def _cuda() -> Any:
    with _IMPORT:
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


@contextmanager
def translated(task: str) -> Iterator[None]:
    """Turn a failure of NVIDIA's packages inside the block, or too little memory, into an UnavailableError."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise UnavailableError(
            f"the GPU has too little memory to {task}: {first_line(exc)}",
            "use a smaller batch, or close what else holds its memory: nvidia-smi",
        ) from exc
    except Exception as exc:  # what cuda.core raises has no base that it shows
        if not type(exc).__module__.startswith("cuda."):
            raise
        words = str(exc).strip("\0\n ")  # with the compiler's log
        raise UnavailableError(
            f"NVIDIA's packages could not {task}: {words}", f"pip install --upgrade '{EXTRA}'"
        ) from exc


@functools.cache
def compiled(name: str, constants: Constants, capability: tuple[int, int]) -> Any:
    """Compile a kernel for a compute capability, or find it in the cache; return cuda.core's ObjectCode.

    What is found in the cache came from the same source and constants, by the same NVRTC, for the same GPUs.

    Raises:
        UnavailableError: NVIDIA's packages are missing, the GPU is too old, it does not compile, or the cache cannot
            be written.
    """
    demand(capability)
    cuda, utils = _cuda(), optional.load("cuda.core.utils", package="cuda-core", install=EXTRA)
    options = cuda.ProgramOptions(
        arch="sm_{}{}".format(*capability), std="c++17", define_macro=[(key, str(value)) for key, value in constants]
    )
    try:
        cache = utils.FileStreamProgramCache(machine.cache() / "replk" / "kernels")
        with translated(f"compile the kernel {name} for {capability[0]}.{capability[1]}"):
            return cuda.Program(source(name), "c++", options).compile("cubin", cache=cache)
    except OSError as exc:
        raise UnavailableError(
            f"compiled kernels cannot be kept: {exc}", "let XDG_CACHE_HOME be your own folder"
        ) from exc


@functools.cache
def _loaded(name: str, constants: Constants, device: int, shared: int) -> Any:
    """Return a kernel that a device has in memory, with so much shared memory a block."""
    code = compiled(name, constants, torch.cuda.get_device_capability(device))
    with translated(f"load the kernel {name}"):
        _cuda().Device(device).set_current()
        kernel = code.get_kernel(name)
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
    """Start a kernel on PyTorch's current device and stream; tensors go as addresses, numbers as 32 bits.

    Raises:
        ReplkError: a number is too large, or too many blocks.
        UnavailableError: as for `compiled`, or it does not start.
    """
    numbers = [value for value in arguments if isinstance(value, int)]
    if max(numbers, default=0) > MOST:
        raise ReplkError(
            f"maps lie {max(numbers)} elements apart, and a kernel counts to {MOST}", "use a smaller batch"
        )
    if max(grid[1:]) > BLOCKS:
        raise ReplkError(
            f"the kernel {name} needs {max(grid[1:])} blocks in one direction, and a GPU takes {BLOCKS}",
            "use a smaller batch",
        )
    device = torch.cuda.current_device()
    kernel = _loaded(name, constants, device, shared)
    linked = torch.cuda.get_device_capability(device) >= (9, 0)  # the kernel waits by itself for the one before it
    with translated(f"start the kernel {name}"):
        stream = _cuda().Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
        config = _cuda().LaunchConfig(
            grid=grid, block=(threads, 1, 1), shmem_size=shared, programmatic_stream_serialization=linked
        )
        _cuda().launch(stream, config, kernel, *map(_argument, arguments))


def _argument(value: Tensor | int | None) -> Any:
    """Return an argument as the kernels declare it: an address, or 32 bits."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return 0 if value is None else ctypes.c_int(value)
