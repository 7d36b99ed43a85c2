"""The convolution that does not return is recognised, kept away, and nothing else is changed."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from replk_deploy import onednn, verify
from replk_deploy.fuse import fuse
from replk_deploy.models.replknet import RepLKGeometry, RepLKNet
from replk_deploy.poison import poison, randomise
from replk_deploy.proof import cast


def enabled() -> bool:
    return bool(torch._C._get_mkldnn_enabled())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    channels=st.sampled_from([1, 8, 16, 23, 24, 64]),
    kernel=st.sampled_from([1, 5, 11, 13, 31]),
    depthwise=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_only_a_half_precision_large_depthwise_convolution_of_few_channels_stalls(
    channels: int, kernel: int, depthwise, dtype: torch.dtype
) -> None:
    conv = nn.Conv2d(channels, channels, kernel, groups=channels if depthwise else 1).to(dtype)
    half = dtype in {torch.float16, torch.bfloat16}
    expected = half and kernel >= 13 and channels < 24 and (depthwise or channels == 1)
    assert onednn.stalls(nn.Sequential(nn.ReLU(), nn.Sequential(conv))) == expected


@pytest.mark.parametrize("stop", [None, RuntimeError, KeyboardInterrupt])
def test_the_switch_is_off_inside_and_back_afterwards_whatever_happens(stop) -> None:
    before = enabled()
    assert before, "this PyTorch has no oneDNN: the test shows nothing"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            with onednn.avoided(when=True):
                assert not enabled()
                if stop:
                    raise stop
        except (RuntimeError, KeyboardInterrupt):
            pass
    assert enabled() == before


def test_nothing_is_switched_when_there_is_nothing_to_avoid() -> None:
    with onednn.avoided(when=False):
        assert enabled()


def test_a_switch_that_was_off_stays_off() -> None:
    with onednn.avoided(when=True):
        with onednn.avoided(when=True):
            pass
        assert not enabled()
    assert enabled()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_network_that_stalls_answers_and_answers_right(precision) -> None:
    """The map is 40x40 behind a stride of 2: large enough for the stall, which took over 20 s."""
    geometry = RepLKGeometry(
        channels=(8,), depths=(1,), kernels=(31,), small=5, dw_channels=(8,), ffn_channels=(16,), classes=7
    )
    model = fuse(poison(randomise(RepLKNet.build(geometry, "training")))).model
    half = cast(model, precision)
    assert onednn.stalls(half)
    probe = verify.normal((136, 144))
    expected, got = (verify.answer_of(m)(probe.images)["logits"] for m in (model, half))
    error = float(((got - expected) ** 2).sum() ** 0.5 / (expected**2).sum() ** 0.5)
    assert 1e-5 < error < 0.1  # rounded, and no more than that
    assert enabled()
