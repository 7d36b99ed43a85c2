"""Precisions, what they may cost, and the evidence.

A candidate is judged against what its precision costs PyTorch on the same checkpoint and the same
images: with e the relative L2 error of eager PyTorch at that precision against float64, the bound
is `factor`·max(e, `floor`). `limit` bounds e itself: above it the checkpoint does not survive the
precision. Evidence for each row: docs/errors.md.

tf32 is stored like fp32 and permits a GPU to round the operands of its matrix products to 10 bits of
mantissa; fp32 forbids it. Where TF32 does not exist, a tf32 file is computed and judged as fp32.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
ALGEBRA = 1e-12  # float64 gate of a fusion where float32 errs by 5e-5 or less; see algebra_gate


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How one precision is stored and judged.

    Attributes:
        floor: the spacing of its numbers at 1: two images may happen to cost PyTorch less, and nobody is held to that.
        typical: the error that correct networks showed.
    """

    onnx: str
    opset: int
    factor: float
    floor: float
    limit: float
    typical: float

    @property
    def torch_dtype(self) -> Any:
        """Return the dtype of PyTorch."""
        import torch  # this table is read where torch must not load

        return {"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}[self.onnx]


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(onnx="FLOAT", opset=20, factor=10, floor=1e-7, limit=1e-4, typical=2e-6),
    "tf32": Tolerance(onnx="FLOAT", opset=20, factor=3, floor=2.0**-10, limit=5e-2, typical=3e-3),
    "fp16": Tolerance(onnx="FLOAT16", opset=20, factor=3, floor=2.0**-10, limit=5e-2, typical=4e-3),
    "bf16": Tolerance(onnx="BFLOAT16", opset=22, factor=3, floor=2.0**-7, limit=2e-1, typical=3e-2),
}


def algebra_gate(eager_fp32: float) -> float:
    """Return how far two exact float64 evaluations may be apart, given float32's error on the same images.

    Both errors are round-off times the conditioning of the network, so float64's is float32's times
    2^-53 / 2^-24, and ten times that leaves room for another order of sums. Planted bugs start at
    8.6e-4, eight orders above.
    """
    return max(ALGEBRA, 10 * eager_fp32 * 2.0**-29)


def on_cpu(precision: Precision) -> Precision:
    """Return what a CPU computes in for a file of this precision."""
    return "fp32" if precision == "tf32" else precision
