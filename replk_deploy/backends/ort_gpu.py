"""ONNX Runtime on a GPU: its CUDA provider and its TensorRT provider.

A node that a provider cannot take is a silent run on the CPU in ONNX Runtime, and a provider that does
not load is a warning. So a session of one node is opened beforehand, settings are read back, and the placement
of each node is asked for and judged.

The CUDA provider ran on an H100 (onnxruntime-gpu 1.31), the TensorRT provider nowhere yet. The tests use a
false GPU and ONNX Runtime's CPU provider in the place of the GPU's: binding, placement, options, refusals.
"""

import abc
import contextlib
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import onnx

from replk_deploy import machine, optional
from replk_deploy.backends import cuda, ort_kernels, ports
from replk_deploy.backends.base import DEFAULT, Array, Arrays, LayerTime, Settings
from replk_deploy.backends.cuda import CudaLaunch
from replk_deploy.backends.ort import Names, OrtRuntime, executions, onnxruntime, session_of, session_options
from replk_deploy.backends.ort_binding import NO_CAPTURE, Bound
from replk_deploy.backends.ort_kernels import Execution
from replk_deploy.backends.ports import Ports
from replk_deploy.batch import DYNAMIC, Batch
from replk_deploy.errors import ReplkError, UnavailableError, first_line
from replk_deploy.precision import TOLERANCES, Precision

SWAP = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'replk-deploy[gpu]'"
# What ONNX Runtime computes on the CPU to save copies: sizes, never images. Both providers have GPU kernels
# for all of them, so none is there for want of one.
SHAPES_ONLY = frozenset(
    {"Shape", "Size", "Gather", "Slice", "Squeeze", "Unsqueeze", "Concat", "Range", "ConstantOfShape"}
)
FEW = 3
STREAM = "user_compute_stream"
WARM_UPS = 2  # of a profiled session


