"""What the documentation adds, one file and one line, goes through the chain like any other of its kind."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from replk_deploy import backends, lower, pipeline
from replk_deploy.backends.base import Backend
from replk_deploy.batch import Batch
from replk_deploy.errors import ContractError, MismatchError, ReplkError
from replk_deploy.lowerings import LOWERINGS, base, grouped
from replk_deploy.lowerings.base import Lowering
from replk_deploy.lowerings.check import check_sites
from replk_deploy.models.replknet import RepLKGeometry
from tests import networks, test_lowerings

pytestmark = pytest.mark.usefixtures("short_timing")
PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
TINY = RepLKGeometry(
    channels=(4, 6), depths=(1, 1), kernels=(7, 5), small=3, dw_channels=(4, 6), ffn_channels=(8, 12), classes=10
)
NAME, HOME, CLASS = "onnx-reference", "reference", "Reference"


def loaded(kind: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put a file of the page where it says it goes."""
    (code,) = re.findall(rf"^```python {kind}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    file = folder / f"{name.rpartition('.')[2]}.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Backend]:
    """Add the page's runtime."""
    ((key, path),) = re.findall(r'^ +"([\w-]+)": "([\w.:]+)",$', PAGE, re.MULTILINE)
    assert (key, path) == (NAME, f"replk_deploy.backends.{HOME}:{CLASS}")
    loaded("backend", f"replk_deploy.backends.{HOME}", tmp_path, monkeypatch)
    monkeypatch.setitem(backends.BACKENDS, key, path)
    return backends.find(key)


@pytest.fixture
def columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Lowering]:
    """Add the page's lowering."""
    ((key, name),) = re.findall(r"^ +(\w+)\.name: (\w+),$", PAGE, re.MULTILINE)
    assert key == name
    module = loaded("lowering", "replk_deploy.lowerings.columns", tmp_path, monkeypatch)
    found: type[Lowering] = getattr(module, name)
    monkeypatch.setitem(LOWERINGS, found.name, found)
    return found


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


@pytest.mark.parametrize("site", test_lowerings.EXAMPLES, ids=str)
def test_a_lowering_keeps_the_contract(columns: type[Lowering], site: base.LargeConv) -> None:
    test_lowerings.test_a_module_computes_it_on_odd_maps(columns, site)
    test_lowerings.test_nodes_compute_it_on_odd_maps(columns, site)
    test_lowerings.test_it_executes_what_it_says(columns, site)
    for dtype in (np.float16, np.float32, np.float64):
        test_lowerings.test_weights_are_only_moved(columns, dtype, site)


def test_a_lowering_takes_any_layout_and_batch(columns: type[Lowering]) -> None:
    test_lowerings.test_strided_input_is_read_right(columns)
    test_lowerings.test_a_module_exports_with_any_batch(columns)
    test_lowerings.test_another_map_is_refused(columns)


def test_a_lowering_rewrites_a_file_and_is_judged(
    columns: type[Lowering], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = run / "model.fp32.onnx", run / "lowered.onnx"
    for placing in (base.centre, *test_lowerings.BUGS.values()):
        monkeypatch.setattr(grouped, "centre", placing)
        lowered = lower.lower_graph(before, after, lambda _: columns.name)
        assert {site.choice for site in lowered.sites} == {"columns"}
        errors = check_sites(before, after)
        assert len(errors) == len(lowered.sites) > 0
        for error in errors.values():
            assert (error < test_lowerings.EXACT) == (placing is base.centre)
