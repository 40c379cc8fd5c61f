"""Cut windows out of images that lie one after another in the memory of a device, and resize them there.

Shapes depend on the largest image alone, and the host reads no value, so a CUDA graph can record it.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

_PART_BYTES = 2**26  # of the largest image, once for each image of a part: it takes six times as much while it is cut


def cut_images(content: Tensor, windows: Tensor, most: list[int], size_hw: list[int], interpolation: str) -> Tensor:
    """Return windows of images, uint8 [B, C, H, W], resized with antialias along x, then along y, rounded after each.

    content: uint8 [N], pixel after pixel, and the bytes of a row of `most` behind them. windows: int64 [B, 5], the
    place of the first byte, the bytes of a row of the image, height, width, and whether it is mirrored. most: the
    largest height and width, and the channels. interpolation: bilinear or bicubic.
    Differs: torch's resize of bytes rounds the weights to other numbers.
    """
    part = max(1, _PART_BYTES // math.prod(most))
    if len(windows) > part:
        return torch.cat([cut_images(content, some, most, size_hw, interpolation) for some in windows.split(part)])
    most_height, most_width, channels = most
    place, stride, height, width, mirrored = windows.unbind(1)
    starts = place[:, None] + torch.outer(stride, torch.arange(most_height, device=content.device))
    rows = content.unfold(0, most_width * channels, 1)
    pixels = rows[starts.clamp(max=len(rows) - 1)].unflatten(2, (most_width, channels))  # rows below a window weigh 0
    across = _weights(most_width, size_hw[1], interpolation, content.device)[width - 1]
    across = torch.where(mirrored[:, None, None] > 0, across.flip(2), across)
    down = _weights(most_height, size_hw[0], interpolation, content.device)[height - 1]
    images = pixels.mT.contiguous().float()
    images = torch.einsum("bhcw,bwx->bhcx", images, across.float()).round_().clamp_(0, 255)
    images = torch.einsum("bhcx,bhy->bcyx", images, down.float()).round_().clamp_(0, 255)
    return images.to(torch.uint8, memory_format=torch.channels_last)


@functools.cache
def _weights(most: int, size: int, interpolation: str, device: torch.device) -> Tensor:
    """Return the share of each pixel of a line in each resized pixel, float16 [most, most, size], by length from 1."""
    pixels = torch.eye(most, device=device)[None, :, None]
    table = torch.empty(most, most, 1, size, dtype=torch.float16, device=device)
    for last in range(most):
        table[last] = F.interpolate(pixels[..., : last + 1], (1, size), mode=interpolation, antialias=True)[0]
    return table.squeeze(2)
