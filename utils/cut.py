"""Cut windows out of images that lie one after another in the memory of a device, and resize them there."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def cut_images(content: Tensor, windows: Iterable[Sequence[int]], size_hw: list[int], interpolation: str) -> Tensor:
    """Return windows of images, uint8 [B, C, H, W], resized with antialias along x, then along y, rounded after each.

    content: uint8 [N], pixel after pixel. windows: the place of the first byte, the bytes of a row of the image, the
    channels, height and width of the window, and whether it is mirrored. interpolation: bilinear or bicubic.
    Differs: torch's resize of bytes rounds the weights, too.
    """
    images = []
    for place, stride, channels, height, width, mirrored in windows:
        image = content.as_strided((1, channels, height, width), (0, 1, stride, channels), place).float()
        for size in ((height, size_hw[1]), size_hw):
            image = F.interpolate(image, size, mode=interpolation, antialias=True).round_().clamp_(0, 255)
        images.append(image.flip(-1) if mirrored else image)
    return torch.cat(images).byte()
