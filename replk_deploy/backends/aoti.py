"""AOTInductor: a weights file compiled ahead of time into a .pt2 package that needs none of our code.

A package holds machine code for the processor that built it, and checks neither size, type nor number
of its images: given float64 it reads the bytes as float32. So its sidecar says what it takes and where
it runs, and is believed before the package is opened.

On a GPU no package has run yet: the one machine tried had a C++ compiler whose libraries crash beside
PyTorch, which `probe` now says. The tests use a false one.
"""

import functools
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
import torch._inductor
from torch import Tensor

from replk_deploy import machine, onednn, weights
from replk_deploy.backends import compiler, cuda, sidecar
from replk_deploy.backends.base import DEFAULT, Array, Arrays, Engine, Launch, Made, Recipe, Settings, TensorSpec
from replk_deploy.backends.cuda import Device
from replk_deploy.backends.torch import CpuLaunch
from replk_deploy.batch import DYNAMIC, Batch
from replk_deploy.errors import ContractError, ReplkError, UnavailableError, first_line
from replk_deploy.lowerings import NONE, counted, modules
from replk_deploy.models.base import Network
from replk_deploy.precision import PRECISIONS, TOLERANCES, Precision
from replk_deploy.progress import Progress

STEPS = 2


@final
class Aoti(Engine):
    """A .pt2 package on PyTorch's runtime for AOTInductor, opened without the network's Python code."""

    name: ClassVar[str] = "aoti"
    takes: ClassVar[Literal["weights", "onnx"]] = "weights"
    precisions: ClassVar[frozenset[Precision]] = frozenset(PRECISIONS)
    honours: ClassVar[frozenset[str]] = frozenset({"cuda_graph"})
    suffix: ClassVar[str] = ".pt2"
    ingredients: ClassVar[frozenset[str]] = frozenset({"batches", "forms"})

    @classmethod
    def probe(cls) -> Mapping[str, str]:
        """Return versions, device and compilers.

        Raises:
            UnavailableError: nothing works that compiles for the device, or what it builds crashes.
        """
        device = cuda.choose(DEFAULT, cls.name)
        return cuda.describe(device) | _compilers(device)

    @classmethod
    def build(cls, source: Path, out: Path, recipe: Recipe, progress: Progress) -> Made:
        """Compile a weights file for the GPU if there is one, else for the processor, and write the package.

        Raises:
            UnavailableError: nothing works that compiles for the device, or it fails.
            ReplkError: not a weights file of ours, or more than one range of batches.
        """
        if len(recipe.batches) > 1:
            ranges = ", ".join(map(str, recipe.batches))
            raise ReplkError(f"a package has one range of batches, not {ranges}", "give --batch MIN:OPT:MAX once")
        batch = recipe.batches[0] if recipe.batches else DYNAMIC
        device = cuda.choose(DEFAULT, cls.name)
        compilers = _compilers(device)
        model, metadata = weights.read(source)
        model = modules.rewritten(model, metadata.preprocessing.size, dict(recipe.forms))
        size, dtype = metadata.preprocessing.size, TOLERANCES[metadata.precision].torch_dtype
        stalls = device == "cpu" and onednn.stalls(model)
        progress(f"build {cls.name}", 0, STEPS)
        with _surroundings(device, metadata.precision, stalls=stalls), cuda.translated("compile the network"):
            program = _program(model, size, batch, device)
            progress(f"build {cls.name}", 1, STEPS)
            _package(program, out)
        progress(f"build {cls.name}", STEPS, STEPS)
        facts = {
            **compilers,
            "onednn": "off" if stalls else "on",
            "shapes": "dynamic batch" if batch.dynamic else "static",
            "lowering": counted(form for _, form in recipe.forms) or NONE,
        }
        free = None if batch.dynamic else batch.max
        spec = TensorSpec(name="images", dtype=str(dtype).removeprefix("torch."), shape=(free, 3, *size))
        return Made(
            input=spec,
            outputs=tuple(model.geometry.outputs),
            batches=(batch,),
            made_with=_made_with(device),
            facts=facts,
        )

    def __init__(self, artefact: Path, settings: Settings = DEFAULT) -> None:
        """Open a package that its sidecar describes and that was built for this machine.

        Raises:
            ReplkError: there is no such file.
            IntegrityError: no sidecar, one of another file or backend, or built elsewhere.
            UnavailableError: it was built for a GPU, and there is none.
        """
        said = sidecar.read(artefact)
        wanted = said.made_with.get("device")
        self.device = cuda.choose(
            Settings(device="cuda" if wanted == "cuda" else "cpu", cuda_graph=settings.cuda_graph), self.name
        )
        sidecar.demand(artefact, said, self.name, _made_with(self.device))
        self.input, self.outputs, self.precision, self.batches = said.input, said.outputs, said.precision, said.batches
        self.facts = {**said.facts, **cuda.describe(self.device)}
        self._graphs = settings.cuda_graph
        self._stream = cuda.stream() if self.device == "cuda" else None
        stalls = said.facts.get("onednn") == "off"
        self._around = functools.partial(_surroundings, self.device, self.precision, stalls=stalls)
        self._loader: Any = _loaded(artefact)

    def _run(self, images: Array) -> Arrays:
        launch = self._launch(images)
        launch.enqueue()
        launch.wait()
        return dict(zip(self.outputs, launch.answers(), strict=True))

    def prepare(self, images: Array) -> Launch:
        """Copy a batch to the device in the input's type; capture the graph if there is one."""
        self._open()
        self.check(images)
        return self._launch(images)

    def close(self) -> None:
        """Drop the package; safe to call twice."""
        self._loader = None

    def _open(self) -> Any:
        if self._loader is None:
            raise ContractError(f"{self.name} was asked after it was closed")
        return self._loader

    def _launch(self, images: Array) -> CpuLaunch | cuda.CudaLaunch:
        loader, dtype = self._open(), getattr(torch, self.input.dtype)
        gpu = self.device == "cuda"
        batch = cuda.place(images, dtype) if gpu else torch.tensor(np.ascontiguousarray(images)).to(dtype)

        def run() -> list[Tensor]:
            with torch.inference_mode(), self._around():
                outputs: list[Tensor] = loader.boxed_run([batch])  # calling the package parses its ports each time
                return outputs

        return cuda.CudaLaunch(run, graph=self._graphs, on=self._stream) if self._stream else CpuLaunch(run)


