"""OpenVINO: the precision in force, the words of its refusals, its layers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from replk_deploy import backends, optional
from replk_deploy.backends import openvino
from replk_deploy.backends.openvino import OpenVino
from replk_deploy.errors import ContractError, Exit, ReplkError, UnavailableError
from tests import artefacts
from tests.artefacts import ODD, Files, graph, images


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory)


def test_facts_say_what_is_computed_in_and_on_how_many_threads(files: Files) -> None:
    with files.opened("openvino", "fp32") as found:
        assert found.facts["computes_in"] == "f32"
        assert found.facts["hint"] == "LATENCY"
        assert found.facts["streams"] == "1"
        assert int(found.facts["threads"]) >= 1
        assert found.facts["processor"]


@pytest.mark.parametrize(("precision", "hint"), [("fp32", "f32"), ("tf32", "f32"), ("fp16", "f16")])
def test_the_precision_is_asked_for(files: Files, precision: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ov = openvino._openvino()
    honest = ov.Core.compile_model

    def watched(self: object, model: object, device: str, choices: dict[str, object]) -> object:
        asked.append((device, choices))
        return honest(self, model, device, choices)

    monkeypatch.setattr(ov.Core, "compile_model", watched)
    with files.opened("openvino", precision) as found:
        assert found.precision == precision
        assert artefacts.error(found.run(images(3))) < artefacts.usual_error(precision)
        computes_in = found.facts["computes_in"]
    hints = [choices.pop("INFERENCE_PRECISION_HINT") for _, choices in asked]
    assert hints in ([hint], [hint, "f32"]), "float32 only where the processor would take bf16 for fp16"
    assert computes_in in {hints[-1], "f32"}
    assert all(told == ("CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}) for told in asked)


@pytest.mark.parametrize(("precision", "in_force"), [("fp32", "bf16"), ("fp32", "f16"), ("fp16", "bf16")])
def test_another_precision_in_force_is_refused(
    files: Files, precision: str, in_force: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ov = openvino._openvino()
    honest = ov.CompiledModel.get_property

    def lying(self: object, name: str) -> object:
        return getattr(ov.Type, in_force) if name == "INFERENCE_PRECISION_HINT" else honest(self, name)

    monkeypatch.setattr(ov.CompiledModel, "get_property", lying)
    with pytest.raises(UnavailableError, match=f"computes .* in {in_force}, though told f"):
        files.opened("openvino", precision)


def test_bf16_is_refused_with_what_to_do(files: Files) -> None:
    with pytest.raises(UnavailableError, match=r"bf16.*--precision fp32 \(or fp16\)"):
        files.opened("openvino", "bf16")


def test_a_missing_package_names_its_install_line(monkeypatch: pytest.MonkeyPatch, files: Files) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(name=module)

    path = files.file("onnx", "fp32")
    monkeypatch.setattr(optional, "import_module", missing)
    for ask in (OpenVino.probe, lambda: OpenVino(path)):
        with pytest.raises(UnavailableError, match=r"pip install 'replk-deploy\[openvino\]'"):
            ask()


def test_a_processor_without_a_plugin_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino._openvino().Core, "available_devices", [])
    with pytest.raises(UnavailableError, match="OpenVINO finds no CPU"):
        OpenVino.probe()


@pytest.mark.parametrize("damage", ["garbage", "cut short", "weights"])
def test_a_file_that_is_no_onnx_is_told_in_openvinos_words_and_nothing_is_printed(
    damage: str, files: Files, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.onnx"
    whole = files.file("weights" if damage == "weights" else "onnx", "fp32").read_bytes()
    path.write_bytes({"garbage": b"\x07nonsense" * 99, "cut short": whole[: len(whole) // 2], "weights": whole}[damage])
    with pytest.raises(ReplkError, match=r"OpenVINO cannot open .*: Model can't be parsed") as caught:
        OpenVino(path)
    assert caught.value.code == Exit.USAGE
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("proto", ODD.values(), ids=ODD)
def test_a_graph_that_is_no_image_network_is_refused(proto: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    onnx.save(proto, path)
    with pytest.raises(ReplkError, match="does not map one batch of images"):
        OpenVino(path)


def test_foreign_files_and_pictures_of_bytes_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    onnx.save(graph({"x": (TensorProto.FLOAT16, ["n", 3, 8, "w"])}), path)
    with OpenVino(path) as found:
        assert (found.precision, found.input.shape) == ("fp16", (None, 3, 8, None))
        assert found.run(np.ones((2, 3, 8, 5), np.float32))["out"].tolist() == [[1, 1, 1]] * 2
        with pytest.raises(ReplkError, match="takes float32 images"):
            found.run(np.ones((2, 3, 7, 5), np.float32))
    onnx.save(graph({"x": (TensorProto.UINT8, ["n", 8, 8, 3])}), path)
    with OpenVino(path) as found:
        assert (found.input.dtype, found.precision) == ("uint8", "fp32")
        assert found.run(np.full((2, 8, 8, 3), 9, np.uint8))["out"].max() == 9


def test_an_unknown_operator_is_told(tmp_path: Path) -> None:
    model = graph({"x": (TensorProto.FLOAT, ["n", 3, 8, 8])})
    model.graph.node[1].domain, model.graph.node[1].op_type = "elsewhere", "Unheard"
    model.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(ReplkError, match=r"OpenVINO cannot open .*Unheard"):
        OpenVino(tmp_path / "odd.onnx")


def test_the_layers_carry_the_names_of_our_modules(files: Files) -> None:
    with files.opened("openvino", "fp32") as found:
        layers = found.layer_times(images(2), repeats=3)
    convolutions = [layer for layer in layers if "Convolution" in layer.kind]
    modules = dict(artefacts.network().named_modules())
    named = {layer.name.partition("/")[0] for layer in convolutions}
    assert len(convolutions) == sum(isinstance(m, torch.nn.Conv2d) for m in modules.values()), (
        "none missing, none twice"
    )
    assert named <= modules.keys()
    assert "stages.0.blocks.0.large_kernel.lkb_reparam" in named
    assert all(len(layer.samples_ms) == 3 and min(layer.samples_ms) >= 0 for layer in layers)
    assert all(layer.detail for layer in convolutions), "the kernel that ran"


def test_a_profile_that_does_not_add_up_is_no_profile(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    honest = openvino._Launch.executed

    def forgetful(self: openvino._Launch) -> list[tuple[str, str, str, float]]:
        calls.append(self)
        return [node for node in honest(self) if len(calls) != 2 or "Convolution" not in node[1]]

    monkeypatch.setattr(openvino._Launch, "executed", forgetful)
    with files.opened("openvino", "fp32") as found, pytest.raises(ContractError, match="other nodes in some of 2"):
        found.layer_times(images(1), repeats=2)


def test_launches_do_not_share_their_memory(files: Files) -> None:
    with files.opened("openvino", "fp32") as found:
        first, second = (found.prepare(images(3, seed=seed)) for seed in (0, 1))
        for launch in (first, second):
            launch.enqueue()
            launch.wait()
        assert artefacts.error({"logits": first.answer(0)}) < artefacts.usual_error("fp32")
        assert not np.allclose(first.answer(0), second.answer(0))


QUIET = """
import sys
from pathlib import Path
from replk_deploy.backends.openvino import OpenVino
with OpenVino(Path(sys.argv[1])) as found:
    assert found.facts["openvino"]
import openvino.tools.ovc
assert openvino.tools.ovc.telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
assert sys.modules["openvino_telemetry"] is None
"""


def test_nothing_is_reported_to_anybody_and_no_identifier_is_kept(files: Files, tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "CI": "", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", QUIET, files.file("onnx", "fp32")]
    subprocess.run(command, check=True, env=environment, timeout=120)
    assert not list(tmp_path.iterdir())


def test_the_registry_knows_it() -> None:
    assert backends.find("openvino") is OpenVino
