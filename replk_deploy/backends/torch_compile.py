"""PyTorch through torch.compile: generated code where Inductor has it, library calls elsewhere.

torch.compile answers eagerly, without a word, when it is switched off or told to suppress errors.
A number measured that way would carry the wrong name, so each answer is checked to have passed
through the compiled graph. CUDA graphs are captured from outside, as for eager PyTorch, so that the
two differ in nothing but the compiler.

Its part for GPUs ran on an H100 (torch 2.11, CUDA 13.0); the tests use a false one.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import torch
import torch._dynamo
from torch import Tensor
from torch._inductor.compile_fx import compile_fx

from replk_deploy.backends import compiler
from replk_deploy.backends.base import DEFAULT, Array, Launch, Settings
from replk_deploy.backends.cuda import Device
from replk_deploy.backends.torch import Forward, TorchRuntime
from replk_deploy.errors import UnavailableError, first_line
from replk_deploy.models.base import Network

SHAPES = 64  # input shapes that one process may compile; torch's own limit of 8 is shared by all open files
SWITCH_ON = "unset TORCH_COMPILE_DISABLE TORCHDYNAMO_DISABLE"
LAYOUT = {  # asked for → how Inductor may change it; on its own it turns static convolutional networks to channels last
    "auto": {},
    "nchw": {"layout_optimization": False},
    "nhwc": {"layout_optimization": True, "force_layout_optimization": True},
}


@final
class TorchCompile(TorchRuntime):
    """A weights file compiled with torch.compile, once for each input shape."""

    name: ClassVar[str] = "torch-compile"

    @classmethod
    def _here(cls, device: Device) -> dict[str, str]:
        if torch._dynamo.config.disable:
            raise UnavailableError("torch.compile is switched off", SWITCH_ON)
        return super()._here(device) | compiler.of(device, "torch.compile")

    def __init__(self, artefact: Path, settings: Settings = DEFAULT) -> None:
        """Open a weights file; nothing is compiled before the first batch, whose shape it is compiled for.

        Raises:
            CheckpointError: not a weights file of ours, or damaged.
            UnavailableError: no compiler works, torch.compile is switched off, or there is no GPU as asked.
        """
        self._answers = 0
        super().__init__(artefact, settings)
        chosen = {"auto": "inductor's choice", "nchw": "off", "nhwc": "forced"}[self._asked]
        said = {"shapes": "static", "mode": "default", "layout_optimization": chosen}
        self.facts = {**self.facts, **said}

    def _ready(self, model: Network) -> Forward:
        patches: dict[str, Any] = {"triton.cudagraphs": False, **LAYOUT[self._asked]}

        def inductor(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
            compiled = compile_fx(graph, examples, config_patches=patches)

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


def _reason(exc: Exception) -> str:
    return first_line(
        getattr(exc, "inner_exception", exc)
    )  # Dynamo puts "backend raised:" before the words that matter
