"""RepLKNet channel by channel: three kernels a RepLK block, two a ConvFFN."""

from typing import Any, cast, final

from torch import Tensor, nn

from replk_deploy.kernels.layers import First, Large, Maps, Pointwise, Small
from replk_deploy.models.replknet import RepLKBlock, RepLKNet
from replk_deploy.preprocess import Preprocessing


@final
class ChannelMajor(nn.Module):
    """A folded RepLKNet in channel-major layers, under the names of its modules.

    Args:
        model: folded; its convolutions are replaced.
        preprocessing: how pixels are normalised.
    """

    def __init__(self, model: RepLKNet, preprocessing: Preprocessing) -> None:
        super().__init__()
        parts: Any = model  # nn.Module knows no types of its parts
        whole, depth, point, last = parts.stem
        whole.conv = First(whole.conv, preprocessing.mean, preprocessing.std)
        depth.conv, point.conv, last.conv = Small(depth.conv), Pointwise(point.conv, "relu"), Small(last.conv)
        for stage in parts.stages:
            for block in stage.blocks:
                mixes = isinstance(block, RepLKBlock)
                block.pw1.conv = Pointwise(block.pw1.conv, "relu" if mixes else "gelu")
                block.pw2.conv = Pointwise(block.pw2.conv, "none")
                if mixes:
                    block.large_kernel.lkb_reparam = Large(block.large_kernel.lkb_reparam, "relu")
        for point, last in parts.transitions:
            point.conv, last.conv = Pointwise(point.conv, "relu"), Small(last.conv)
        self.model = parts

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return logits [N, classes], or one feature map per `out_indices`.

        Args:
            images: [N, 3, H, W] in the type of the weights, or pixels [N, H, W, 3] uint8.
        """
        model: Any = self.model
        x: Any = images
        for layer in model.stem:
            x = layer.conv(x)
        found = []
        for index, stage in enumerate(model.stages):
            for block in stage.blocks:
                x = _mixed(block, x) if isinstance(block, RepLKBlock) else _fed(block, x)
            if index in model.geometry.out_indices:
                found.append(stage.norm(x.view.contiguous()))
            for layer in model.transitions[index] if index < len(model.transitions) else ():
                x = layer.conv(x)
        if model.head is None:
            return tuple(found)
        pooled = x.data[:, : x.columns].view(len(x.data), x.images, -1).mean(2)
        return (model.head(pooled.T),)


def _mixed(block: Any, x: Maps) -> Maps:
    inside = block.large_kernel.lkb_reparam(block.pw1.conv(x))
    return cast("Maps", block.pw2.conv(inside, x))


def _fed(block: Any, x: Maps) -> Maps:
    return cast("Maps", block.pw2.conv(block.pw1.conv(x), x))
