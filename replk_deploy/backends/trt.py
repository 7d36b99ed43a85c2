"""TensorRT and TensorRT-RTX: one body for `tensorrt` 10 and 11 and for `tensorrt_rtx`.

Types are decided in the ONNX file: networks are strongly typed, and TF32 is the one permission left. In
these runtimes a failure is a None, a False or a line in a log, and a property that refuses a value
keeps the old one. So every answer is looked at, and every setting is read back.
"""

import abc
import hashlib
import platform
import re
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from replk_deploy import files, graph, optional
from replk_deploy.backends import base, cuda, sidecar
from replk_deploy.backends.base import DEFAULT, Array, Arrays, Engine, Made, Recipe, Settings, TensorSpec
from replk_deploy.backends.trt_library import Library, in_a_thread, new_monitor, new_profiler, the_logger
from replk_deploy.backends.trt_run import Bound, described, joined, nearest
from replk_deploy.batch import Batch
from replk_deploy.errors import ContractError, IntegrityError, ReplkError, UnavailableError, first_line
from replk_deploy.precision import PRECISIONS, Precision
from replk_deploy.progress import Progress

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "UINT8": "uint8"}
FLOATING = {"FLOAT", "HALF", "BF16"}
RANK = 4
MIB = 2**20


class _TensorRT(Engine):
    """What the two runtimes share, which is nearly all."""

    takes: ClassVar[Literal["weights", "onnx"]] = "onnx"
    precisions: ClassVar[frozenset[Precision]] = frozenset(PRECISIONS)
    honours: ClassVar[frozenset[str]] = frozenset({"device", "cuda_graph"})
    suffix: ClassVar[str] = ".plan"
    module: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def _load(cls) -> ModuleType:
        """Import the runtime; UnavailableError with the install line when it is not there."""

    @classmethod
    @abc.abstractmethod
    def _machine(cls, lib: Library) -> dict[str, str]:
        """Describe what a plan is built with here; UnavailableError when none can be."""

    @classmethod
    @abc.abstractmethod
    def _made_with(cls, machine: Mapping[str, str], recipe: Recipe) -> dict[str, str]:
        """Keep what must be the same to open the plan."""

    @classmethod
    @abc.abstractmethod
    def _set(cls, lib: Library, config: Any, recipe: Recipe, machine: Mapping[str, str]) -> dict[str, str]:
        """Set what only this runtime knows; return what is in force."""

    @classmethod
    @abc.abstractmethod
    def _keep(cls, config: Any, recipe: Recipe, machine: Mapping[str, str]) -> dict[str, str]:
        """Keep for the next build what this one has learnt; return facts about it."""

    @classmethod
    @abc.abstractmethod
    def _unfit(cls, lib: Library, plan: memoryview, machine: Mapping[str, str]) -> ReplkError | None:
        """Ask why a plan of this version cannot open here; None when nothing speaks against it."""

    @abc.abstractmethod
    def _context(self, lib: Library, engine: Any) -> Any:
        """Return a context that brings no scratch memory."""

    @classmethod
    @final
    def probe(cls) -> Mapping[str, str]:
        """Return versions, GPU and driver.

        Raises:
            UnavailableError: the package is not installed or does not load, or there is no GPU.
        """
        lib = cls._library()
        here = cls._here(lib)
        lib.ask("does not start", partial(lib.trt.Runtime, lib.log))
        return here

    @classmethod
    @final
    def build(cls, source: Path, out: Path, recipe: Recipe, progress: Progress) -> Made:
        """Write a plan for an ONNX file; Ctrl-C cancels between two steps of the runtime and leaves nothing behind.

        Raises:
            UnavailableError: the runtime is missing or cannot build this; the node that stops it is named.
            ReplkError: the source or the recipe cannot be taken.
        """
        lib = cls._library()
        machine = cls._machine(lib)
        header = graph.header(source)
        range_ = Batch.parse(header.batch) if header and header.batch else None
        tf32 = header is not None and header.precision == "tf32"

        def work(cancelled: threading.Event) -> _Built:
            monitor = new_monitor(lib.trt, f"build {cls.name}", progress, cancelled)
            try:
                return cls._built(lib, source, recipe, machine, monitor, range_, tf32=tf32)
            except UnavailableError:
                if monitor.failure is not None:  # the listener's own error cancelled the build
                    raise monitor.failure from None
                raise

        built = in_a_thread(work)
        _write(out, built.plan)
        unfit = cls._unfit(lib, memoryview(built.plan), machine)
        return Made(
            input=built.input,
            outputs=built.outputs,
            batches=built.batches,
            made_with=cls._made_with(machine, recipe),
            facts=machine | built.facts,
            absent=unfit.problem if unfit else "",
        )

    @classmethod
    def _built(
        cls,
        lib: Library,
        source: Path,
        recipe: Recipe,
        machine: Mapping[str, str],
        monitor: Any,
        range_: Batch | None,
        *,
        tf32: bool,
    ) -> "_Built":
        trt = lib.trt
        builder = lib.ask("cannot build here", partial(trt.Builder, lib.log))
        strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = lib.ask("makes no network", partial(builder.create_network, strongly_typed))
        parser = trt.OnnxParser(network, lib.log)
        if not parser.parse_from_file(str(source)) or not network.num_outputs:
            raise lib.refusal(source, parser)
        spec, outputs = _ports(network, source)
        batches = _batches(source, spec, recipe.batches, range_)
        config = lib.ask("gives no configuration", builder.create_builder_config)
        config.progress_monitor = monitor
        facts = cls._common(lib, config, recipe, tf32=tf32) | cls._set(lib, config, recipe, machine)
        for batch in batches if spec.shape[0] is None else ():
            profile = builder.create_optimization_profile()
            profile.set_shape(spec.name, *((n, *spec.shape[1:]) for n in (batch.min, batch.opt, batch.max)))
            lib.ask(f"takes no profile {batch}", partial(config.add_optimization_profile, profile))
        plan = lib.ask(
            f"builds nothing from {source}",
            partial(builder.build_serialized_network, network, config),
            "if it names a node, another backend may take it: torch, ort-cpu; else change what it names",
        )
        return _Built(plan, spec, outputs, batches, facts | cls._keep(config, recipe, machine))

    @classmethod
    def _common(cls, lib: Library, config: Any, recipe: Recipe, *, tf32: bool) -> dict[str, str]:
        trt = lib.trt
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if recipe.level is not None:
            config.builder_optimization_level = recipe.level
            lib.kept("optimisation level", recipe.level, config.builder_optimization_level)
        if recipe.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_mib * MIB)
            bytes_ = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
            lib.kept("workspace of MiB", recipe.workspace_mib, bytes_ / MIB)
        lib.switch(config, trt.BuilderFlag.TF32, on=tf32)
        lib.switch(config, trt.BuilderFlag.REFIT, on=recipe.refittable)
        return {"tf32": _word(on=tf32), "level": str(config.builder_optimization_level)}

    @classmethod
    @final
    def refit(cls, engine: Path, source: Path, out: Path, progress: Progress) -> Made:
        """Write a plan like `engine` with the weights of `source`, a file of the same graph.

        Not executed on hardware yet.

        Raises:
            ReplkError: the plan was not built to be refitted, or the file is of another precision or graph.
            UnavailableError: there is no GPU, or the runtime refuses.
        """
        said = sidecar.read(engine)
        header = graph.header(source)
        if header is not None and header.precision != said.precision:
            raise ReplkError(f"{source} is {header.precision}, {engine} is {said.precision}", cls._again(source.name))
        lib = cls._library()
        step = f"refit {cls.name}"
        progress(step, 0, 1)

        def work(_cancelled: threading.Event) -> Any:
            opened = cls._opened(lib, engine, said)
            if not opened.refittable:
                raise ReplkError(f"{engine} was not built to be refitted", f"{cls._again(source.name)} --refittable")
            refitter = lib.ask(f"cannot refit {engine}", partial(lib.trt.Refitter, opened, lib.log))
            reader = lib.trt.OnnxParserRefitter(refitter, lib.log)
            if not reader.refit_from_file(str(source)):
                raise lib.refusal(source, reader)
            lib.ask(f"cannot refit {engine} from {source}", refitter.refit_cuda_engine)
            return lib.ask(f"does not give {engine} back", opened.serialize)

        _write(out, in_a_thread(work))
        progress(step, 1, 1)
        return Made(
            said.input, said.outputs, said.batches, said.made_with, {**said.facts, "refitted_from": said.sha256}
        )

    def __init__(self, artefact: Path, settings: Settings = DEFAULT) -> None:
        """Open a plan on the GPU at hand, once its sidecar has been read and fits. Not executed on hardware yet.

        Raises:
            ReplkError: there is no such file.
            IntegrityError: no sidecar, one of another file, or the plan was built with what is not here.
            UnavailableError: no GPU, or the runtime refuses the plan.
        """
        said = sidecar.read(artefact)
        if settings.device == "cpu":
            raise UnavailableError(f"{self.name} does not run on a CPU", "leave --device out, or use the backend torch")
        self._lib = lib = self._library()
        engine = self._opened(lib, artefact, said)
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if names != {said.input.name, *said.outputs}:
            raise IntegrityError(
                f"{artefact} holds {', '.join(sorted(names))}, not what its sidecar says", self._again(said.source)
            )
        self.input, self.outputs, self.batches, self.precision = said.input, said.outputs, said.batches, said.precision
        self.device = "cuda"
        self.facts = {**said.facts, **self._here(lib), "cuda_graph": _word(on=settings.cuda_graph)}
        self._graph = settings.cuda_graph
        self._engine: Any = engine
        self._bytes = artefact.stat().st_size
        self._stream = cuda.stream()
        size = engine.device_memory_size_v2
        self._scratch: Tensor | None = lib.ask(
            f"needs {size / MIB:.0f} MiB of scratch memory",
            partial(torch.empty, size, dtype=torch.uint8, device=cuda.DEVICE),
        )
        self._asked: dict[int, tuple[Bound, cuda.CudaLaunch]] = {}

    def _run(self, images: Array) -> Arrays:
        n = len(images)
        if n not in self._asked:
            self._asked[n] = self._ready(images, graph=self._graph)
        bound, launch = self._asked[n]
        bound.load(images)
        launch.enqueue()
        launch.wait()
        return dict(zip(launch.answer, launch.answers(), strict=True))

    def prepare(self, images: Array) -> base.Launch:
        """Copy a batch to the GPU, choose its profile and, where asked for, capture a CUDA graph."""
        self._alive()
        self.check(images)
        return self._ready(images, graph=self._graph)[1]

    @property
    def memory_mib(self) -> Mapping[str, float]:
        """Return the sizes of the plan, which holds the weights, and of the scratch memory, profile by profile."""
        engine = self._alive()
        sizes = {"plan": self._bytes, "workspace": engine.device_memory_size_v2}
        for index, batch in enumerate(self.batches if len(self.batches) > 1 else ()):
            sizes[f"workspace {batch}"] = engine.get_device_memory_size_for_profile_v2(index)
        return {name: size / MIB for name, size in sizes.items()}

    def layer_times(self, images: Array, *, repeats: int) -> tuple[base.LayerTime, ...]:
        """Time each layer with the runtime's own profiler, outside any CUDA graph.

        Raises:
            UnavailableError: the runtime has made one layer of the whole network.
        """
        engine = self._alive()
        self.check(images)
        bound, launch = self._ready(images, graph=False)
        runs = bound.profiled(launch, new_profiler(self._lib.trt), repeats)
        inspector = engine.create_engine_inspector()
        inspector.execution_context = bound.context
        text = inspector.get_engine_information(self._lib.trt.LayerInformationFormat.JSON)
        layers = joined(runs, described(text))
        if len(layers) == 1 and "ForeignNode" in layers[0].name:
            raise UnavailableError(
                f"{self.name} has made one layer of the whole network: {layers[0].name}",
                "profile another backend: trt, torch, ort-cpu",
            )
        return layers

    def close(self) -> None:
        """Drop contexts, engine and scratch memory; safe to call twice."""
        self._asked = {}
        self._engine = self._scratch = None

    def _alive(self) -> Any:
        if self._engine is None:
            raise ContractError(f"{self.name} was asked after it was closed")
        return self._engine

    def _ready(self, images: Array, *, graph: bool) -> tuple[Bound, cuda.CudaLaunch]:
        """Bind a context of its own to a batch; contexts share scratch memory, so all run on one stream."""
        engine, n = self._alive(), len(images)
        tensors = {}
        for name in (self.input.name, *self.outputs):
            dtype = engine.get_tensor_dtype(name)
            shape = (n, *tuple(engine.get_tensor_shape(name))[1:])
            with cuda.translated("hold images and answers"):
                tensors[name] = torch.empty(shape, dtype=getattr(torch, DTYPES[dtype.name]), device=cuda.DEVICE)
        context = self._lib.ask("gives no context", partial(self._context, self._lib, engine))
        bound = Bound(context, tensors, self._stream.cuda_stream, self._lib.ask)
        bound.bind(nearest(self.batches, n), self._scratch)
        bound.load(images)
        return bound, cuda.CudaLaunch(bound.run, graph=graph, on=self._stream)

    @classmethod
    def _opened(cls, lib: Library, artefact: Path, said: sidecar.Sidecar) -> Any:
        """Give a plan to the runtime once its sidecar fits this machine."""
        here = cls._here(lib)
        sidecar.demand(artefact, said, cls.name, here)
        plan = artefact.read_bytes()
        unfit = cls._unfit(lib, memoryview(plan), here)
        if unfit is not None:
            raise unfit
        runtime = lib.ask("does not start", partial(lib.trt.Runtime, lib.log))
        # a plan that later versions open brings code for the host; its sidecar has vouched for it
        runtime.engine_host_code_allowed = said.facts.get("version_compatible") == "on"
        return lib.ask(
            f"does not open {artefact}", partial(runtime.deserialize_cuda_engine, plan), cls._again(said.source)
        )

    @classmethod
    def _library(cls) -> Library:
        try:
            trt = cls._load()
        except ImportError as exc:  # the package is there, a library that it needs is not
            raise UnavailableError(
                f"{cls.module} is installed and does not load: {first_line(exc)}",
                f"pip install --force-reinstall --no-cache-dir 'replk-deploy[{cls.name}]'",
            ) from exc
        return Library(trt, the_logger(trt), cls.module)

    @classmethod
    def _here(cls, lib: Library) -> dict[str, str]:
        cuda.demand(cls.name)
        return cls._versions(lib) | _gpu()

    @classmethod
    def _versions(cls, lib: Library) -> dict[str, str]:
        return {cls.module: lib.trt.__version__, "platform": f"{platform.system()} {platform.machine()}"}

    @classmethod
    def _again(cls, source: str) -> str:
        return f"build it here: replk build {source} --backend {cls.name}"


