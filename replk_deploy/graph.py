"""ONNX files: their hash, their metadata, and the float32 twin that proves a bfloat16 one."""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from replk_deploy.errors import IntegrityError, ReplkError, first_line
from replk_deploy.metadata import PREFIX, Metadata
from replk_deploy.precision import PRECISIONS, TOLERANCES, Precision

MATRIX = 2  # dimensions
VERDICT = f"{PREFIX}verdict"


def load(path: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        ReplkError: not there, cut short, or no ONNX model with a graph.
    """
    if not path.is_file():
        raise ReplkError(f"{path} does not exist", "write it: replk export --onnx")
    try:
        model = onnx.load(path)
    except Exception as exc:  # protobuf and onnx raise many kinds
        raise ReplkError(
            f"{path} is not a whole ONNX file: {first_line(exc)}", "export it again: replk export --onnx"
        ) from exc
    if not model.graph.node:
        raise ReplkError(f"{path} holds no ONNX graph", "export it again: replk export --onnx")
    return model


def header(path: Path) -> Metadata | None:
    """Read the metadata of an ONNX file; None when it is not one of ours."""
    model = load(path)
    try:
        metadata = Metadata.from_strings({p.key: p.value for p in model.metadata_props})
    except ValueError as exc:
        raise ReplkError(f"{path}: {exc}", "export it again: replk export --onnx") from exc
    kernels = _kernels(model.graph)
    if metadata and kernels and kernels != {TOLERANCES[metadata.precision].onnx}:
        raise IntegrityError(
            f"{path} says {metadata.precision} and holds {', '.join(sorted(kernels))} kernels",
            "export it again: replk export --onnx",
        )
    return metadata


def precision_of(path: Path) -> Precision:
    """Return the precision that the types of a graph's convolutions show; for files that do not say.

    Raises:
        ReplkError: it convolves nothing, or in no type or several.
    """
    kernels = _kernels(load(path).graph)
    found: list[Precision] = [name for name in PRECISIONS if {TOLERANCES[name].onnx} == kernels]
    if not found:
        raise ReplkError(f"{path} convolves in {', '.join(sorted(kernels)) or 'no type'}", "name a network in one type")
    return found[0]


def _kernels(graph: onnx.GraphProto) -> set[str]:
    """Name the types of what the graph convolves and multiplies with."""
    types = {t.name: t.data_type for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            types.update((node.output[0], a.t.data_type) for a in node.attribute if a.name == "value")
    wanted = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    wanted |= {node.input[1] for node in graph.node if node.op_type in {"Gemm", "MatMul"} and node.input[1] in types}
    return {onnx.TensorProto.DataType.Name(types[name]) if name in types else "computed" for name in wanted}


def tensors(path: Path) -> set[tuple[tuple[int, ...], bytes]]:
    """Return shape and SHA-256 of the bytes of each weight in an ONNX file, a matrix also as it lies on its side."""
    found = set()
    for tensor in load(path).graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        for turned in (array, array.T) if array.ndim == MATRIX else (array,):
            found.add((turned.shape, hashlib.sha256(turned.tobytes()).digest()))
    return found


def weights(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Return the weights of an ONNX file by name, in float64."""
    return {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in load(path).graph.initializer}


def content_hash(path: Path) -> str:
    """Return the SHA-256 of graph, weights and metadata, the verdict left out."""
    model = load(path)
    kept = [p for p in model.metadata_props if p.key != VERDICT]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def seal(path: Path, metadata: Metadata) -> None:
    """Write metadata, verdict included, into an ONNX file in place of what it said before."""
    model = load(path)
    kept = [p for p in model.metadata_props if not p.key.startswith(PREFIX)]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for key, value in metadata.to_strings().items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)


def bfloat16_twin(path: Path, out: Path) -> None:
    """Write the float32 graph that computes what a bfloat16 graph computes, for runtimes without bfloat16.

    Weights keep their rounded values, and every input and result that was bfloat16 is rounded to
    bfloat16 and back. Sums inside one operator stay float32, as on hardware that accumulates in float32.
    """
    model = ir.load(path)
    model.metadata_props.clear()  # a stand-in for the proof, no artefact
    graph = model.graph
    nodes, rounded = list(graph), [value for value in graph.inputs if value.dtype == ir.DataType.BFLOAT16]
    for value in (*graph.initializers.values(), *graph.inputs):
        _widen(value)
    for value in rounded:
        _round(graph, None, value)
    for node in nodes:
        for value in node.outputs:
            if value.dtype == ir.DataType.BFLOAT16 and node.op_type != "Cast":
                value.dtype = ir.DataType.FLOAT
                _round(graph, node, value)
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.BFLOAT16:
            (value,) = node.outputs
            _append_widening(graph, node, value)
    ir.save(model, out)


def _widen(value: ir.Value) -> None:
    if value.dtype != ir.DataType.BFLOAT16:
        return
    if value.const_value is not None:
        value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
    value.dtype = ir.DataType.FLOAT


def _round(graph: ir.Graph, node: ir.Node | None, value: ir.Value) -> None:
    """Send everything that reads `value`, which `node` or the caller gives, through a cast to bfloat16 and back."""
    down = ir.node("Cast", [value], attributes={"to": ir.DataType.BFLOAT16.value})
    up = ir.node("Cast", [down.outputs[0]], attributes={"to": ir.DataType.FLOAT.value})
    _replace(graph, value, up.outputs[0], keep={down})
    if node is None:
        graph.insert_before(graph[0], [down, up])
    else:
        graph.insert_after(node, [down, up])


def _append_widening(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    up = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT.value})
    _replace(graph, value, up.outputs[0], keep={up})
    graph.insert_after(node, [up])


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value, *, keep: set[ir.Node]) -> None:
    new.shape, new.dtype = old.shape, ir.DataType.FLOAT
    for reader, index in list(old.uses()):
        if reader not in keep:
            reader.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            new.name, old.name = old.name, f"{old.name}.exact"
            graph.outputs[index] = new
