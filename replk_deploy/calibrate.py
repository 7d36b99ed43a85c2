"""Single large convolutions on one runtime → what each form of them costs there.

Each layer stands where it stands in a network, between two 1x1 convolutions with a ReLU, prepared as `bench`
prepares a whole one; its time is that of the three less that of the two alone. So a form pays for the
layout that its neighbours then miss. On a GPU a CUDA graph is replayed, so that what is measured is the device.
Inferences follow each other without a pause: a time is that of a stretch of them over their number, the median of
several stretches.
"""

import copy
import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

from replk_deploy import machine, onednn
from replk_deploy.backends import cuda
from replk_deploy.backends.base import DEFAULT, Array, Backend, Launch, Settings
from replk_deploy.backends.torch import LAYOUTS, CpuLaunch, Torch
from replk_deploy.costs import CPU, Calibration, Cost, forms_of, on_cpu
from replk_deploy.errors import ReplkError
from replk_deploy.lower import lower_graph
from replk_deploy.lowerings import LOWERINGS, NONE
from replk_deploy.lowerings.base import LargeConv, crop
from replk_deploy.metadata import PREFIX
from replk_deploy.precision import TOLERANCES, Precision
from replk_deploy.progress import Progress, silent

STRETCH_MS, STRETCHES, MOST = 40.0, 5, 400  # inferences of one stretch
SLOW_MS = 400.0  # of one inference, after which one more is enough
WARM_UPS = 3
SEED = 0
ALONE = "neighbours"  # the two 1x1 convolutions without anything between them
LEAST = 0.01  # of the three; a layer that cannot be told from its neighbours costs as much


def calibrate(
    kind: type[Backend],
    sites: Sequence[LargeConv],
    *,
    batches: Sequence[int],
    precision: Precision,
    progress: Progress = silent,
) -> Calibration:
    """Time each unlike convolution of `sites` in each form that applies, at each batch, on one runtime.

    A form that the runtime cannot execute is left out; the convolution itself must run.

    Args:
        kind: a runtime that opens exported files as they are; one of PyTorch is measured as eager PyTorch.
        sites: of a network; what they are called does not matter.
        batches: images at a time.
        precision: of weights and results.
        progress: told after each layer.

    Raises:
        UnavailableError: the runtime is not here, or cannot run the convolution.
    """
    kind.probe()
    shapes = {(s.channels, s.taps, s.map): s for s in sites}
    costs: list[Cost] = []
    todo = [(site, batch) for site in shapes.values() for batch in batches]
    for done, (site, batch) in enumerate(todo):
        progress(f"calibrate {kind.name}", done, len(todo))
        device, layouts = _times(kind, site, batch, NONE, precision)
        layout = layouts.index(min(layouts))  # that of the network, which a form has to live with
        neighbours = _times(kind, site, batch, ALONE, precision)[1][layout]
        for form in forms_of(site):
            try:
                ms = layouts[layout] if form == NONE else _times(kind, site, batch, form, precision)[1][layout]
            except ReplkError:
                continue
            costs.append(
                Cost(
                    runtime=Torch.name if kind.takes == "weights" else kind.name,
                    device=device,
                    precision=precision,
                    batch=batch,
                    channels=site.channels,
                    taps=site.taps,
                    map=site.map,
                    form=form,
                    ms=max(ms - neighbours, LEAST * ms),
                )
            )
    progress(f"calibrate {kind.name}", len(todo), len(todo))
    return Calibration(environment=machine.environment(), costs=tuple(costs))


def _times(
    kind: type[Backend], site: LargeConv, batch: int, form: str, precision: Precision
) -> tuple[str, list[float]]:
    """Return the device, and the milliseconds of a form in each memory layout."""
    with _prepared(kind, site, batch, form, precision) as (device, launches):
        return device, [stretch_ms(launch, queue=not on_cpu(device)) for launch in launches]


@contextmanager
def _prepared(
    kind: type[Backend], site: LargeConv, batch: int, form: str, precision: Precision
) -> Iterator[tuple[str, list[Launch]]]:
    """Give the device and one launch for each way to lay the layer out in memory."""
    rng = np.random.default_rng(SEED)
    images = rng.standard_normal((batch, site.channels, *site.map), np.float32)
    kernel = rng.standard_normal((site.channels, 1, *site.kernel), np.float32) / math.prod(site.kernel)
    mixer = rng.standard_normal((site.channels, site.channels, 1, 1), np.float32) / site.channels**0.5
    if kind.takes == "weights":
        yield _of_torch(site, form, precision, kernel, mixer, images)
        return
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder, "layer.onnx"), Path(folder, "form.onnx")
        onnx.save(_block(site, form, kernel, mixer, precision), path)
        lower_graph(path, out, lambda _: form)
        graphed = "cuda_graph" in kind.honours
        with kind(out, Settings(cuda_graph=True) if graphed else DEFAULT) as backend:
            yield device_name(backend.device), [backend.prepare(images)]