@final
class TensorRT(_TensorRT):
    """A plan of TensorRT 10 or 11, built on the GPU that opens it."""

    name: ClassVar[str] = "trt"
    module: ClassVar[str] = "tensorrt"
    ingredients: ClassVar[frozenset[str]] = frozenset(
        {"batches", "level", "workspace_mib", "timing_cache", "hardware", "version_compatible", "refittable"}
    )

    @classmethod
    def _load(cls) -> ModuleType:
        return optional.load("tensorrt", package="tensorrt", install="replk-deploy[trt]")

    @classmethod
    def _machine(cls, lib: Library) -> dict[str, str]:
        return cls._here(lib)

    @classmethod
    def _made_with(cls, machine: Mapping[str, str], recipe: Recipe) -> dict[str, str]:
        needed = {
            "platform": True,
            cls.module: not recipe.version_compatible,
            "compute_capability": recipe.hardware != "ampere-plus",
            "gpu": recipe.hardware == "none",
        }
        return {key: machine[key] for key, equal in needed.items() if equal}

    @classmethod
    def _set(cls, lib: Library, config: Any, recipe: Recipe, machine: Mapping[str, str]) -> dict[str, str]:
        trt = lib.trt
        level = {
            "none": trt.HardwareCompatibilityLevel.NONE,
            "ampere-plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
            "same-compute-capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        }[recipe.hardware]
        config.hardware_compatibility_level = level
        lib.kept("hardware compatibility level", int(level), int(config.hardware_compatibility_level))
        lib.switch(config, trt.BuilderFlag.VERSION_COMPATIBLE, on=recipe.version_compatible)
        facts = {"hardware": recipe.hardware, "version_compatible": _word(on=recipe.version_compatible)}
        if recipe.timing_cache is None:
            return facts
        path = cls._cache(recipe.timing_cache, machine)
        blob, remedy = path.read_bytes() if path.is_file() else b"", f"delete it: rm '{path}'"
        cache = lib.ask(f"cannot read {path}", partial(config.create_timing_cache, blob), remedy)
        lib.ask(f"cannot use {path}", partial(config.set_timing_cache, cache, ignore_mismatch=False), remedy)
        return facts | {"timing_cache": path.name, "timing_cache_before": _sha256(blob) if blob else "none"}

    @classmethod
    def _keep(cls, config: Any, recipe: Recipe, machine: Mapping[str, str]) -> dict[str, str]:
        if recipe.timing_cache is None:
            return {}
        cache = config.get_timing_cache()
        blob = bytes(cache.serialize())
        _write(cls._cache(recipe.timing_cache, machine), blob)
        return {"timing_cache_after": _sha256(blob)}

    @classmethod
    def _cache(cls, folder: Path, machine: Mapping[str, str]) -> Path:
        """Name the cache of this version, GPU and driver; times of another would be wrong here."""
        key = "-".join(machine[part] for part in (cls.module, "gpu", "driver"))
        return folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', key)}.timing"

    @classmethod
    def _unfit(cls, lib: Library, plan: memoryview, machine: Mapping[str, str]) -> None:
        """Return None: without opening the plan, no more can be asked than the sidecar has told."""

    def _context(self, lib: Library, engine: Any) -> Any:
        return engine.create_execution_context(lib.trt.ExecutionContextAllocationStrategy.USER_MANAGED)


@final
class TensorRTRTX(_TensorRT):
    """A plan of TensorRT-RTX: built anywhere for the GPUs that it names, compiled where it is opened."""

    name: ClassVar[str] = "trt-rtx"
    module: ClassVar[str] = "tensorrt_rtx"
    ingredients: ClassVar[frozenset[str]] = frozenset(
        {"batches", "level", "workspace_mib", "compute_capabilities", "refittable"}
    )

    @classmethod
    def _load(cls) -> ModuleType:
        return optional.load("tensorrt_rtx", package="tensorrt-rtx", install="replk-deploy[trt-rtx]")

    @classmethod
    def _machine(cls, lib: Library) -> dict[str, str]:
        return cls._versions(lib) | (_gpu() if torch.cuda.is_available() else {})

    @classmethod
    def _made_with(cls, machine: Mapping[str, str], recipe: Recipe) -> dict[str, str]:
        del recipe  # its plans open on the version that built them, and say themselves for which GPUs they are
        return {key: machine[key] for key in ("platform", cls.module)}

    @classmethod
    def _set(cls, lib: Library, config: Any, recipe: Recipe, machine: Mapping[str, str]) -> dict[str, str]:
        del machine
        known = cls._targets(lib)
        asked = list(dict.fromkeys(recipe.compute_capabilities))
        choose = f"choose from {', '.join(known)}; for others: --backend trt"
        unknown = [target for target in asked if target not in known]
        if unknown:
            raise UnavailableError(f"{lib.name} does not build for compute capability {', '.join(unknown)}", choose)
        if asked:
            config.num_compute_capabilities = len(asked)
            lib.kept("number of targets", len(asked), config.num_compute_capabilities)
        for index, target in enumerate(asked):
            lib.ask(
                f"does not build for compute capability {target}",
                partial(config.set_compute_capability, known[target], index),
                choose,
            )
        return {"compute_capabilities": ", ".join(asked) or "default"}

    @classmethod
    def _keep(cls, config: Any, recipe: Recipe, machine: Mapping[str, str]) -> dict[str, str]:
        del config, recipe, machine  # it times nothing while it builds
        return {}

    @classmethod
    def _unfit(cls, lib: Library, plan: memoryview, machine: Mapping[str, str]) -> ReplkError | None:
        here = machine.get("compute_capability")
        if here is None:
            return UnavailableError("no NVIDIA GPU here", "open it on a machine with one")
        runtime = lib.ask("does not start", partial(lib.trt.Runtime, lib.log))
        verdict, why = runtime.get_engine_validity(plan[: runtime.engine_header_size])
        if verdict != lib.trt.EngineValidity.INVALID:
            return None
        bits = lib.trt.EngineInvalidityDiagnostics.__members__.items()
        reasons = [name for name, bit in bits if int(bit) & int(why)]
        known = cls._targets(lib)
        if "UNSUPPORTED_CC" in reasons and here in known:
            return IntegrityError(
                f"the plan is not for compute capability {here}, which this GPU has",
                f"{cls._again('FILE.onnx')} --compute-capability {here}",
            )
        if "UNSUPPORTED_CC" in reasons:
            return UnavailableError(
                f"{lib.name} does not run on compute capability {here}, only on {', '.join(known)}",
                "use the backend trt",
            )
        words = ", ".join(reasons).lower().replace("_", " ") or "it cannot ask the driver"
        return UnavailableError(f"{lib.name} refuses the plan here: {words}", cls._again("FILE.onnx"))

    @classmethod
    def _targets(cls, lib: Library) -> dict[str, Any]:
        members = lib.trt.ComputeCapability.__members__.items()
        return {f"{name[2:-1]}.{name[-1]}": member for name, member in members if name.startswith("SM")}

    def _context(self, lib: Library, engine: Any) -> Any:
        trt = lib.trt
        runtime_config = engine.create_runtime_config()
        # LAZY, the default, answers with a slower kernel until the one for the shape has been compiled
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
        runtime_config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return engine.create_execution_context(runtime_config)


class _Built(NamedTuple):
    """A plan that is not a file yet."""

    plan: Any
    input: TensorSpec
    outputs: tuple[str, ...]
    batches: tuple[Batch, ...]
    facts: dict[str, str]


def _ports(network: Any, source: Path) -> tuple[TensorSpec, tuple[str, ...]]:
    """Return input and outputs; ReplkError unless they are one batch of images and floating answers."""
    inputs = [_port(network.get_input(index)) for index in range(network.num_inputs)]
    outputs = [_port(network.get_output(index)) for index in range(network.num_outputs)]
    name, dtype, shape = inputs[0] if len(inputs) == 1 else ("", "", ())
    if len(shape) != RANK or dtype not in DTYPES or not {kind for _, kind, _ in outputs} <= FLOATING:
        shown = ", ".join(f"{port[0]} {port[1]} {port[2]}" for port in inputs + outputs)
        raise ReplkError(
            f"{source} does not map one batch of images to floating outputs: it has {shown}",
            "name a file that replk export --onnx wrote",
        )
    if None in shape[1:]:
        raise ReplkError(f"{source} leaves more open than the batch: {name} {shape}", "export it for one size")
    return TensorSpec(name=name, dtype=DTYPES[dtype], shape=shape), tuple(port[0] for port in outputs)


def _port(tensor: Any) -> tuple[str, str, tuple[int | None, ...]]:
    dtype = tensor.dtype
    return tensor.name, dtype.name, tuple(None if size < 0 else size for size in tensor.shape)


def _batches(source: Path, spec: TensorSpec, asked: tuple[Batch, ...], said: Batch | None) -> tuple[Batch, ...]:
    """Return one range for each profile; ReplkError where file and recipe disagree, or none says."""
    fixed = spec.shape[0]
    if fixed is not None:
        only = Batch(min=fixed, opt=fixed, max=fixed)
        for batch in asked:
            if batch != only:
                raise ReplkError(
                    f"{source} takes {fixed} images at a time and cannot be built for {batch}",
                    f"export it for that: replk export --onnx --batch {batch}",
                )
        return (only,)
    if not asked and said is None:
        raise ReplkError(
            f"{source} leaves the batch open and does not say its range", "give one: replk build --batch MIN:OPT:MAX"
        )
    return asked or ((said,) if said else ())


def _write(path: Path, content: Any) -> None:
    with files.staged(path) as part:
        part.write_bytes(content)
        files.commit(part, path)


def _gpu() -> dict[str, str]:
    return cuda.facts() | {"driver": _driver()}


def _driver() -> str:
    told = Path("/sys/module/nvidia/version")
    if told.is_file():
        return told.read_text(encoding="utf-8").strip()
    return f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]  # in CUDA builds only


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _word(*, on: bool) -> str:
    return "on" if on else "off"
