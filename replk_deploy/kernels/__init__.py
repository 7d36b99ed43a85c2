"""Our CUDA kernels, compiled at first use: large depthwise convolutions, and the layers of a channel-major network."""

from replk_deploy.kernels.op import LargeDepthwiseConv2d, large_depthwise_conv2d

__all__ = ["LargeDepthwiseConv2d", "large_depthwise_conv2d"]