def _of_torch(
    site: LargeConv, form: str, precision: Precision, kernel: Array, mixer: Array, images: Array
) -> tuple[str, list[Launch]]:
    """Prepare a layer between its neighbours in both memory layouts."""
    device, dtype = cuda.choose(DEFAULT, Torch.name), TOLERANCES[precision].torch_dtype
    bias = np.zeros(site.channels, np.float32)
    layers = [_conv(mixer, bias), nn.ReLU()]
    if form in LOWERINGS:
        lowering = LOWERINGS[form]
        placed, biases = lowering.weight(site, kernel), lowering.bias(site, bias)
        layers += [lowering.module(site, torch.from_numpy(placed), torch.from_numpy(biases)), nn.ReLU()]
    elif form == NONE:
        layers += [_conv(crop(site, kernel), bias), nn.ReLU()]
    module = nn.Sequential(*layers, _conv(mixer, bias))
    module = module.to(device, dtype)
    if device == "cuda":
        around = functools.partial(cuda.arithmetic, tf32=precision == "tf32")
    else:
        around = functools.partial(onednn.avoided, onednn.stalls(module))
    return device_name(device), [_launch(module, images, dtype, layout, around) for layout in LAYOUTS.values()]


def _launch(
    module: nn.Module,
    images: Array,
    dtype: torch.dtype,
    layout: torch.memory_format,
    around: Callable[[], AbstractContextManager[None]],
) -> Launch:
    own = copy.deepcopy(module).to(memory_format=layout)  # type: ignore[call-overload]  # missing in torch's stubs
    device = next(own.parameters()).device
    batch = torch.from_numpy(images).to(device, dtype).to(memory_format=layout)

    def run() -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(), around():
            return (own(batch),)

    return cuda.CudaLaunch(run, graph=True) if device.type == "cuda" else CpuLaunch(run)


def device_name(device: cuda.Device) -> str:
    """Return what calibrations call a device of this machine: the GPU's name, or the processor and its instructions."""
    if device == "cuda":
        return str(cuda.facts()["gpu"])
    return f"{CPU} {machine.cpu()} {torch.backends.cpu.get_cpu_capability()}"


def _conv(weight: Array, bias: Array) -> nn.Module:
    """Return a convolution with "same" padding; one whose weight has one input a channel is depthwise."""
    channels, inputs, high, wide = weight.shape
    conv = nn.Conv2d(channels, channels, (high, wide), padding="same", groups=channels // inputs, device="meta")
    conv.weight, conv.bias = (nn.Parameter(torch.from_numpy(a.copy()), requires_grad=False) for a in (weight, bias))
    return conv


def _block(site: LargeConv, form: str, kernel: Array, mixer: Array, precision: Precision) -> onnx.ModelProto:
    """Return a layer between two 1x1 convolutions, or these alone, for any batch."""
    kind = TOLERANCES[precision]
    dtype = ir.DataType[kind.onnx]
    weights = {"mixer": mixer, "kernel": kernel, "bias": np.zeros(site.channels, np.float32)}
    tensors = [
        ir.serde.serialize_tensor(ir.tensor(array.astype(dtype.numpy()), name=name)) for name, array in weights.items()
    ]
    top, side = (size // 2 for size in site.kernel)
    node = onnx.helper.make_node
    nodes = [node("Conv", ["images", "mixer", "bias"], ["a"], "before"), node("Relu", ["a"], ["b"], "first")]
    if form != ALONE:
        pads = [top, side, top, side]
        nodes.append(node("Conv", ["b", "kernel", "bias"], ["c"], "layer", group=site.channels, pads=pads))
        nodes.append(node("Relu", ["c"], ["d"], "second"))
    nodes.append(node("Conv", [nodes[-1].output[0], "mixer", "bias"], ["out"], "after"))
    shape: list[str | int | None] = ["batch", site.channels, *site.map]
    ports = [onnx.helper.make_tensor_value_info(name, dtype.value, shape) for name in ("images", "out")]
    graph = onnx.helper.make_graph(nodes, "block", ports[:1], ports[1:], tensors)
    opset = onnx.helper.make_opsetid("", kind.opset)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    model.metadata_props.add(key=f"{PREFIX}precision", value=precision)
    return model


def stretch_ms(launch: Launch, *, queue: bool) -> float:
    """Return the milliseconds of one inference among many, which follow each other without a wait if they `queue`."""
    for _ in range(WARM_UPS):
        once = _stretch(launch, 1, queue=queue)
    count = max(1, math.ceil(STRETCH_MS / max(once, STRETCH_MS / MOST)))
    stretches = STRETCHES if once < SLOW_MS else 1
    return statistics.median(_stretch(launch, count, queue=queue) for _ in range(stretches))


def _stretch(launch: Launch, count: int, *, queue: bool) -> float:
    start = time.perf_counter_ns()
    for _ in range(count):
        launch.enqueue()
        if not queue:
            launch.wait()
    launch.wait()
    return (time.perf_counter_ns() - start) / 1e6 / count
