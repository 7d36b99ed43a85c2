"""Keeps PyTorch on CPUs away from a convolution that does not return.

oneDNN, as of torch 2.13 on a CPU with AVX-512 FP16, was not back after 20 s from one half-precision
31x31 depthwise convolution with 16 channels or fewer on maps of 32 and larger; 24 channels took 9 ms.
PyTorch's own kernel answers the same in 0.1 s.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

FEW = 24
LARGE = 13


def stalls(model: nn.Module) -> bool:
    """Tell whether a network has a half-precision large depthwise convolution of few channels."""
    convs = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    return any(m.groups == m.in_channels and stalls_with(m.weight, m.in_channels) for m in convs)


def stalls_with(weight: torch.Tensor, channels: int) -> bool:
    """Tell whether a depthwise convolution of so many channels with a weight [C, 1, K, k] is such a one."""
    half = {torch.float16, torch.bfloat16}
    return weight.dtype in half and channels < FEW and max(weight.shape[2:]) >= LARGE


@contextmanager
def avoided(when: bool) -> Iterator[None]:  # noqa: FBT001  # reads as a sentence
    """Run the block on PyTorch's own kernels when told to."""
    if not when:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the switch itself warns about Intel GPUs
        flags = torch.backends.mkldnn.flags(enabled=False)
        flags.__enter__()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            flags.__exit__(None, None, None)