class OrtGpu(OrtRuntime):
    """What the two providers share: the checks, the stream, the memory that inputs and outputs are bound to."""

    honours: ClassVar[frozenset[str]] = frozenset({"cuda_graph"})
    device: Literal["cpu", "cuda"] = "cuda"
    lacking: ClassVar[str]  # what to install when one does not load

    @classmethod
    @final
    def probe(cls) -> Mapping[str, str]:
        """Return versions, provider and GPU.

        Raises:
            UnavailableError: no GPU, no build of ONNX Runtime for GPUs, two builds at once, or a library that
                does not load.
        """
        found = {name: machine.version(name) for name in ("onnxruntime", "onnxruntime-gpu")}
        if all(found.values()):
            both = " and ".join(f"{name} {number}" for name, number in found.items())
            raise UnavailableError(f"{cls.name} is broken: {both} are installed and both share one module", SWAP)
        ort = onnxruntime("gpu")
        if cls.provider not in ort.get_available_providers():
            raise UnavailableError(f"onnxruntime {ort.__version__} is built without {cls.provider}", SWAP)
        cuda.demand(cls.name)
        cls._preload()
        try:  # by ONNX Runtime itself: its libraries may not be opened by anybody else first
            session = ort.InferenceSession(
                _one_node(), session_options(ort), providers=[(cls.provider, {})], enable_fallback=0
            )
        except Exception as exc:  # ONNX Runtime's errors share no other base
            raise UnavailableError(f"{cls.provider} does not load: {first_line(exc)}", cls.lacking) from exc
        if session.get_providers()[0] != cls.provider:
            raise UnavailableError(f"{cls.provider} does not load: ONNX Runtime fell back to the CPU", cls.lacking)
        return {"onnxruntime": ort.__version__, "provider": cls.provider, **cuda.facts()}

    @classmethod
    def _preload(cls) -> None:
        """Load what the provider's libraries need besides what PyTorch has loaded."""

    def __init__(self, artefact: Path, settings: Settings = DEFAULT) -> None:
        """Open an ONNX file with every computing node on the GPU.

        Raises:
            ReplkError: not a whole ONNX file, or not a network from one image batch to floating outputs.
            UnavailableError: this machine lacks what the provider needs, or the provider cannot do all of it.
        """
        facts = dict(self.probe())
        self._graphs, self._ids = settings.cuda_graph, itertools.count(1)
        self._stream = cuda.stream()
        said, batch = ports.of_file(artefact)
        if said.precision not in self.precisions:  # before the provider builds what takes minutes
            raise self._not_offered(said.precision, artefact)
        self._artefact, self._asked = artefact, self._providers(said, batch, settings)
        options = session_options(onnxruntime("gpu"))
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self._start(artefact, options, self._asked)
        self._demand_placement(artefact)
        self.facts = facts | {"cuda_graph": "on" if self._graphs else "off"} | self._in_force(self._asked[0][1])

    @abc.abstractmethod
    def _providers(
        self, said: Ports, batch: Batch | None, settings: Settings
    ) -> Sequence[tuple[str, Mapping[str, str]]]:
        """Return the providers with their options, the one that is meant first."""

    def _in_force(self, asked: Mapping[str, str]) -> dict[str, str]:
        """Return the options asked for, once they are known to be in force; addresses tell nobody anything."""
        held = self._session.get_provider_options()[self.provider]
        wanted = {name: value for name, value in asked.items() if name != STREAM}
        unlike = [f"{k}={v}, got {held.get(k)}" for k, v in wanted.items() if not _same(v, held.get(k))]
        if unlike:
            raise UnavailableError(f"{self.name} asked for {'; '.join(unlike)}", f"install another version: {SWAP}")
        return wanted

    def _demand_placement(self, artefact: Path) -> None:
        """Raise UnavailableError unless every node that computes on images is the provider's."""
        groups = self._session.get_provider_graph_assignment_info()
        placed = [(group.ep_name, node) for group in groups for node in group.get_nodes()]
        if self.provider not in {provider for provider, _ in placed}:
            raise UnavailableError(f"{self.provider} takes no node of {artefact}", "use the backend torch or ort-cpu")
        away = [
            f"{node.name} ({node.op_type}) to {provider}"
            for provider, node in placed
            if provider != self.provider and node.op_type not in SHAPES_ONLY
        ]
        if away:
            more = f" and {len(away) - FEW} more" if len(away) > FEW else ""
            raise UnavailableError(
                f"{self.provider} leaves nodes of {artefact} to others: {', '.join(away[:FEW])}{more}",
                "a latency would be that of two devices: use the backend torch, which runs all of it on the GPU",
            )

    def _run(self, images: Array) -> Arrays:
        launch = self._bound(images, NO_CAPTURE)
        launch.enqueue()
        launch.wait()
        return dict(zip(launch.answer, launch.answers(), strict=True))

    def prepare(self, images: Array) -> CudaLaunch:
        """Bind a batch and its outputs on the GPU and capture the graph if there is one; `run` answers outside it."""
        self._open()
        self.check(images)
        launch = self._bound(images, next(self._ids) if self._graphs else NO_CAPTURE)
        if self._graphs:
            launch.enqueue()
            launch.wait()
        return launch

    def _bound(self, images: Array, number: int, session: Any = None) -> CudaLaunch:
        """Return a launch whose addresses stay; `number` is that of its CUDA graph."""
        run = Bound(session or self._open(), self.input, self.outputs, cuda.place(self._cast(images)), number)
        return CudaLaunch(run, graph=False, on=self._stream)


@final
class OrtCuda(OrtGpu):
    """An ONNX file on ONNX Runtime's CUDA provider, whose convolutions are cuDNN's."""

    name: ClassVar[str] = "ort-cuda"
    precisions: ClassVar[frozenset[Precision]] = frozenset({"fp32", "tf32", "fp16"})
    honours: ClassVar[frozenset[str]] = frozenset({"cuda_graph", "layout", "conv_search"})
    provider: ClassVar[str] = "CUDAExecutionProvider"
    lacking: ClassVar[str] = "pip install 'onnxruntime-gpu[cuda,cudnn]', in the CUDA version of torch"

    def _providers(
        self, said: Ports, batch: Batch | None, settings: Settings
    ) -> Sequence[tuple[str, Mapping[str, str]]]:
        del batch  # it takes any
        options = {
            "device_id": "0",
            # "0" means no tensor cores at all, for float16 convolutions too: then they are up to 30 times slower
            "use_tf32": "0" if said.precision == "fp32" else "1",
            "cudnn_conv_algo_search": settings.conv_search.upper(),
            "prefer_nhwc": "1" if settings.layout == "nhwc" else "0",
            "enable_cuda_graph": "1" if self._graphs else "0",
            STREAM: str(self._stream.cuda_stream),
        }
        return [(self.provider, options)]

    def layer_times(self, images: Array, *, repeats: int) -> tuple[LayerTime, ...]:
        """Time the kernels that each node launches, with PyTorch's profiler, in a session of its own.

        Two runs more warm up: one that learns the shapes, in which cuDNN searches, and one between the places
        that stay.
        """
        self._open()
        self.check(images)
        ort_kernels.demand(self.name)
        with tempfile.TemporaryDirectory() as folder:
            options = session_options(onnxruntime("gpu"))
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, "nodes"))
            session = session_of(onnxruntime("gpu"), self._artefact, options, self._asked)
            launch = self._bound(images, NO_CAPTURE, session)
            _once(launch)
            with ort_kernels.recorded(Path(folder)) as kernels:
                for _ in range(repeats):
                    _once(launch)
            origin = session.get_profiling_start_time_ns()
            trace = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        names = Names(self._artefact)
        nodes = [
            [
                Execution(names.original(name, kind), kind, origin + 1000 * start, origin + 1000 * (start + length))
                for start, length in times[WARM_UPS:]
            ]
            for name, kind, times in executions(trace, WARM_UPS + repeats)
        ]
        return ort_kernels.attributed(nodes, kernels)

    def _not_offered(self, precision: Precision, artefact: Path) -> UnavailableError:
        return UnavailableError(
            f"ONNX Runtime's CUDA provider lacks kernels for {precision}: {artefact}",
            "export it again: replk export --onnx --precision fp16, or use the backend torch or trt",
        )