def _compilers(device: Device) -> dict[str, str]:
    """Name what AOTInductor compiles with: C++ for the frame, and on a GPU Triton for the kernels."""
    gpu = compiler.triton("AOTInductor") if device == "cuda" else {}
    return compiler.cpp("AOTInductor", opened=True) | gpu


def _made_with(device: Device) -> dict[str, str]:
    """Return what must be the same to open a package; one for a processor is compiled for its very model."""
    if device == "cuda":
        kind = {"compute_capability": cuda.capability()}
    else:
        kind = {
            "processor": str(machine.environment()["cpu"]),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }
    return {"torch": torch.__version__, "device": device, **kind}


def _surroundings(device: Device, precision: Precision, *, stalls: bool) -> AbstractContextManager[None]:
    return cuda.arithmetic(tf32=precision == "tf32") if device == "cuda" else onednn.avoided(stalls)


def _program(model: Network, size: tuple[int, int], batch: Batch, device: Device) -> torch.export.ExportedProgram:
    if device == "cuda":
        model = model.to(cuda.DEVICE)
    weight = next(model.parameters())
    count = max(batch.opt, 2) if batch.dynamic else batch.max  # 1 would be taken for a constant
    free = {0: torch.export.Dim("batch", min=batch.min, max=batch.max)} if batch.dynamic else None
    example = torch.zeros(count, 3, *size, dtype=weight.dtype, device=weight.device)
    return torch.export.export(model, (example,), dynamic_shapes=(free,))


def _package(program: torch.export.ExportedProgram, out: Path) -> None:
    """Compile, and move the package to its place when it is whole."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        path = Path(folder, "model.pt2")
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        except torch.OutOfMemoryError:
            raise  # in the words of cuda.translated
        except (RuntimeError, OSError) as exc:  # RuntimeError is the base of Inductor's
            raise UnavailableError(f"AOTInductor cannot compile: {first_line(exc)}", "use torch-compile") from exc
        path.replace(out)


def _loaded(artefact: Path) -> Any:
    """Open a package for one thread: its locks would wait for the last inference, and cannot be captured in a graph."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "model.pt2")  # PyTorch wants that ending, which a file that is still judged lacks
        link.symlink_to(artefact.absolute())
        try:
            return torch._inductor.aoti_load_package(str(link), run_single_threaded=True).loader
        except (RuntimeError, OSError) as exc:
            raise UnavailableError(
                f"PyTorch {torch.__version__} cannot open {artefact}: {first_line(exc)}",
                "build it again: replk build --backend aoti",
            ) from exc
