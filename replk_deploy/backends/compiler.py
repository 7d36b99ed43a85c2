"""What turns the code that PyTorch generates into machine code: a C++ compiler, and for a GPU Triton.

The part for GPUs has not been executed on one yet.
"""

import subprocess
import tempfile
from pathlib import Path

from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.utils._triton import has_triton

from replk_deploy import optional
from replk_deploy.backends.cuda import Device
from replk_deploy.errors import UnavailableError, first_line

SOURCE = """
#include <Python.h>
#include <omp.h>
#include <vector>
extern "C" int kernel() { return std::vector<int>(1).front(); }
"""


def cpp(name: str) -> dict[str, str]:
    """Name the C++ compiler that PyTorch uses, once it has built a few lines with it.

    Raises:
        UnavailableError: none works.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "kernel.cpp")
            source.write_text(SOURCE, encoding="utf-8")
            options = CppTorchOptions(warning_all=False)
            CppBuilder("kernel", [str(source)], options, folder).build()
            return {"compiler": Path(options.get_compiler()).name}
    except (InvalidCxxCompiler, CppCompileError, OSError, subprocess.SubprocessError) as exc:
        raise UnavailableError(
            f"{name} needs a C++ compiler that works: {first_line(exc)}", "apt-get install g++ python3-dev"
        ) from exc


def triton(name: str) -> dict[str, str]:
    """Return the version of Triton, which compiles for GPUs.

    Raises:
        UnavailableError: it is not installed, or cannot compile for this GPU.
    """
    found = optional.load("triton", package="triton", install="triton")
    if not has_triton():
        raise UnavailableError(
            f"{name}: triton {found.__version__} cannot compile for this GPU", "use the backend torch"
        )
    return {"triton": str(found.__version__)}


def of(device: Device, name: str) -> dict[str, str]:
    """Name what compiles for a device; UnavailableError when that is missing."""
    return cpp(name) if device == "cpu" else triton(name)
