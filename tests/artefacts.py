"""Files of one small network for every runtime, and files that are no network of images."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path

import filelock
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from replk_deploy import backends, weights
from replk_deploy.backends import cuda, sidecar
from replk_deploy.backends.base import DEFAULT, Array, Backend, Engine, Recipe, Settings
from replk_deploy.backends.sidecar import Sidecar
from replk_deploy.batch import Batch
from replk_deploy.export import export
from replk_deploy.files import sha256
from replk_deploy.fuse import fuse
from replk_deploy.graph import seal
from replk_deploy.metadata import Metadata, Verdict
from replk_deploy.models.base import Network
from replk_deploy.models.replknet import RepLKGeometry, RepLKNet
from replk_deploy.poison import poison, randomise
from replk_deploy.precision import TOLERANCES, Precision
from replk_deploy.preprocess import HALF, Preprocessing
from replk_deploy.progress import silent

SIZE = 64
BATCH = Batch(min=1, opt=3, max=64)
GEOMETRY = RepLKGeometry(
    channels=(8, 16, 24, 32),
    depths=(1, 1, 1, 1),
    kernels=(31, 29, 27, 13),
    small=5,
    dw_channels=(8, 16, 24, 32),
    ffn_channels=(32, 64, 96, 128),
    classes=10,
)


@functools.cache
def network() -> Network:
    """Return a folded float64 network whose norms have lived; shared, so never change it."""
    return fuse(poison(randomise(RepLKNet.build(GEOMETRY, "training")), size=SIZE)).model


@functools.cache
def truth(count: int) -> Array:
    """Return its answers to the first images."""
    return network()(torch.from_numpy(images(count)).double())[0].numpy()


def images(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, SIZE, SIZE), dtype=np.float32)


def describe(precision: Precision) -> Metadata:
    preprocessing = Preprocessing(
        size=(SIZE, SIZE), mean=HALF[0], std=HALF[1], resize="crop", crop_pct=0.875, said_by="default"
    )
    return Metadata(
        family="replknet",
        form="folded",
        geometry=network().describe(),
        label=network().geometry.label,
        precision=precision,
        preprocessing=preprocessing,
        source_sha256="0" * 64,
        source_name="a test",
    )


def error(answer: Mapping[str, Array]) -> float:
    """Return the relative L2 error of the worst row of an answer to the first images."""
    got, wanted = answer["logits"].astype(np.float64), truth(len(answer["logits"]))
    return float((np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())


def usual_error(precision: Precision) -> float:
    """Return what a right answer may be off by."""
    row = TOLERANCES[precision]
    return min(10 * row.typical, row.limit)


class Files:
    """Writes each file when it is first asked for; the test processes of one session write it once."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        base = factory.getbasetemp()
        self._folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "artefacts"
        self._folder.mkdir(exist_ok=True)

    def file(self, kind: str, precision: Precision) -> Path:
        """Return a file of "weights" or "onnx", or the engine of a backend of that name."""
        device = cuda.choose(DEFAULT, kind)  # some engines are for the one that is there
        suffix = {"weights": ".safetensors", "onnx": ".onnx"}.get(kind) or f".{kind}-{device}{_engine(kind).suffix}"
        path = self._folder / f"model.{precision}{suffix}"
        with filelock.FileLock(f"{path}.lock"):
            done = path.with_name(f"{path.name}.done")
            if not done.exists():
                self._write(kind, precision, path)
                done.touch()
        return path

    def opened(self, name: str, precision: Precision, settings: Settings = DEFAULT) -> Backend:
        """Open what a backend takes."""
        found = backends.find(name)
        kind = name if issubclass(found, Engine) else found.takes
        return found(self.file(kind, precision), settings)

    def _write(self, kind: str, precision: Precision, path: Path) -> None:
        twin = RepLKNet.build(GEOMETRY, "folded")
        twin.load_state_dict(network().state_dict())
        twin = twin.to(TOLERANCES[precision].torch_dtype).requires_grad_(requires_grad=False)
        if kind == "weights":
            weights.write(path, twin, describe(precision))
        elif kind == "onnx":
            export(twin, path, precision=precision, size=(SIZE, SIZE), batch=BATCH)
            seal(path, describe(precision))
        else:
            engine = _engine(kind)
            source = self.file(engine.takes, precision)
            made = engine.build(source, path, Recipe(batches=(BATCH,)), silent)
            sidecar.write(path, describe_engine(engine, path, source, made, precision))


def _engine(name: str) -> type[Engine]:
    found = backends.find(name)
    assert issubclass(found, Engine)
    return found


def describe_engine(kind: type[Engine], path: Path, source: Path, made, precision: Precision) -> Sidecar:
    said = Sidecar(
        backend=kind.name,
        sha256=sha256(path),
        source=source.name,
        source_sha256=sha256(source),
        made_with=made.made_with,
        recipe={},
        facts=made.facts,
        input=made.input,
        outputs=made.outputs,
        batches=made.batches,
        precision=precision,
        metadata=describe(precision).to_strings(),
        verdict=Verdict(state="pass", content="", reference="", worst=0.1, why="a test"),
    )
    return sealed(said)


def sealed(said: Sidecar) -> Sidecar:
    """Let the verdict of a sidecar speak of what it says now."""
    return dataclasses.replace(said, verdict=dataclasses.replace(said.verdict, content=sidecar.content(said)))


def graph(inputs: Mapping[str, tuple[int, list[object]]], output: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Return a file of somebody else: the mean of its first input over H and W."""
    ports = [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in inputs.items()]
    first = ports[0].name
    nodes = [
        helper.make_node("Cast", [first], ["cast"], to=TensorProto.FLOAT, name="to float"),
        helper.make_node("GlobalAveragePool", ["cast"], ["pooled"], name="mean"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"),
        helper.make_node("Cast", ["flat"], ["out"], to=output, name="to output"),
    ]
    out = helper.make_tensor_value_info("out", output, None)
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(helper.make_graph(nodes, "foreign", ports, [out]), opset_imports=opset, ir_version=10)


ODD = {
    "two inputs": graph({"x": (TensorProto.FLOAT, ["n", 3, 8, 8]), "y": (TensorProto.FLOAT, [1])}),
    "no image": graph({"x": (TensorProto.FLOAT, [0, 3, 8, 8])}),
    "rank 3": graph({"x": (TensorProto.FLOAT, ["n", 3, 8])}),
    "integers": graph({"x": (TensorProto.INT64, ["n", 3, 8, 8])}),
    "integers out": graph({"x": (TensorProto.FLOAT, ["n", 3, 8, 8])}, output=TensorProto.INT64),
}