@final
class OrtTrt(OrtGpu):
    """An ONNX file on ONNX Runtime's TensorRT provider, which builds its engine when it opens the file."""

    name: ClassVar[str] = "ort-trt"
    precisions: ClassVar[frozenset[Precision]] = frozenset({"tf32", "fp16"})
    provider: ClassVar[str] = "TensorrtExecutionProvider"
    lacking: ClassVar[str] = (
        "it needs CUDA, cuDNN and TensorRT 10: pip install 'onnxruntime-gpu[cuda,cudnn]' 'tensorrt<11'"
    )

    @classmethod
    def _preload(cls) -> None:
        with contextlib.suppress(UnavailableError):  # TensorRT may also be where the loader looks
            optional.load("tensorrt_libs", package="tensorrt", install="tensorrt<11")

    def _providers(
        self, said: Ports, batch: Batch | None, settings: Settings
    ) -> Sequence[tuple[str, Mapping[str, str]]]:
        options = {
            "device_id": "0",
            "trt_fp16_enable": "1" if said.precision == "fp16" else "0",
            "trt_cuda_graph_enable": "1" if settings.cuda_graph else "0",
            STREAM: str(self._stream.cuda_stream),
        }
        free, *image = said.input.shape
        if None in image:
            raise ReplkError(
                f"{self.name} builds for one size, and {said.input.name} takes any", "export it with --size HxW"
            )
        if free is None:
            self.batches = (batch or DYNAMIC,)
            shapes = {"min": self.batches[0].min, "opt": self.batches[0].opt, "max": self.batches[0].max}
            options |= {
                f"trt_profile_{which}_shapes": f"{said.input.name}:{'x'.join(map(str, (count, *image)))}"
                for which, count in shapes.items()
            }
        return [(self.provider, options), ("CUDAExecutionProvider", {"device_id": "0", STREAM: options[STREAM]})]

    def layer_times(self, images: Array, *, repeats: int) -> tuple[LayerTime, ...]:
        """Refuse: to ONNX Runtime, an engine is one node.

        Raises:
            UnavailableError: always.
        """
        del images, repeats
        raise UnavailableError(
            f"{self.name} runs the whole network as one node, which has no layers to time",
            "profile the backend trt, which times the layers of such an engine",
        )

    def _not_offered(self, precision: Precision, artefact: Path) -> UnavailableError:
        why = "has no switch for TF32, so fp32 is" if precision == "fp32" else f"has no {precision}, so that is"
        return UnavailableError(
            f"ONNX Runtime's TensorRT provider {why} not offered: {artefact}",
            "export it as tf32 or fp16: replk export --onnx --precision fp16; or use ort-cuda or trt",
        )


def _once(launch: CudaLaunch) -> None:
    launch.enqueue()
    launch.wait()


def _one_node() -> bytes:
    """Return the smallest network that a provider can be asked to open."""
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "probe", ports[:1], ports[1:])
    opset = onnx.helper.make_opsetid("", TOLERANCES["fp32"].opset)
    return bytes(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())


def _same(asked: str, held: str | None) -> bool:
    return held == asked or {asked, held} in ({"1", "true"}, {"1", "True"}, {"0", "false"}, {"0", "False"})
