"""TensorFloat-32 as a GPU would round, on a machine that has none."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from replk_deploy import tf32
from replk_deploy.proof import cast, eager_of
from tests import networks

FLOATS = st.floats(width=32, allow_subnormal=False, min_value=-(2.0**100), max_value=2.0**100)


@given(FLOATS)
def test_a_value_moves_to_the_nearest_with_ten_bits_of_mantissa(value: float) -> None:
    near = tf32.rounded(torch.tensor([value])).item()
    if value == 0:
        assert near == 0
        return
    mantissa, exponent = math.frexp(value)  # value = mantissa * 2**exponent, mantissa in [0.5, 1)
    assert near == math.ldexp(round(math.ldexp(mantissa, 11)), exponent - 11), "round() is to even on ties, too"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays(value: float) -> None:
    assert torch.equal(tf32.rounded(torch.tensor([value])).isnan(), torch.tensor([math.isnan(value)]))
    assert math.isnan(value) or tf32.rounded(torch.tensor([value])).item() == value


def test_both_operands_are_rounded_and_the_sum_is_not() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 8).requires_grad_(requires_grad=False)
    x = torch.randn(5, 64)
    wanted = torch.nn.functional.linear(tf32.rounded(x), tf32.rounded(layer.weight), layer.bias)
    exact = layer(x)
    tf32.emulate(layer)
    assert torch.equal(layer(x), wanted)
    assert 1e-5 < ((layer(x) - exact).norm() / exact.norm()).item() < 1e-3


def test_a_network_loses_what_tf32_costs_and_the_original_stays() -> None:
    network = networks.trained()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = cast(network, torch.float64)(images.double())[0]
    before = network(images)[0]
    errors = [
        ((eager_of(network, p)(images)[0].double() - exact).norm() / exact.norm()).item() for p in ("fp32", "tf32")
    ]
    assert torch.equal(network(images)[0], before)
    assert 30 * errors[0] < errors[1] < 5e-2
