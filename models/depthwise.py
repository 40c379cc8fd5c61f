"""A depthwise convolution with a backward pass that is fast on CPUs too.

On a CPU, torch computes the weight gradient of a depthwise 7x7 ten to forty times slower than the convolution itself,
which was a quarter of a ConvNeXt V2's training step. That gradient can be computed as a depthwise convolution: each
channel of each sample is a separate channel, and the output's gradient is the kernel. The input's gradient is a
convolution with the flipped kernel. Both then run at the speed of the forward pass. GPUs use torch's own gradients.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A kernel with more sites per side is not fast, so larger maps are cut into tiles.
_TILE = 16


def _tiles(side: int) -> tuple[int, int]:
    """Return the number of tiles of a side, and the length of a tile."""
    count = -(-side // _TILE)
    return count, -(-side // count)


def depthwise_weight_grad(x: Tensor, grad: Tensor, kernel: int) -> Tensor:
    """Return the weight gradient of a depthwise convolution with stride 1 and padding kernel // 2.

    x: [B, C, H, W], the convolution's input; grad: [B, C, H, W], the gradient of its output. Returns float32 or wider
    [C, 1, k, k]: the terms of samples and tiles have the dtype of `x` and are summed in float32.
    """
    batch, channels, height, width = x.shape
    halo = kernel // 2
    (rows, tile_h), (columns, tile_w) = _tiles(height), _tiles(width)
    more_h, more_w = rows * tile_h - height, columns * tile_w - width
    x, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)  # channels last
    x = F.pad(x, (0, 0, halo, halo + more_w, halo, halo + more_h))
    grad = F.pad(grad, (0, 0, 0, more_w, 0, more_h))
    # Each channel of each tile of each sample, with its halo, is a channel: [1, B * tiles * C, tile + 2 halo, ...].
    x = x.unfold(1, tile_h + 2 * halo, tile_h).unfold(2, tile_w + 2 * halo, tile_w)  # [B, rows, columns, C, h, w]
    x = x.permute(4, 5, 0, 1, 2, 3).reshape(1, tile_h + 2 * halo, tile_w + 2 * halo, -1).permute(0, 3, 1, 2)
    grad = grad.reshape(batch, rows, tile_h, columns, tile_w, channels).permute(0, 1, 3, 5, 2, 4)
    grad = grad.reshape(-1, 1, tile_h, tile_w)
    shares = F.conv2d(x, grad, groups=grad.shape[0])  # [1, B * tiles * C, k, k]
    wide = torch.promote_types(x.dtype, torch.float32)
    return shares.reshape(-1, channels, 1, kernel, kernel).sum(dim=0, dtype=wide)


class _DepthwiseOnCPU(torch.autograd.Function):
    """F.conv2d(x, weight, bias, padding=k // 2, groups=C), with a backward pass of depthwise convolutions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        kernel, channels = weight.shape[-1], weight.shape[0]
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
    """A depthwise convolution with an odd square kernel, stride 1 and an output of the input's size."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        assert kernel_size % 2 == 1, kernel_size
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H, W], on a CPU in the channels_last memory format, which is fastest there."""
        if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.onnx.is_in_onnx_export():
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        return _DepthwiseOnCPU.apply(x.contiguous(memory_format=torch.channels_last), weight, bias)
