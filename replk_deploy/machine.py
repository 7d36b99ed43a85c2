"""What a latency depends on besides the network: the machine and its settings.

Nothing here names a host, a user or a path, so a record may be shown to anybody.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil

from replk_deploy import __version__, clocks

Fact = str | int | float | bool | None
PACKAGES = (
    *("torch", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy"),
    *("openvino", "tensorrt", "tensorrt-rtx", "cuda-core"),
)
VARIABLES = ("OMP_NUM_THREADS", "NVIDIA_TF32_OVERRIDE", "CUDA_VISIBLE_DEVICES", "MKL_", "OPENBLAS_", "KMP_")
CONTAINERS = ("kubepods", "docker", "lxc", "podman")
MIB = 2**20


def environment() -> dict[str, Fact]:
    """Describe machine, settings and versions; None where something cannot be known."""
    facts: dict[str, Fact] = {
        "cpu": cpu(),
        "cores_physical": psutil.cpu_count(logical=False),
        "threads_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_quota": _quota(),
        "governor": _line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "memory_mib": psutil.virtual_memory().total // MIB,
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "container": _container(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "replk": __version__,
        "git": _git(),
        "torch_threads": None,
        "torch_cuda": None,
        "cudnn": None,
    }
    facts |= {package: version(package) for package in PACKAGES}
    if "torch" in sys.modules:  # importing it here would take seconds and change what is being measured
        torch = sys.modules["torch"]
        facts |= {"torch_threads": torch.get_num_threads(), "torch_cuda": torch.version.cuda}
        facts["cudnn"] = torch.backends.cudnn.version() if torch.version.cuda else None
    return facts | clocks.facts(gpu_in_use()) | dict(_variables())


def cache() -> Path:
    """Return the user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def step_summary() -> Path | None:
    """Return the file that GitHub Actions shows as the summary of a step; None elsewhere."""
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    return Path(name) if name else None


def workspace() -> Path:
    """Return the folder from which GitHub Actions names files; the current one elsewhere."""
    return Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd())


def gpu_in_use() -> str | None:
    """Name a GPU as `clocks` takes it: the one that PyTorch uses, by its UUID; until it uses one, CUDA_VISIBLE_DEVICES.

    CUDA and NVML may count GPUs in different orders, so a number says little. A slice of a GPU has one name only.
    """
    torch, visible = sys.modules.get("torch"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch and torch.cuda.is_initialized() and not (visible or "").startswith("MIG-"):
        return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    return visible


def versions(*distributions: str) -> dict[str, str | None]:
    """Return the version of replk and those of distributions."""
    return {"replk": __version__} | {name: version(name) for name in distributions}


def version(distribution: str) -> str | None:
    """Return the installed version of a distribution without importing it; None when it is not there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cpu() -> str | None:
    """Return what the processor calls itself."""
    lines = (_text(Path("/proc/cpuinfo")) or "").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or None)


def _quota() -> float | None:
    """Give the share of processors that the control group may use, 1.0 a processor; None when unlimited."""
    quota, _, period = (_line(Path("/sys/fs/cgroup/cpu.max")) or "max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _container() -> str | None:
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    groups = _text(Path("/proc/1/cgroup")) or ""
    return next((name for name in CONTAINERS if name in groups), None)


def _git() -> str | None:
    """Return the commit of our own checkout, with -dirty when files differ; None outside one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)  # noqa: S603  # all words ours
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _variables() -> Iterator[tuple[str, Fact]]:
    for name, value in sorted(os.environ.items()):
        if name.startswith(VARIABLES):
            path, uuid = "/" in value or "\\" in value, "GPU-" in value or "MIG-" in value
            yield f"env.{name}", "(a path)" if path else "(a UUID)" if uuid else value


def _line(path: Path) -> str | None:
    text = _text(path)
    return text.strip() if text else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
