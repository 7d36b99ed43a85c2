"""The runtime that the documentation adds, one file and one line, goes through the chain like any other."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from replk_deploy import backends, pipeline
from replk_deploy.backends.base import Backend
from replk_deploy.batch import Batch
from replk_deploy.errors import ContractError, MismatchError, ReplkError
from replk_deploy.models.replknet import RepLKGeometry
from tests import networks

pytestmark = pytest.mark.usefixtures("short_timing")
PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
TINY = RepLKGeometry(
    channels=(4, 6), depths=(1, 1), kernels=(7, 5), small=3, dw_channels=(4, 6), ffn_channels=(8, 12), classes=10
)
NAME, HOME, CLASS = "onnx-reference", "reference", "Reference"


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Backend]:
    """Put the page's file and line where it says they go."""
    (code,) = re.findall(r"^```python backend\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    ((key, path),) = re.findall(r'^ +"([\w-]+)": "([\w.:]+)",$', PAGE, re.MULTILINE)
    assert (key, path) == (NAME, f"replk_deploy.backends.{HOME}:{CLASS}")
    file = tmp_path / f"{HOME}.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"replk_deploy.backends.{HOME}", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(backends.BACKENDS, key, path)
    return backends.find(key)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    ckpt = networks.save_as_trained(networks.trained(TINY), tmp_path / "ckpt.pth", input_size=32)
    root = tmp_path / "replk-out"
    pipeline.fuse(ckpt, root=root)
    return pipeline.export(root=root, batch=Batch(min=1, opt=1, max=2), size=(32, 32)).file.parent


def test_it_is_judged_and_timed_beside_the_others(added: type[Backend], run: Path) -> None:
    assert added.name == NAME
    timed = pipeline.bench(run, backends=("torch", NAME), max_seconds=0.1)
    assert [row.backend for row in timed.bench.rows] == ["torch", NAME]
    assert all(agreement.passed for agreement in timed.agreements.values())
    assert timed.bench.rows[1].facts["onnx"]


def test_it_keeps_the_contract(added: type[Backend], run: Path) -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    with added(run / "model.fp32.onnx") as backend:
        first = backend.run(images)["logits"]
        np.testing.assert_allclose(backend.run(images[1:])["logits"], first[1:], rtol=1e-4, atol=1e-5)
        with pytest.raises(ReplkError, match="takes float32 images"):
            backend.run(images.astype(np.float64))
    with pytest.raises(ContractError):
        backend.run(images)


def test_it_is_stopped_when_it_answers_wrongly(
    added: type[Backend], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = added._run
    monkeypatch.setattr(added, "_run", lambda self, x: {k: v[:, ::-1] for k, v in honest(self, x).items()})
    with pytest.raises(MismatchError, match=f"{NAME} answers wrongly"):
        pipeline.bench(run, backends=(NAME,), max_seconds=0.1)
