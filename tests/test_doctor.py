"""Whatever is broken here, it is told and not thrown; and each known trouble is seen where it is planted."""

import json
import os
import subprocess
import sys

import pytest

from replk_deploy import backends, doctor, machine, records
from replk_deploy.doctor import KNOWN, Doctor
from replk_deploy.errors import ContractError, UnavailableError

HERE = {"threads_usable": 8, "cpu_quota": None, "gpu": None, "torch": "2.13.0", "torch_threads": 8, "torch_cuda": None}
H100 = {"gpu": "H100", "gpu_compute_capability": "9.0", "gpu_driver": "580.1", "gpu_driver_cuda": "13.0"}
CUDA = {"torch_cuda": "13.0"}
PLANTS: dict[str, tuple[list[dict[str, object]], list[dict[str, object]]]] = {  # name → holds, does not
    "two ONNX Runtimes": (
        [{"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}],
        [{"onnxruntime": "1.32.0"}, {"onnxruntime-gpu": "1.31.1"}],
    ),
    "TensorRT too new for ONNX Runtime": (
        [{"onnxruntime-gpu": "1.31.1", "tensorrt": "11.4.0.106"}],
        [{"onnxruntime-gpu": "1.31.1", "tensorrt": "10.16.1.11"}, {"tensorrt": "11.4.0.106"}],
    ),
    "ONNX Runtime for another CUDA": (
        [{"onnxruntime-gpu": "1.26.0", **CUDA}, {"onnxruntime-gpu": "1.24.4", **CUDA}],
        [{"onnxruntime-gpu": "1.28.0", **CUDA}, {"onnxruntime-gpu": "1.26.0", "torch_cuda": "12.8"}],
    ),
    "cuDNN before 9.24": (
        [{"cudnn": 92000}, {"cudnn": 91900}, {"nvidia-cudnn-cu13": "9.20.0.48"}, {"cudnn": 8907}],
        [{"cudnn": 92400}, {"cudnn": 92600, "nvidia-cudnn-cu13": "9.20.0.48"}, {"nvidia-cudnn-cu12": "9.24.0.1"}],
    ),
    "torch before 2.9": ([{"torch": "2.8.0+cpu"}, {"torch": "1.13.1"}], [{"torch": "2.9.0"}, {"torch": "2.13.0+cpu"}]),
    "torch without CUDA": ([H100], [{**H100, **CUDA}, {**H100, "torch_threads": None}]),
    "driver before torch's CUDA": (
        [{**H100, **CUDA, "gpu_driver_cuda": "12.8"}],
        [{**H100, **CUDA}, {**H100, "torch_cuda": "13.2"}, {**H100, "torch_cuda": "12.8"}],
    ),
    "GPU that TensorRT-RTX does not run on": (
        [{**CUDA, **H100, "tensorrt-rtx": "1.7.1.116", "gpu_compute_capability": c} for c in ("9.0", "10.0", "8.7")],
        [
            *(
                {"tensorrt-rtx": "1.7.1.116", "gpu_compute_capability": c}
                for c in ("8.0", "8.6", "8.9", "12.0", "12.1")
            ),
            {"gpu_compute_capability": "9.0"},
        ],
    ),
    "GPU that ONNX Runtime has no kernels for": (
        [{"onnxruntime-gpu": "1.31.1", "gpu_compute_capability": c} for c in ("10.0", "10.3", "11.0")],
        [{"onnxruntime-gpu": "1.31.1", "gpu_compute_capability": c} for c in ("7.5", "9.0", "12.0")],
    ),
    "TF32 overruled": ([{"env.NVIDIA_TF32_OVERRIDE": "0"}, {"env.NVIDIA_TF32_OVERRIDE": "1"}], [{}]),
    "more threads than cores": (
        [{"env.OMP_NUM_THREADS": "9"}],
        [{"env.OMP_NUM_THREADS": "8"}, {"env.OMP_NUM_THREADS": "4,2"}],
    ),
    "fewer processors than cores": (
        [{"cpu_quota": 2.0}, {"cpu_quota": 2.0, "env.OMP_NUM_THREADS": "3"}],
        [{"cpu_quota": 8.0}, {"cpu_quota": 2.0, "env.OMP_NUM_THREADS": "2"}],
    ),
}


@pytest.fixture(autouse=True)
def _no_real_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", {})


def seen(monkeypatch: pytest.MonkeyPatch, facts: dict[str, object]) -> Doctor:
    monkeypatch.setattr(machine, "environment", lambda: facts)
    monkeypatch.setattr(machine, "version", facts.get)
    return doctor.doctor()


def test_every_known_trouble_is_planted_somewhere() -> None:
    assert [known.name for known in KNOWN] == list(PLANTS)


@pytest.mark.parametrize(
    ("name", "facts"), [(name, facts) for name, (plants, _) in PLANTS.items() for facts in plants], ids=str
)
def test_a_planted_trouble_is_seen_and_said_with_a_remedy(
    name: str, facts: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (trouble,) = [t for t in seen(monkeypatch, HERE | facts).troubles if t.name == name]
    assert trouble.fix
    assert "{" not in trouble.problem


@pytest.mark.parametrize(
    ("name", "facts"), [(name, facts) for name, (_, misses) in PLANTS.items() for facts in misses], ids=str
)
def test_what_only_looks_like_it_is_let_pass(
    name: str, facts: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name not in {t.name for t in seen(monkeypatch, HERE | facts).troubles}


def test_a_sound_machine_has_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = HERE | H100 | CUDA | {"cudnn": 92600, "onnxruntime-gpu": "1.31.1", "tensorrt": "10.16.1.11"}
    assert seen(monkeypatch, HERE).troubles == seen(monkeypatch, sound).troubles == ()


def test_the_sentence_holds_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (trouble,) = seen(monkeypatch, HERE | {"env.OMP_NUM_THREADS": "64"}).troubles
    assert "OMP_NUM_THREADS is 64" in trouble.problem
    assert "may use 8" in trouble.problem
    assert trouble.fix == "unset OMP_NUM_THREADS"


class _Found:
    """A backend whose probe does as it is told."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def probe(self) -> object:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def asked(monkeypatch: pytest.MonkeyPatch, answers: dict[str, object]) -> Doctor:
    monkeypatch.setattr(backends, "BACKENDS", dict.fromkeys(answers, ""))
    monkeypatch.setattr(backends, "find", lambda name: _Found(answers[name]))
    return seen(monkeypatch, dict(HERE))


def test_each_backend_is_ready_missing_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(
        monkeypatch,
        {
            "one": {"version": "1"},
            "two": UnavailableError("two is not installed", "pip install 'replk-deploy[two]'"),
            "three": OSError("libnvinfer.so.10: cannot open shared object file\nmore"),
            "four": ContractError("of our own"),
            "five": RuntimeError(),
        },
    )
    assert [b.state for b in found.backends] == ["ready", "missing", "broken", "broken", "broken"]
    one, two, three, four, five = found.backends
    assert (one.facts, one.why, one.fix) == ({"version": "1"}, "", "")
    assert (two.why, two.fix) == ("two is not installed", "pip install 'replk-deploy[two]'")
    assert three.why == "OSError: libnvinfer.so.10: cannot open shared object file"
    assert "find('three')" in three.fix
    assert (four.why, five.why) == ("ContractError: of our own", "RuntimeError: RuntimeError")
    assert found.ready == ("one",)
    assert found.sentence == "1 ready · 3 broken, of 5 backends: one"


def test_a_machine_that_cannot_be_described_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise AttributeError("module 'torch' has no attribute 'version'")

    monkeypatch.setattr(machine, "environment", broken)
    found = doctor.doctor()
    assert found.environment == {"unknown": "AttributeError: module 'torch' has no attribute 'version'"}
    assert found.sentence == "0 ready, of 0 backends: none"


def test_progress_hears_of_each_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, int, int | None]] = []
    monkeypatch.setattr(backends, "BACKENDS", {"a": "", "b": ""})
    monkeypatch.setattr(backends, "find", lambda _name: _Found({}))
    doctor.doctor(progress=lambda *said: heard.append(said))
    assert heard == [("doctor", 1, 2), ("doctor", 2, 2)]


def test_the_record_holds_rows_and_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads(records.to_json(asked(monkeypatch, {"one": {"version": "1"}})))
    assert (record["schema"], record["ready"]) == ("replk.doctor/1", ["one"])
    assert record["backends"][0]["facts"] == {"version": "1"}
    assert record["troubles"] == []
    assert record["packages"]["torch"] == "2.13.0"


def test_it_works_where_torch_and_every_runtime_cannot_be_imported() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', 'pynvml'):\n"
        "    sys.modules[name] = None\n"
        "from replk_deploy import backends, doctor\n"
        "found = doctor.doctor()\n"
        "names = [b.name for b in found.backends]\n"
        "assert names == [*backends.BACKENDS], names\n"
        "assert all(b.why and b.fix for b in found.backends), found.backends\n"
        "print(found.sentence)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 ready")


def test_here_torch_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(backends, "BACKENDS", {k: v for k, v in backends.BACKENDS.items() if k in {"torch", "ort-cpu"}})
    found = doctor.doctor()
    assert found.ready == ("torch", "ort-cpu")
    assert found.packages["torch"] == found.backends[0].facts["torch"]
    assert found.environment["torch_threads"]
