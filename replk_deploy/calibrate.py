"""Single large convolutions on one runtime → what each form of them costs there.

Each layer is a network of its own, in each form that applies, prepared as `bench` prepares a whole one; on a
GPU it replays a CUDA graph, so that what is measured is the device. Inferences follow each other without a pause:
a time is that of a stretch of them over their number, the median of several stretches.
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
from replk_deploy.costs import Calibration, Cost, forms_of
from replk_deploy.errors import ReplkError
from replk_deploy.lower import lower_graph
from replk_deploy.lowerings import LOWERINGS, NONE
from replk_deploy.lowerings.base import LargeConv
from replk_deploy.metadata import PREFIX
from replk_deploy.precision import TOLERANCES, Precision
from replk_deploy.progress import Progress, silent

STRETCH_MS, STRETCHES, MOST = 40.0, 5, 400  # inferences of one stretch
SLOW_MS = 400.0  # of one inference, after which one more is enough
WARM_UPS = 3
SEED = 0


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
    todo = [(site, batch, form) for site in shapes.values() for batch in batches for form in forms_of(site)]
    for done, (site, batch, form) in enumerate(todo):
        progress(f"calibrate {kind.name}", done, len(todo))
        try:
            with _prepared(kind, site, batch, form, precision) as (device, launches):
                ms = min(_time(launch, queue=device != "cpu") for launch in launches)
        except ReplkError:
            if form == NONE:
                raise
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
                ms=ms,
            )
        )
    progress(f"calibrate {kind.name}", len(todo), len(todo))
    return Calibration(environment=machine.environment(), costs=tuple(costs))


@contextmanager
def _prepared(
    kind: type[Backend], site: LargeConv, batch: int, form: str, precision: Precision
) -> Iterator[tuple[str, list[Launch]]]:
    """Give the device and one launch for each way to lay the layer out in memory."""
    rng = np.random.default_rng(SEED)
    images = rng.standard_normal((batch, site.channels, *site.map), np.float32)
    kernel = rng.standard_normal((site.channels, 1, *site.taps), np.float32) / (site.taps[0] * site.taps[1])
    if kind.takes == "weights":
        yield _of_torch(site, form, precision, kernel, images)
        return
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder, "layer.onnx"), Path(folder, "form.onnx")
        onnx.save(_layer(site, kernel, precision), path)
        lower_graph(path, out, lambda _: form)
        graphed = "cuda_graph" in kind.honours
        with kind(out, Settings(cuda_graph=True) if graphed else DEFAULT) as backend:
            yield _device(backend.device), [backend.prepare(images)]


def _of_torch(
    site: LargeConv, form: str, precision: Precision, kernel: Array, images: Array
) -> tuple[str, list[Launch]]:
    """Prepare a layer in both memory layouts."""
    device, dtype = cuda.choose(DEFAULT, Torch.name), TOLERANCES[precision].torch_dtype
    bias = np.zeros(site.channels, np.float32)
    module: nn.Module
    if form == NONE:
        module = nn.Conv2d(site.channels, site.channels, site.taps, padding=site.padding, groups=site.channels)
        module.weight, module.bias = (nn.Parameter(torch.from_numpy(a), requires_grad=False) for a in (kernel, bias))
    else:
        lowering = LOWERINGS[form]
        placed, biases = lowering.weight(site, kernel), lowering.bias(site, bias)
        module = lowering.module(site, torch.from_numpy(placed), torch.from_numpy(biases))
    module = module.to(device, dtype)
    if device == "cuda":
        around = functools.partial(cuda.arithmetic, tf32=precision == "tf32")
    else:
        around = functools.partial(onednn.avoided, onednn.stalls(module))
    return _device(device), [_launch(module, images, dtype, layout, around) for layout in LAYOUTS.values()]


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


def _device(device: cuda.Device) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def _layer(site: LargeConv, kernel: Array, precision: Precision) -> onnx.ModelProto:
    """Return a network of one convolution, for any batch."""
    kind = TOLERANCES[precision]
    dtype = ir.DataType[kind.onnx]
    shape: list[str | int | None] = ["batch", site.channels, *site.map]
    ports = [onnx.helper.make_tensor_value_info(name, dtype.value, shape) for name in ("images", "out")]
    weight = ir.serde.serialize_tensor(ir.tensor(kernel.astype(dtype.numpy()), name="weight"))
    bias = ir.serde.serialize_tensor(ir.tensor(np.zeros(site.channels, dtype.numpy()), name="bias"))
    pads = [*site.padding, *site.padding]
    node = onnx.helper.make_node(
        "Conv", ["images", "weight", "bias"], ["out"], "layer", group=site.channels, kernel_shape=site.taps, pads=pads
    )
    graph = onnx.helper.make_graph([node], "layer", ports[:1], ports[1:], [weight, bias])
    opset = onnx.helper.make_opsetid("", kind.opset)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    model.metadata_props.add(key=f"{PREFIX}precision", value=precision)
    return model


def _time(launch: Launch, *, queue: bool) -> float:
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
