"""Measure how well images are reconstructed."""

import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW_PX = 11
_WINDOW_STD = 1.5


def measure_psnr(images: Tensor, decoded: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of images in [0, 1], [B]; at most 100."""
    return -10 * (decoded - images).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def measure_ssim(images: Tensor, decoded: Tensor) -> Tensor:
    """Return the structural similarity of images in [0, 1], [B]; the window fits into smaller images.

    Always in float32: differences of squares are small.
    Source: Wang et al. 2004, IEEE TIP 13(4), section III.B: a Gaussian of 11 px and 1.5 px, K1 0.01 and K2 0.03.
    """
    size = min(_WINDOW_PX, *images.shape[-2:])
    offsets = torch.arange(size, device=images.device) - (size - 1) / 2
    weights = torch.softmax(-offsets.square() / (2 * _WINDOW_STD**2), dim=0)
    window = torch.outer(weights, weights).expand(images.shape[1], 1, size, size)
    moments = torch.cat([images, decoded, images * decoded, images.square() + decoded.square()])
    first, second, product, squares = F.conv2d(moments, window, groups=len(window)).chunk(4)
    both = first * second
    apart = first.square() + second.square()
    near = (2 * both + 0.01**2) / (apart + 0.01**2)
    return (near * (2 * (product - both) + 0.03**2) / (squares - apart + 0.03**2)).mean(dim=(1, 2, 3))
