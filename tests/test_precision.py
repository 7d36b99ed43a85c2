"""The table of precisions: every row is whole, and e is bounded more tightly where it can be."""

import itertools
import subprocess
import sys

import onnx
import pytest
import torch

from replk_deploy.precision import ALGEBRA, PRECISIONS, TOLERANCES, Precision, algebra_gate


def test_every_precision_has_a_row_and_no_row_is_spare() -> None:
    assert tuple(TOLERANCES) == PRECISIONS
    assert set(PRECISIONS) == {"fp32", "tf32", "fp16", "bf16"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_names_types_that_exist_and_agree(precision: Precision) -> None:
    row = TOLERANCES[precision]
    widths = {
        "fp32": (torch.float32, 24),
        "tf32": (torch.float32, 24),
        "fp16": (torch.float16, 11),
        "bf16": (torch.bfloat16, 8),
    }
    dtype, mantissa = widths[precision]
    assert row.torch_dtype == dtype
    assert torch.finfo(dtype).eps == 2.0 ** (1 - mantissa)
    assert row.floor == pytest.approx(2.0**-10 if precision == "tf32" else torch.finfo(dtype).eps, rel=0.2)
    assert onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(row.onnx)).itemsize == dtype.itemsize
    assert row.opset == (22 if precision == "bf16" else 20)  # Conv takes bfloat16 from 22 on


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bounds_lie_in_the_only_order_that_makes_sense(precision: Precision) -> None:
    """A correct network must fit below the limit, and the limit below what says nothing any more."""
    row = TOLERANCES[precision]
    assert ALGEBRA < row.floor < row.typical < row.limit < 1
    assert 1 < row.factor <= 10
    assert row.factor * row.typical < 0.1


def test_less_mantissa_is_allowed_more_error() -> None:
    rows = [TOLERANCES[p] for p in ("fp32", "fp16", "bf16")]
    for one, two in itertools.pairwise(rows):
        assert one.limit < two.limit
        assert one.typical < two.typical


def test_reading_the_table_loads_no_runtime() -> None:
    code = "import sys, replk_deploy.precision; print([m for m in ('torch', 'onnx', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_gate_of_the_algebra_follows_the_conditioning_and_stays_below_every_bug() -> None:
    assert algebra_gate(0) == algebra_gate(TOLERANCES["fp32"].typical) == ALGEBRA
    assert algebra_gate(2e-2) == pytest.approx(20 * algebra_gate(1e-3))
    assert algebra_gate(TOLERANCES["fp32"].limit) < 1e-11
    assert algebra_gate(1.0) < 1e-5 / 100  # even for noise; the smallest planted bug is 1e-5 off
