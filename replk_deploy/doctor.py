"""This machine → its devices, every runtime as ready, missing or broken, and what is known to go wrong here.

Asked when something does not work, so it works where everything else is broken: whatever a runtime
throws is written down in its own words.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from replk_deploy import backends, machine
from replk_deploy.errors import UnavailableError, first_line
from replk_deploy.machine import Fact
from replk_deploy.progress import Progress, silent

Facts = Mapping[str, Fact]
Version = tuple[int, ...]

PACKAGES = (
    *("torch", "torchvision", "timm", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("tensorrt", "tensorrt-rtx", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "cuda-core", "nvidia-ml-py"),
    *("numpy", "scipy", "safetensors", "pillow"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One backend: `missing` lacks a package, a device or a tool and says so, `broken` fails in any other way.

    Attributes:
        facts: versions and device, when it is ready.
        why: what is wrong, empty when nothing is.
        fix: the command to paste.
    """

    name: str
    state: Literal["ready", "missing", "broken"]
    facts: Mapping[str, str]
    why: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """A combination that is known to go wrong, and what to do."""

    name: str
    problem: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Doctor:
    """What is here.

    Attributes:
        environment: processor, GPU, driver, CUDA, settings.
        packages: versions; None where one is not installed.
        backends: in the order of the registry, those without an adapter last.
    """

    KIND: ClassVar[str] = "doctor"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ("ready", "sentence")

    environment: Facts
    packages: Mapping[str, str | None]
    backends: tuple[Runtime, ...]
    troubles: tuple[Trouble, ...]

    @property
    def ready(self) -> tuple[str, ...]:
        """Name the backends that can run here."""
        return tuple(runtime.name for runtime in self.backends if runtime.state == "ready")

    @property
    def sentence(self) -> str:
        """Say in words what can run, and how much speaks against it."""
        broken = sum(runtime.state == "broken" for runtime in self.backends)
        counts = {"ready": len(self.ready), "broken": broken, "known trouble": len(self.troubles)}
        said = [f"{count} {word}" for word, count in counts.items() if count or word == "ready"]
        return f"{' · '.join(said)}, of {len(self.backends)} backends: {', '.join(self.ready) or 'none'}"


class Known(NamedTuple):
    """A combination: when it holds, the sentence, filled from the facts, and the remedy."""

    name: str
    holds: Callable[[Facts], bool]
    problem: str
    fix: str


def doctor(*, progress: Progress = silent) -> Doctor:
    """Look at the machine and ask every backend whether it can run; raises nothing."""
    runtimes = []
    for done, name in enumerate(backends.BACKENDS, start=1):
        runtimes.append(_ask(name))
        progress("doctor", done, len(backends.BACKENDS))
    environment, packages = _environment(), {name: machine.version(name) for name in PACKAGES}
    facts = {**packages, **environment}
    return Doctor(
        environment=environment,
        packages=packages,
        backends=tuple(runtimes),
        troubles=tuple(
            Trouble(name=known.name, problem=known.problem.format(facts), fix=known.fix)
            for known in KNOWN
            if known.holds(facts)
        ),
    )


def _ask(name: str) -> Runtime:
    try:
        return Runtime(name=name, state="ready", facts=dict(backends.find(name).probe()))
    except UnavailableError as exc:
        return Runtime(name=name, state="missing", facts={}, why=exc.problem, fix=exc.remedy)
    except Exception as exc:  # noqa: BLE001  # a broken installation can fail in any way
        again = f"from replk_deploy import backends; backends.find({name!r}).probe()"
        why = f"{type(exc).__name__}: {first_line(exc)}"
        return Runtime(name=name, state="broken", facts={}, why=why, fix=f'see where: python -c "{again}"')


def _environment() -> dict[str, Fact]:
    try:
        return machine.environment()
    except Exception as exc:  # noqa: BLE001  # it asks libraries that may be broken
        return {"unknown": f"{type(exc).__name__}: {first_line(exc)}"}


