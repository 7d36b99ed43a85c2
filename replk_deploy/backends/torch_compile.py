"""PyTorch through torch.compile on the CPU: generated C++ where Inductor has it, library calls elsewhere.

torch.compile answers eagerly, without a word, when it is switched off or told to suppress errors.
A number measured that way would carry the wrong name, so each answer is checked to have passed
through the compiled graph.
"""

import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import torch
import torch._dynamo
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from replk_deploy.backends.base import Array, Launch
from replk_deploy.backends.torch import Forward, TorchRuntime
from replk_deploy.errors import UnavailableError, first_line
from replk_deploy.models.base import Network

SHAPES = 64  # input shapes that one process may compile; torch's own limit of 8 is shared by all open files
SWITCH_ON = "unset TORCH_COMPILE_DISABLE TORCHDYNAMO_DISABLE"
SOURCE = """
#include <Python.h>
#include <omp.h>
#include <vector>
extern "C" int kernel() { return std::vector<int>(1).front(); }
"""


@final
class TorchCompile(TorchRuntime):
    """A weights file compiled with torch.compile, once for each input shape."""

    name: ClassVar[str] = "torch-compile"

    @classmethod
    def probe(cls) -> Mapping[str, str]:
        """Return versions and compiler after compiling a few lines of C++ with it.

        Raises:
            UnavailableError: no compiler works, or torch.compile is switched off.
        """
        if torch._dynamo.config.disable:
            raise UnavailableError("torch.compile is switched off", SWITCH_ON)
        return {**super().probe(), "compiler": _compiler()}

    def _ready(self, model: Network) -> Forward:
        self._answers = 0

        def inductor(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
            compiled = compile_fx(graph, examples)

            def counted(*args: Any) -> Any:
                self._answers += 1
                return compiled(*args)  # type: ignore[operator]  # a graph that was compiled just in time is callable

            return counted

        # static shapes: a number for one batch must not come from a kernel made for any batch
        compiled = torch.compile(model, backend=inductor, fullgraph=True, dynamic=False)
        return self._checked(compiled)

    def _checked(self, compiled: Callable[[Tensor], Any]) -> Forward:
        def forward(images: Tensor) -> tuple[Tensor, ...]:
            before = self._answers
            answer: tuple[Tensor, ...] = compiled(images)
            if self._answers != before + 1:
                raise UnavailableError("torch.compile answered eagerly: nothing was compiled", SWITCH_ON)
            return answer

        return forward

    def prepare(self, images: Array) -> Launch:
        """Copy a batch in and compile for its shape, so that no launch has to."""
        self.run(images)
        return super().prepare(images)

    def _run(self, images: Array) -> Mapping[str, Array]:
        with torch._dynamo.config.patch(suppress_errors=False, recompile_limit=SHAPES):
            try:
                return super()._run(images)
            except RuntimeError as exc:  # the base of Dynamo's errors, and itself where no frame was compiled
                raise UnavailableError(f"torch.compile failed: {_reason(exc)}", "use the backend torch") from exc


def _compiler() -> str:
    """Name the C++ compiler that torch.compile uses, once it has built something."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "kernel.cpp")
            source.write_text(SOURCE, encoding="utf-8")
            options = CppTorchOptions(warning_all=False)
            CppBuilder("kernel", [str(source)], options, folder).build()
            return Path(options.get_compiler()).name
    except (InvalidCxxCompiler, CppCompileError, OSError, subprocess.SubprocessError) as exc:
        raise UnavailableError(
            f"torch.compile needs a C++ compiler that works: {_reason(exc)}", "apt-get install g++ python3-dev"
        ) from exc


def _reason(exc: Exception) -> str:
    return first_line(
        getattr(exc, "inner_exception", exc)
    )  # Dynamo puts "backend raised:" before the words that matter
