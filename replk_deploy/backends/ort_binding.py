"""One inference of ONNX Runtime between fixed places in the memory of a GPU, which torch allocates.

It ran on an H100; the tests use ONNX Runtime's CPU provider and places in the processor's memory.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from replk_deploy.backends import cuda
from replk_deploy.backends.base import TensorSpec
from replk_deploy.backends.ort import DTYPES, onnxruntime, refusal
from replk_deploy.errors import ReplkError, UnavailableError, first_line

NO_CAPTURE = -1  # ONNX Runtime's number for a run outside any CUDA graph; 0 is its own


@final
class Bound:
    """One inference whose input and outputs lie in fixed places on the GPU; called, it enqueues and returns them."""

    def __init__(self, session: Any, port: TensorSpec, outputs: tuple[str, ...], batch: Tensor, number: int) -> None:
        self._session, self._binding, self._batch = session, session.io_binding(), batch
        self._options = _run_options(number)
        self._outputs: dict[str, Tensor] = {}
        shape = tuple(batch.shape)
        with _told(f"cannot answer {'x'.join(map(str, shape))}"):
            self._binding.bind_input(port.name, cuda.DEVICE, 0, np.dtype(port.dtype), shape, batch.data_ptr())
            for name in outputs:
                self._binding.bind_output(name, cuda.DEVICE)
            session.run_with_iobinding(self._binding, _run_options(NO_CAPTURE))  # the shapes are known only now
            for name, value in zip(outputs, self._binding.get_outputs(), strict=True):
                self._outputs[name] = self._place_for(name, DTYPES[value.data_type()], tuple(value.shape()))

    def _place_for(self, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        with cuda.translated("hold the answer"):
            out = torch.empty(shape, dtype=getattr(torch, dtype), device=cuda.DEVICE)
        self._binding.bind_output(name, cuda.DEVICE, 0, np.dtype(dtype), shape, out.data_ptr())
        return out

    def __call__(self) -> Mapping[str, Tensor]:
        """Enqueue; the outputs are always the same tensors."""
        with _told("cannot answer"):
            self._session.run_with_iobinding(self._binding, self._options)
        return self._outputs


def _run_options(number: int) -> Any:
    options = onnxruntime("gpu").RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # wait() does, on the same stream
    return options


@contextmanager
def _told(did: str) -> Iterator[None]:
    """Turn an error of ONNX Runtime in the block into ours; what the GPU says is not the file's fault."""
    try:
        yield
    except ReplkError:
        raise
    except Exception as exc:  # ONNX Runtime's errors share no other base
        words = str(exc)
        if "out of memory" in words or "Failed to allocate memory" in words:
            raise UnavailableError(
                f"the GPU has too little memory, ONNX Runtime {did}: {first_line(exc)}",
                "use a smaller --batch, or close what else holds its memory: nvidia-smi",
            ) from exc
        if any(kind in words for kind in ("CUDA failure", "CUDNN failure", "CUBLAS failure", "CUDA error")):
            raise UnavailableError(
                f"the GPU failed, ONNX Runtime {did}: {first_line(exc)}",
                "start again in a new process; when it recurs see nvidia-smi and dmesg",
            ) from exc
        raise refusal(exc, did) from exc
