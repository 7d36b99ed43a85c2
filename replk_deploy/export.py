"""Fused network + precision → a checked .onnx file.

The network is cast first and exported then, so that the graph is typed throughout and holds no casts
but those at its border. Nodes and block outputs carry the names of the network's own modules; what
the exporter notes about the machine it ran on is removed.
"""

import ast
import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from replk_deploy.batch import Batch
from replk_deploy.errors import MismatchError, ReplkError
from replk_deploy.metadata import PREFIX
from replk_deploy.models.base import Network
from replk_deploy.precision import TOLERANCES, Precision
from replk_deploy.preprocess import Preprocessing

INPUT = "images"
LIMIT_BYTES = 2**31 - 2**20  # a protobuf file holds less than 2 GiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What the written graph is."""

    KIND: ClassVar[str] = "export"
    FORMAT: ClassVar[int] = 1

    precision: Precision
    opset: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    nodes: dict[str, int]
    batch: Batch
    size: tuple[int, int]
    embeds_preprocessing: bool


class _Deployed(nn.Module):
    def __init__(self, network: Network, embed: Preprocessing | None) -> None:
        super().__init__()
        self.network = network
        self.dtype = next(network.parameters()).dtype
        self.embed = embed is not None
        if embed is not None:
            scale = 1 / (255 * torch.tensor(embed.std, dtype=torch.float64))
            shift = -torch.tensor(embed.mean, dtype=torch.float64) / torch.tensor(embed.std, dtype=torch.float64)
            self.scale = nn.Buffer(scale.float().reshape(1, 3, 1, 1))
            self.shift = nn.Buffer(shift.float().reshape(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.embed:
            images = (images.float().permute(0, 3, 1, 2) * self.scale + self.shift).to(self.dtype)
        outputs: tuple[Tensor, ...] = self.network(images)
        return outputs


def export(
    model: Network,
    path: Path,
    *,
    precision: Precision,
    size: tuple[int, int],
    batch: Batch,
    embed: Preprocessing | None = None,
) -> Export:
    """Write a network as ONNX at `path` and check the file.

    Args:
        model: folded or merged, any floating type; untouched.
        path: where to write; the caller owns the name.
        precision: type of weights, activations, input and outputs.
        size: height and width.
        batch: fixed, or the range of a symbolic first dimension.
        embed: put this normalisation inside; the input is then [N, H, W, 3] uint8.

    Raises:
        ReplkError: an image too small for the network, or a file above 2 GiB.
        MismatchError: the written graph is not the one that was asked for.
    """
    row = TOLERANCES[precision]
    if min(size) < model.geometry.stride // 2:
        raise ReplkError(
            f"{size[0]}x{size[1]} is too small for this network",
            f"use at least --size {model.geometry.stride // 2}, better {model.geometry.stride}",
        )
    if sum(p.numel() for p in model.parameters()) * row.torch_dtype.itemsize > LIMIT_BYTES:
        raise ReplkError("the file would pass 2 GiB, which ONNX cannot hold", "export with --precision fp16")
    deployed = _Deployed(copy.deepcopy(model).to(row.torch_dtype), embed).eval()
    example_batch = max(batch.min, 2) if batch.dynamic else batch.max
    if embed is None:
        example = torch.zeros(example_batch, 3, *size, dtype=row.torch_dtype)
    else:
        example = torch.zeros(example_batch, *size, 3, dtype=torch.uint8)
    with _quiet():
        program = torch.onnx.export(
            deployed,
            (example,),
            dynamo=True,
            opset_version=row.opset,
            input_names=[INPUT],
            output_names=list(model.geometry.outputs),
            dynamic_shapes=({0: torch.export.Dim("batch", min=batch.min, max=batch.max)},) if batch.dynamic else None,
            verbose=False,
        )
    if program is None:
        raise MismatchError("the exporter gave nothing", "report this with the output of replk --version")
    graph = program.model
    _name_after_modules(graph.graph, set(model.blocks()))
    _forget_the_machine(graph)
    ir.save(graph, path)
    return check(path, model, precision=precision, size=size, batch=batch, embed=embed)


def check(
    path: Path,
    model: Network,
    *,
    precision: Precision,
    size: tuple[int, int],
    batch: Batch,
    embed: Preprocessing | None,
) -> Export:
    """Read the file back and say what it is; MismatchError when it is not what was asked for."""
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path)
    row = TOLERANCES[precision]
    nodes: dict[str, int] = {}
    for node in graph.graph.node:
        nodes[node.op_type] = nodes.get(node.op_type, 0) + 1
    opset = next(o.version for o in graph.opset_import if o.domain == "")
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    types = {onnx.TensorProto.DataType.Name(t.data_type) for t in graph.graph.initializer} - {"INT64"}
    first = (str(batch.max),) if not batch.dynamic else ("batch",)
    shape = (*first, *map(str, size), "3") if embed else (*first, "3", *map(str, size))
    wanted_input = {INPUT: f"{'UINT8' if embed else row.onnx} {'x'.join(shape)}"}
    inputs, outputs = _ports(graph.graph.input), _ports(graph.graph.output)
    text = _without_weights(graph)
    findings = {
        f"opset {opset}, asked for {row.opset}": opset != row.opset,
        f"input {inputs}, asked for {wanted_input}": inputs != wanted_input,
        f"outputs {outputs}, asked for {row.onnx}": not all(
            said.startswith(f"{row.onnx} ") for said in outputs.values()
        ),
        f"outputs {list(outputs)}, asked for {list(model.geometry.outputs)}": tuple(outputs) != model.geometry.outputs,
        f"{nodes.get('Conv', 0)} convolutions, the network has {convs}": nodes.get("Conv", 0) != convs,
        f"{nodes.get('BatchNormalization', 0)} BatchNorms left": nodes.get("BatchNormalization", 0) > norms,
        f"weights of type {sorted(types)}": not types <= ({row.onnx, "FLOAT"} if embed else {row.onnx}),
        "an approximate GELU": model.exact_gelu
        and any(
            a.name == "approximate" and a.s != b"none"
            for n in graph.graph.node
            if n.op_type == "Gelu"
            for a in n.attribute
        ),
        "notes of the exporter's machine in the file": b".py" in text or _noted(graph),
        "a batch dimension that became constant": any(not s.split()[1].startswith(first[0]) for s in outputs.values()),
    }
    wrong = [finding for finding, bad in findings.items() if bad]
    if wrong:
        raise MismatchError(
            f"the exported graph is not the one asked for: {'; '.join(wrong)}", "report this with the torch version"
        )
    return Export(
        precision=precision,
        opset=opset,
        inputs=inputs,
        outputs=outputs,
        nodes=dict(sorted(nodes.items())),
        batch=batch,
        size=size,
        embeds_preprocessing=embed is not None,
    )


def _noted(model: onnx.ModelProto) -> bool:
    """Tell whether anything but names, shapes and weights is left of where the graph was made."""
    graph = model.graph
    foreign = [p for p in model.metadata_props if not p.key.startswith(PREFIX)]
    return bool(foreign or model.doc_string or graph.doc_string or graph.metadata_props) or any(
        n.doc_string or n.metadata_props for n in (*graph.node, *graph.input, *graph.value_info)
    )


def _name_after_modules(graph: ir.Graph, blocks: set[str]) -> None:
    """Name nodes after their module, and each block's last value after the block."""
    last: dict[str, ir.Value] = {}
    counts: dict[str, int] = {}
    for node in graph:
        scopes = [
            s.removeprefix("network.")
            for s in ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        ]
        module = next((s for s in reversed(scopes[:-1]) if s not in {"", "network"} and not s.startswith("_")), "")
        base = f"{module}/{node.op_type}" if module else node.op_type
        counts[base] = counts.get(base, 0) + 1
        node.name = base if counts[base] == 1 else f"{base}_{counts[base]}"
        for scope in blocks.intersection(scopes):
            last[scope] = node.outputs[0]
    outputs = {value.name for value in graph.outputs}
    for block, value in last.items():
        if value.name not in outputs:
            value.name = block
    for value in list(graph.initializers.values()):
        name = str(value.name)
        if name.startswith("network."):
            value.name = name.removeprefix("network.")


def _forget_the_machine(model: ir.Model) -> None:
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _ports(values: Iterable[onnx.ValueInfoProto]) -> dict[str, str]:
    return {
        v.name: f"{onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type)} "
        + "x".join(d.dim_param or str(d.dim_value) for d in v.type.tensor_type.shape.dim)
        for v in values
    }


def _without_weights(model: onnx.ModelProto) -> bytes:
    del model.graph.initializer[:]
    return bytes(model.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own chatter from the terminal; its errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
