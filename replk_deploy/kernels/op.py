"""The large depthwise convolution as an operator of PyTorch, on its own or as a module of anybody's network.

    y = activation(conv2d(x, weight, bias, padding=K // 2, groups=C))

On a GPU it is one kernel of this folder, on a CPU PyTorch's own convolution. It works under torch.compile,
torch.export and in CUDA graphs. It has no gradient: it is for networks that are trained.
"""

from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from replk_deploy import onednn
from replk_deploy.errors import ReplkError
from replk_deploy.kernels import nvrtc, tuning
from replk_deploy.kernels.launch import ACTIVATIONS, TF32, TYPES, Activation, Shape, Tile, candidates

SIZES = range(7, 32, 2)
MAP_DIMS = 4
VECTOR = 16  # bytes


class Work(NamedTuple):
    """What one kernel computes."""

    shape: Shape
    activation: Activation
    dtype: str


def large_depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none"
) -> Tensor:
    """Convolve each channel with its own large filter, stride 1 and "same" padding; then add and activate.

    Args:
        x: [N, C, H, W] float16, bfloat16 or float32. The rows of a map lie one after the other, the maps anywhere:
            contiguous tensors and channel-major ones ([C, N, H, W] in memory) are read as they are, others copied.
        weight: [C, 1, K, K] of the same type, K odd, 7 to 31.
        bias: [C] of the same type.
        activation: none, relu, or gelu (the exact one, with erf).

    Returns:
        [N, C, H, W], new, laid out as x was read; sums are in float32. Where PyTorch may use TF32 for convolutions
        (its default; torch.backends.cudnn.conv.fp32_precision or the older allow_tf32 say so), float32 goes through
        tensor cores with 16 bits of mantissa instead of TF32's 10; else through CUDA cores, with all 23.

    Raises:
        ReplkError: another shape, type or device.
        UnavailableError: a GPU before compute capability 8.0, or NVIDIA's packages are missing.
    """
    _demand(x, weight, bias, activation)
    return torch.ops.replk.large_depthwise_conv2d(x, weight, bias, activation)  # type: ignore[no-any-return]


@final
class LargeDepthwiseConv2d(nn.Module):
    """A drop-in for a depthwise nn.Conv2d of stride 1 and "same" padding, and the activation after it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.activation: Activation = activation

    @classmethod
    def of(cls, conv: nn.Conv2d, activation: Activation = "none") -> "LargeDepthwiseConv2d":
        """Take over the weights of a convolution.

        Raises:
            ReplkError: it is not depthwise, has a stride, dilation or other padding, or a kernel that is not in SIZES.
        """
        size = conv.kernel_size[0]
        told = (conv.stride, conv.dilation, conv.padding_mode, conv.groups, conv.out_channels, conv.kernel_size)
        wanted = ((1, 1), (1, 1), "zeros", conv.in_channels, conv.in_channels, (size, size))
        if told != wanted or size not in SIZES or conv.padding not in {"same", (size // 2, size // 2)}:
            raise ReplkError(
                f"{conv} is no depthwise convolution of stride 1, 'same' padding and an odd kernel from 7 to 31",
                "leave it as it is",
            )
        return cls(conv.weight, conv.bias, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape; under autocast in its type, as a convolution does."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return large_depthwise_conv2d(x, weight, bias, self.activation)


def _demand(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """Raise ReplkError for what the kernels do not take."""
    name = str(x.dtype).removeprefix("torch.")
    if x.dim() != MAP_DIMS or weight.dim() != MAP_DIMS:
        raise ReplkError(f"x has {x.dim()} dimensions and weight {weight.dim()}", "give [N, C, H, W] and [C, 1, K, K]")
    channels, size = x.shape[1], weight.shape[-1]
    if tuple(weight.shape) != (channels, 1, size, size) or size not in SIZES:
        raise ReplkError(
            f"weight is {list(weight.shape)} for {channels} channels", "give [C, 1, K, K], K odd and 7 to 31"
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ReplkError(f"bias is {list(bias.shape)} for {channels} channels", "give [C]")
    others = [t for t in (weight, bias) if t is not None]
    if name not in TYPES or any((t.dtype, t.device) != (x.dtype, x.device) for t in others):
        said = ", ".join(f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in (x, *others))
        raise ReplkError(f"x, weight and bias are {said}", f"give all on one device, in one of {', '.join(TYPES)}")
    if activation not in ACTIVATIONS:
        raise ReplkError(f"there is no activation {activation}", f"take one of {', '.join(ACTIVATIONS)}")


def activated(x: Tensor, activation: str) -> Tensor:
    """Return the activation of x, in PyTorch's words."""
    if activation == "gelu":
        return functional.gelu(x)
    return functional.relu(x) if activation == "relu" else x


