"""What turns the code that PyTorch generates into machine code: a C++ compiler, and for a GPU Triton.

Its part for GPUs ran on an H100 (torch 2.11, CUDA 13.0); the tests use a false one.
"""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.utils._triton import has_triton

from replk_deploy import optional
from replk_deploy.backends.cuda import Device
from replk_deploy.errors import UnavailableError, first_line

SOURCE = """
#include <Python.h>
#include <omp.h>
#include <locale>
#include <vector>
extern "C" int kernel() {
    const char text[] = "a";  // what std::regex asks for a range of letters, without the seconds that it takes to build
    const auto& order = std::use_facet<std::collate<char>>(std::locale());
    return std::vector<int>(1).front() + order.transform(text, text + 1).empty();
}
"""
ALONE = """
import ctypes, sys
folder, library = sys.argv[1:]
try:  # what importing PyTorch loads, in the same way and without the seconds
    ctypes.CDLL(f"{folder}/libtorch_global_deps.so", ctypes.RTLD_GLOBAL)
    ctypes.CDLL(f"{folder}/libtorch_python.so")
except OSError:
    import torch  # knows where else to look
ctypes.CDLL(library).kernel()
"""
SECONDS = 60  # that a call of no work may take


def cpp(name: str, *, opened: bool = False) -> dict[str, str]:
    """Name the C++ compiler that PyTorch uses, once it has built a few lines with it.

    Args:
        name: of what needs it.
        opened: call what was built, too. The frame of an AOTInductor package uses std::regex, which takes the
            process down where the compiler links a second libstdc++ into it.

    Raises:
        UnavailableError: none works, or what it builds does not work beside PyTorch.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "kernel.cpp")
            source.write_text(SOURCE, encoding="utf-8")
            options = CppTorchOptions(warning_all=False)
            builder = CppBuilder("kernel", [str(source)], options, folder)
            builder.build()
            if opened:
                _survive(name, builder.get_target_file_path())
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


def _survive(name: str, library: str) -> None:
    """Call a library in a process that has loaded PyTorch and nothing else, which could hide or cause a crash."""
    command = [sys.executable, "-P", "-c", ALONE, str(Path(torch.__file__).parent / "lib"), library]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)  # noqa: S603  # all words ours
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        crashed = done.returncode < 0
        how = (
            f"crashes beside PyTorch ({signal.Signals(-done.returncode).name})" if crashed else f"does not open: {last}"
        )
        raise UnavailableError(
            f"{name}: what the C++ compiler builds {how}; is its libstdc++ another one, linked statically?",
            "use torch-compile, or a g++ that links libstdc++ dynamically",
        )
