# ruff: noqa: ARG002, FBT001  # methods take what they take there
"""A double of TensorRT: enough to see what the adapter asks for, in which order, and what it does with the answers.

It builds a "plan" that is JSON, and its contexts read and write the addresses that they are given, in the
memory of the processor. Beside it stands a double of a CUDA device, for torch.cuda.
"""

import ctypes
import enum
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from replk_deploy.backends import cuda

GPU = {"device": "cuda", "gpu": "Pretended GPU", "compute_capability": "8.9", "cuda": "13.0", "cudnn": "92400"}
TYPES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.BFLOAT16: "BF16"}
CTYPES = {"FLOAT": (ctypes.c_float, np.float32), "HALF": (ctypes.c_uint16, np.float16)}
LAYERS = [("first/Conv", 2.0), ("head/Gemm", 0.5)]
SCRATCH = 4096


class World:
    """What happened, and what goes wrong: habits of the double."""

    def __init__(self, **habits: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.habits = habits
        self.capturing: list[Callable[[], object]] | None = None
        self.config: Any = None
        self.profiles: list[list[tuple[int, ...]]] = []
        self.host_code: bool | None = None

    def told(self, *names: str) -> list[tuple[Any, ...]]:
        """Return the calls of these names, in order."""
        return [call for call in self.calls if call[0] in names]


def members(name: str, *names: str) -> Any:
    return enum.IntEnum(name, {each: index for index, each in enumerate(names)})


def tensorrt(world: World, version: str = "11.4.0.106") -> ModuleType:
    """Return a module that stands in for `tensorrt`."""
    trt: Any = ModuleType("tensorrt")
    trt.__version__ = version
    trt.BuilderFlag = members("BuilderFlag", "TF32", "REFIT", "VERSION_COMPATIBLE")
    trt.NetworkDefinitionCreationFlag = members("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")
    trt.ProfilingVerbosity = members("ProfilingVerbosity", "LAYER_NAMES_ONLY", "DETAILED", "NONE")
    trt.MemoryPoolType = members("MemoryPoolType", "WORKSPACE")
    trt.HardwareCompatibilityLevel = members(
        "HardwareCompatibilityLevel", "NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"
    )
    trt.DataType = members("DataType", "FLOAT", "HALF", "BF16", "INT8", "UINT8")
    trt.LayerInformationFormat = members("LayerInformationFormat", "ONELINE", "JSON")
    trt.ExecutionContextAllocationStrategy = members(
        "ExecutionContextAllocationStrategy", "STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"
    )
    severities = members("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
    trt.ErrorCode = members("ErrorCode", "SUCCESS", "INVALID_NODE")

    class ILogger:
        Severity = severities

    class IProgressMonitor:
        pass

    class IProfiler:
        pass

    class ITensor:
        def __init__(self, port: onnx.ValueInfoProto) -> None:
            kind = port.type.tensor_type
            self.name, self.dtype = port.name, trt.DataType[TYPES[kind.elem_type]]
            self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)

    class INetworkDefinition:
        def __init__(self) -> None:
            self.inputs, self.outputs = [], []

        num_inputs = property(lambda self: len(self.inputs))
        num_outputs = property(lambda self: len(self.outputs))

        def get_input(self, index: int) -> ITensor:
            return self.inputs[index]

        def get_output(self, index: int) -> ITensor:
            return self.outputs[index]

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self.network = network

        def parse_from_file(self, model: str) -> bool:
            graph = onnx.load(model).graph
            self.network.inputs = [ITensor(port) for port in graph.input]
            self.network.outputs = [ITensor(port) for port in graph.output]
            return True

        def get_error(self, index: int) -> None:
            raise AssertionError(index)

    class IOptimizationProfile:
        def __init__(self) -> None:
            self.shapes: list[tuple[int, ...]] = []

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002  # the names it has there
            world.calls.append(("set_shape", input, min, opt, max))
            self.shapes = [min, opt, max]

    class ITimingCache:
        def __init__(self, blob: bytes) -> None:
            self.blob = blob

        def serialize(self) -> bytes:
            return self.blob + b"+measured"

    class IBuilderConfig:
        def __init__(self) -> None:
            world.config = self
            self.flags = {trt.BuilderFlag.TF32}
            self._level, self._hardware, self._pool, self._cache = 3, trt.HardwareCompatibilityLevel.NONE, 0, None

        def set_flag(self, flag: Any) -> None:
            if flag.name not in world.habits.get("stuck", ()):
                self.flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            if flag.name not in world.habits.get("stuck", ()):
                self.flags.discard(flag)

        def get_flag(self, flag: Any) -> bool:
            return flag in self.flags

        @property
        def builder_optimization_level(self) -> int:
            return self._level

        @builder_optimization_level.setter
        def builder_optimization_level(self, level: int) -> None:
            self._level = level if 0 <= level <= 5 else self._level

        @property
        def hardware_compatibility_level(self) -> Any:
            return self._hardware

        @hardware_compatibility_level.setter
        def hardware_compatibility_level(self, level: Any) -> None:
            self._hardware = self._hardware if world.habits.get("one_gpu") else level

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._pool = pool_size

        def get_memory_pool_limit(self, pool: Any) -> int:
            return self._pool

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
            world.calls.append(("create_timing_cache", serialized_timing_cache))
            return ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            self._cache = cache
            return not world.habits.get("cache_of_another")

        def get_timing_cache(self) -> ITimingCache:
            return self._cache

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            world.profiles.append(profile.shapes)
            return -1 if world.habits.get("no_profile") else len(world.profiles) - 1

    class Builder:
        def __init__(self, logger: Any) -> None:
            if world.habits.get("stub"):
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._logger = logger

        def create_network(self, flags: int) -> INetworkDefinition:
            world.calls.append(("create_network", flags))
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: Any) -> bytes | None:
            config.progress_monitor.phase_start("Building", None, 1)
            config.progress_monitor.step_complete("Building", 0)
            config.progress_monitor.phase_finish("Building")
            for severity, text in world.habits.get("says", ()):
                self._logger.log(severities[severity], text)
            if world.habits.get("builds_nothing"):
                return None
            ports = [(t.name, t.dtype.name, t.shape) for t in (*network.inputs, *network.outputs)]
            refittable = trt.BuilderFlag.REFIT in config.flags
            return json.dumps({"ports": ports, "profiles": world.profiles, "refittable": refittable}).encode()

    class ICudaEngine:
        device_memory_size_v2 = SCRATCH

        def __init__(self, plan: bytes) -> None:
            said = json.loads(plan)
            self._ports = {name: (dtype, shape) for name, dtype, shape in said["ports"]}
            self._profiles, self.refittable = said["profiles"], said["refittable"]
            self._weights = said.get("weights", "old")

        num_io_tensors = property(lambda self: len(self._ports))

        def get_tensor_name(self, index: int) -> str:
            return list(self._ports)[index]

        def get_tensor_dtype(self, name: str) -> Any:
            return trt.DataType[self._ports[name][0]]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(self._ports[name][1])

        def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
            return SCRATCH // (2 - profile_index)

        def create_execution_context(self, strategy: Any) -> "IExecutionContext":
            world.calls.append(("create_execution_context", strategy.name))
            return IExecutionContext(self)

        def create_engine_inspector(self) -> "EngineInspector":
            return EngineInspector()

        def serialize(self) -> bytes:
            ports = [(name, *port) for name, port in self._ports.items()]
            return json.dumps(
                {"ports": ports, "profiles": self._profiles, "refittable": True, "weights": self._weights}
            ).encode()

    class IExecutionContext:
        """Answers, for each image, its mean and its first value."""

        def __init__(self, engine: ICudaEngine) -> None:
            self._engine = engine
            self._at: dict[str, int] = {}
            self.profiler: Any = None
            self.enqueue_emits_profile = True

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            world.calls.append(("profile", profile_index, stream_handle))
            self._profile = profile_index
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            world.calls.append(("shape", name, shape))
            self._shape = shape
            if not self._engine._profiles:
                return shape == self._engine.get_tensor_shape(name)
            low, _, high = self._engine._profiles[self._profile]
            return low[0] <= shape[0] <= high[0]

        def set_device_memory(self, memory: int, size: int) -> None:
            world.calls.append(("scratch", size))
            assert memory

        def set_tensor_address(self, name: str, memory: int) -> bool:
            world.calls.append(("address", name))
            self._at[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            world.calls.append(("execute", stream_handle))
            if world.habits.get("does_not_run"):
                return False
            if world.capturing is not None:
                world.capturing.append(self._answer)
            else:
                self._answer()
            return True

        def _answer(self) -> None:
            (source, _), (target, _) = self._engine._ports.items()
            images = self._memory(source, self._shape).astype(np.float64)
            out = self._memory(target, (self._shape[0], 2))
            out[:, 0], out[:, 1] = images.mean(axis=(1, 2, 3)), images.reshape(len(images), -1)[:, 0]

        def _memory(self, name: str, shape: tuple[int, ...]) -> Any:
            kind, dtype = CTYPES[self._engine._ports[name][0]]
            raw = (kind * int(np.prod(shape))).from_address(self._at[name])
            return np.frombuffer(raw, dtype=dtype).reshape(shape)

        def report_to_profiler(self) -> bool:
            assert not self.enqueue_emits_profile
            for name, ms in LAYERS:
                self.profiler.report_layer_time(name, ms)
            return True

    class EngineInspector:
        execution_context = None

        def get_engine_information(self, format: Any) -> str:  # noqa: A002  # the name it has there
            assert format == trt.LayerInformationFormat.JSON
            return world.habits["inspects"]

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        @property
        def engine_host_code_allowed(self) -> bool | None:
            return world.host_code

        @engine_host_code_allowed.setter
        def engine_host_code_allowed(self, allowed: bool) -> None:
            world.host_code = allowed

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            world.calls.append(("deserialize",))
            if world.habits.get("does_not_open"):
                self._logger.log(severities.ERROR, "Version tag does not match.")
                return None
            return ICudaEngine(serialized_engine)

    class Refitter:
        def __init__(self, engine: ICudaEngine, logger: Any) -> None:
            self._engine = engine

        def refit_cuda_engine(self) -> bool:
            world.calls.append(("refit",))
            return not world.habits.get("weights_missing")

    class OnnxParserRefitter:
        num_errors = 0

        def __init__(self, refitter: Refitter, logger: Any) -> None:
            self._refitter = refitter

        def refit_from_file(self, model: str) -> bool:
            self._refitter._engine._weights = model.rpartition("/")[2]
            return True

        def get_error(self, index: int) -> None:
            raise AssertionError(index)

    for cls in (
        *(ILogger, IProgressMonitor, IProfiler, ITensor, INetworkDefinition, OnnxParser, IOptimizationProfile),
        *(ITimingCache, IBuilderConfig, Builder, ICudaEngine, IExecutionContext, EngineInspector, Runtime),
        *(Refitter, OnnxParserRefitter),
    ):
        setattr(trt, cls.__name__, cls)
    return trt


class _Stream:
    cuda_stream = 7

    def synchronize(self) -> None:
        pass


class _Timer:
    def record(self) -> None:
        pass

    def elapsed_time(self, end: "_Timer") -> float:
        assert end is not self
        return 1.5


def pretend_gpu(patch: pytest.MonkeyPatch, world: World) -> None:
    """Let the processor's memory stand for a GPU's."""

    class Graph:
        def __init__(self) -> None:
            self.work: list[Callable[[], object]] = []

        def replay(self) -> None:
            world.calls.append(("replay",))
            for each in self.work:
                each()

    @contextmanager
    def capture(graph: Graph, stream: _Stream) -> Iterator[None]:
        assert stream.cuda_stream == _Stream.cuda_stream
        world.capturing = graph.work
        try:
            yield
        finally:
            world.capturing = None

    @contextmanager
    def on(_stream: _Stream) -> Iterator[None]:
        yield

    for name, value in {"is_available": lambda: True, "CUDAGraph": Graph, "graph": capture, "stream": on}.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch.cuda, "current_stream", _Stream)
    patch.setattr(cuda, "DEVICE", "cpu")
    patch.setattr(cuda, "demand", lambda _name: None)
    patch.setattr(cuda, "facts", lambda: dict(GPU))
    patch.setattr(cuda, "stream", _Stream)
    patch.setattr(cuda, "timer", _Timer)
