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
    half = {torch.float16, torch.bfloat16}
    return any(
        isinstance(m, nn.Conv2d)
        and m.weight.dtype in half
        and m.groups == m.in_channels < FEW
        and max(m.kernel_size) >= LARGE
        for m in model.modules()
    )


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
