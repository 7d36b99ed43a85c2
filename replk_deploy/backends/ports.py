"""What an ONNX file must be to be one of ours to run: a map from one batch of images to floating outputs."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx

from replk_deploy import graph
from replk_deploy.backends.base import TensorSpec
from replk_deploy.batch import Batch
from replk_deploy.errors import ReplkError
from replk_deploy.precision import PRECISIONS, Precision

RANK = 4
TYPES: dict[str, Precision] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Ports(NamedTuple):
    """The ports of a network, and the precision that the file says it has, or that its types show."""

    input: TensorSpec
    outputs: tuple[str, ...]
    precision: Precision


def of(artefact: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], said: str | None) -> Ports:
    """Return the ports of a network of images; `said` is the precision in the file's metadata.

    Raises:
        ReplkError: not one input of four dimensions, none 0, floating or bytes, or an output that is not floating.
    """
    takes = {*TYPES, "uint8"}
    images = len(inputs) == 1 and len(inputs[0].shape) == RANK and inputs[0].dtype in takes
    images = images and 0 not in inputs[0].shape
    if not images or not outputs or not {port.dtype for port in outputs} <= TYPES.keys():
        ports = ", ".join(f"{p.name} {p.dtype} {list(p.shape)}" for p in inputs) or "none"
        raise ReplkError(
            f"{artefact} does not map one batch of images to floating outputs: its inputs are {ports}",
            "name a file that replk export --onnx wrote",
        )
    typed = outputs[0].dtype if inputs[0].dtype == "uint8" else inputs[0].dtype
    precision = next((p for p in PRECISIONS if p == said), TYPES[typed])
    return Ports(inputs[0], tuple(port.name for port in outputs), precision)


def of_file(artefact: Path) -> tuple[Ports, Batch | None]:
    """Return the ports of an ONNX file without any runtime, and the range of its batch where it says one.

    Raises:
        ReplkError: not a whole ONNX file, or not a network from one image batch to floating outputs.
    """
    model = graph.load(artefact)
    said = {p.key: p.value for p in model.metadata_props}
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [port for port in _specs(model.graph.input) if port.name not in constants]
    batch = said.get("replk.batch")
    found = of(artefact, inputs, _specs(model.graph.output), said.get("replk.precision"))
    return found, Batch.parse(batch) if batch else None


def _specs(values: Iterable[onnx.ValueInfoProto]) -> list[TensorSpec]:
    types = {"FLOAT": "float32"}
    found = []
    for value in values:
        tensor = value.type.tensor_type
        name = onnx.TensorProto.DataType.Name(tensor.elem_type)
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
        found.append(TensorSpec(name=value.name, dtype=types.get(name, name.lower()), shape=shape))
    return found