def by_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return what the kernel does from PyTorch's own convolution, on a CPU."""
    with onednn.avoided(onednn.stalls_with(weight, x.shape[1])):
        found = functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])
    return activated(found, activation)


def _readable(x: Tensor) -> Tensor:
    """Return x as `_laid_out` says, copied unless it already lies so, and where vectors can be loaded."""
    x = x if _plain(x) else x.clone(memory_format=torch.contiguous_format)
    return x if x.data_ptr() % VECTOR == 0 else x.clone()


@torch.library.custom_op("replk::large_depthwise_conv2d", mutates_args=(), device_types="cpu")
def _op(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    y = torch.empty_like(_laid_out(x))
    if x.numel():  # PyTorch's own takes no maps without a row
        y.copy_(by_pytorch(x, weight, bias, activation))
    return y


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    del weight, bias, activation
    return torch.empty_like(_laid_out(x))


@_op.register_kernel("cuda")
def _on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    with torch.cuda.device(x.device), nvrtc.translated("convolve"):
        x = _readable(x)
        y = torch.empty_like(x)
        if x.numel():
            bias = None if bias is None else bias.contiguous()
            convolve(x, weight.contiguous(), bias, activation, y, ahead=False)
    return y


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, y: Tensor, *, ahead: bool) -> None:
    """Run the kernel in the tile that is fastest here; rows of the maps of x and y lie one after the other.

    Args:
        x: [N, C, H, W]; each channel begins where vectors can be loaded, at a multiple of 16 bytes.
        weight: [C, 1, K, K], contiguous.
        bias: [C], contiguous.
        activation: none, relu or gelu.
        y: [N, C, H, W], begins as x does; written.
        ahead: fetch the weights while the kernel before this one on the stream still runs. It must not write them.
    """
    images, channels, height, width = x.shape
    shape = Shape(images=images, channels=channels, height=height, width=width, kernel=weight.shape[-1])
    dtype, (multiprocessors, shared) = str(x.dtype).removeprefix("torch."), nvrtc.limits()
    if x.dtype == torch.float32 and _may_be_tf32():
        dtype = TF32
    tiles = candidates(shape, dtype, multiprocessors=multiprocessors, shared=shared)

    def start(tile: Tile) -> None:
        nvrtc.start(
            tile.name,
            (*tile.constants(dtype=dtype, activation=activation, shared=shared), ("AHEAD", int(ahead))),
            *(x, weight, bias, y, images, x.stride(0), x.stride(1), y.stride(0), y.stride(1)),
            grid=tile.grid,
            threads=tile.threads,
            shared=tile.shared,
        )

    start(tuning.fastest(Work(shape, activation, dtype), tiles, start))


def _may_be_tf32() -> bool:
    """Tell whether PyTorch may use TF32 for convolutions; its older switch cannot be read once a newer one was set."""
    switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # missing in torch's stubs
    return bool(switch.fp32_precision == "tf32")


def _laid_out(x: Tensor) -> Tensor:
    """Return x, or an empty tensor that lies as the copy does that would be read."""
    return x if _plain(x) else torch.empty_like(x, memory_format=torch.contiguous_format)


def _plain(x: Tensor) -> bool:
    return x.is_contiguous() or x.transpose(0, 1).is_contiguous()
