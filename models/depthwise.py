"""A depthwise convolution with a backward pass that is fast on CPUs too.

On a CPU, torch is slow at the weight gradient of a depthwise 7x7: with it, a training step of a ConvNeXt V2 takes 1.1
to 1.9 times as long (torch 2.14). That gradient can be computed as a depthwise convolution: each channel of each sample
is a separate channel, and the output's gradient is the kernel. The input's gradient is a convolution with the flipped
kernel. Both then run at the speed of the forward pass. GPUs use torch's own gradients.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def depthwise_weight_grad(x: Tensor, grad: Tensor, kernel: int) -> Tensor:
    """Return the weight gradient of a depthwise convolution with stride 1 and padding kernel // 2.

    x: [B, C, H, W], the convolution's input; grad: [B, C, H, W], the gradient of its output. Returns float32 or wider
    [C, 1, k, k]: the terms of samples have the dtype of `x` and are summed in float32.
    """
    batch, channels, height, width = x.shape
    halo = kernel // 2
    # Each channel of each sample, with its halo, is a channel: [1, B * C, H, W], in the channels_last memory format.
    rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, halo, halo, halo, halo)).permute(1, 2, 0, 3).flatten(2)
    shares = F.conv2d(rows[None].permute(0, 3, 1, 2), grad.reshape(-1, 1, height, width), groups=batch * channels)
    wide = torch.promote_types(x.dtype, torch.float32)
    return shares.view(batch, channels, 1, kernel, kernel).sum(dim=0, dtype=wide)


class _DepthwiseOnCPU(torch.autograd.Function):
    """F.conv2d(x, weight, bias, padding=k // 2, groups=C), with a backward pass of depthwise convolutions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        kernel = weight.shape[-1]
        channels = weight.shape[0]
        grad = grad.contiguous(memory_format=torch.channels_last)
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = F.conv2d(grad, weight.flip(2, 3), padding=kernel // 2, groups=channels)
        if ctx.needs_input_grad[1]:
            by_weight = depthwise_weight_grad(x, grad, kernel).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            wide = torch.promote_types(grad.dtype, torch.float32)
            by_bias = grad.sum(dim=(0, 2, 3), dtype=wide).to(weight.dtype)
        return by_x, by_weight, by_bias


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise 7x7 convolution with stride 1 and an output of the input's size."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, kernel_size=7, padding=3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H, W], on a CPU in the channels_last memory format, which is fastest there."""
        if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.onnx.is_in_onnx_export():
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        return _DepthwiseOnCPU.apply(x, self.weight.to(dtype), self.bias.to(dtype))