def _version(fact: Fact) -> Version:
    """Read a version, however it is written; empty when there is none, which is below every other."""
    if isinstance(fact, int):  # cuDNN's own: 92401 is 9.24.1; those before 9 had one digit less, and come out as 0
        return (fact // 10_000, fact // 100 % 100, fact % 100)
    return tuple(map(int, re.findall(r"\d+", str(fact or "").partition("+")[0])))


def _between(low: Version, facts: Facts, name: str, high: Version) -> bool:
    """Tell whether something is there in a version from `low` on and below `high`; what is absent is below 0."""
    return low <= _version(facts.get(name)) < high


def _number(facts: Facts, name: str) -> float:
    """Return a number from the facts, also one written as text; 0 when it is none."""
    try:
        return float(str(facts.get(name)))
    except ValueError:
        return 0.0


def _cudnn(facts: Facts) -> bool:
    known = next((n for n in ("cudnn", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12") if facts.get(n)), "cudnn")
    return _between((0,), facts, known, (9, 24))


def _refused_by_rtx(facts: Facts) -> bool:
    gaps: tuple[tuple[Version, Version], ...] = (((8, 7), (8, 9)), ((9,), (12,)))
    return bool(facts.get("tensorrt-rtx")) and any(
        _between(low, facts, "gpu_compute_capability", high) for low, high in gaps
    )


def _cramped(facts: Facts) -> bool:
    quota, threads = _number(facts, "cpu_quota"), _number(facts, "threads_usable")
    return 0 < quota < (_number(facts, "env.OMP_NUM_THREADS") or threads)


ANY: Version = (10**6,)  # above every version
KNOWN = (
    Known(
        "two ONNX Runtimes",
        lambda f: bool(f.get("onnxruntime") and f.get("onnxruntime-gpu")),
        "onnxruntime {0[onnxruntime]} and onnxruntime-gpu {0[onnxruntime-gpu]} are both installed and share one"
        " module: files of one lie over those of the other",
        "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'replk-deploy[gpu]' (or [cpu])",
    ),
    Known(
        "TensorRT too new for ONNX Runtime",
        lambda f: bool(f.get("onnxruntime-gpu")) and _between((11,), f, "tensorrt", ANY),
        "ONNX Runtime's TensorRT provider loads libnvinfer.so.10, and tensorrt {0[tensorrt]} is installed: ort-trt"
        " cannot run",
        "pip install 'tensorrt<11', or give trt and ort-trt an environment each",
    ),
    Known(
        "ONNX Runtime for another CUDA",
        lambda f: _between((1, 24), f, "onnxruntime-gpu", (1, 27)) and _between((13,), f, "torch_cuda", ANY),
        "onnxruntime-gpu {0[onnxruntime-gpu]} is built for CUDA 12, torch brings CUDA {0[torch_cuda]}: the CUDA"
        " provider finds no libraries",
        "pip install 'onnxruntime-gpu>=1.28'",
    ),
    Known(
        "cuDNN before 9.24",
        _cudnn,
        "this cuDNN can compute depthwise convolutions wrongly when map sizes alternate, as they do in every stage of"
        " a RepLKNet: an answer of torch with channels last or of ort-cuda needs its verification",
        "never time those with --allow-unverified; pip install 'torch>=2.14' brings cuDNN 9.24",
    ),
    Known(
        "torch before 2.9",
        lambda f: _between((0,), f, "torch", (2, 9)),
        "torch {0[torch]} exports through another exporter than the one that is proved here",
        "pip install 'torch>=2.9'",
    ),
    Known(
        "torch without CUDA",
        lambda f: bool(f.get("gpu") and f.get("torch_threads")) and not f.get("torch_cuda"),
        "torch {0[torch]} is built without CUDA, and there is a {0[gpu]}",
        "pip install --force-reinstall torch, from an index that has it for CUDA",
    ),
    Known(
        "driver before torch's CUDA",
        lambda f: bool(f.get("torch_cuda")) and _between((0,), f, "gpu_driver_cuda", _version(f["torch_cuda"])[:1]),
        "the driver {0[gpu_driver]} serves CUDA {0[gpu_driver_cuda]}, torch is built for {0[torch_cuda]}",
        "update the driver, or install torch for CUDA of the driver's generation",
    ),
    Known(
        "GPU that TensorRT-RTX does not run on",
        _refused_by_rtx,
        "TensorRT-RTX runs on compute capability 8.0, 8.6, 8.9, 12.0 and newer; this GPU has"
        " {0[gpu_compute_capability]}, and a rebuild does not help",
        "use TensorRT on it: pip install 'replk-deploy[trt]'",
    ),
    Known(
        "GPU that ONNX Runtime has no kernels for",
        lambda f: bool(f.get("onnxruntime-gpu")) and _between((10,), f, "gpu_compute_capability", (12,)),
        "onnxruntime-gpu brings kernels for compute capability 7.5 to 9.0 and 12.0, and no code to compile for"
        " {0[gpu_compute_capability]}",
        "use torch or trt on this GPU",
    ),
    Known(
        "TF32 overruled",
        lambda f: f.get("env.NVIDIA_TF32_OVERRIDE") is not None,
        "NVIDIA_TF32_OVERRIDE is {0[env.NVIDIA_TF32_OVERRIDE]}: it overrules what each runtime is told about TF32, so"
        " fp32 and tf32 are not what they say",
        "unset NVIDIA_TF32_OVERRIDE",
    ),
    Known(
        "more threads than cores",
        lambda f: _number(f, "env.OMP_NUM_THREADS") > _number(f, "threads_usable") > 0,
        "OMP_NUM_THREADS is {0[env.OMP_NUM_THREADS]}, and this process may use {0[threads_usable]}: threads wait for"
        " one another, and latencies jump",
        "unset OMP_NUM_THREADS",
    ),
    Known(
        "fewer processors than cores",
        _cramped,
        "the container may use {0[cpu_quota]} processors and sees {0[threads_usable]}: threads are stopped when the"
        " quota is spent, and latencies jump",
        "set OMP_NUM_THREADS to the quota, or raise it",
    ),
)
