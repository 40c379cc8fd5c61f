"""How well images are reconstructed, and the statistics of latents."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.ranks import distributed

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

    def blur(values: Tensor) -> Tensor:
        window = torch.outer(weights, weights).expand(values.shape[1], 1, size, size)
        return F.conv2d(values, window, groups=values.shape[1])

    first = blur(images)
    second = blur(decoded)
    spread = blur(images.square()) - first.square(), blur(decoded.square()) - second.square()
    shared = blur(images * decoded) - first * second
    near = (2 * first * second + 0.01**2) / (first.square() + second.square() + 0.01**2)
    return (near * (2 * shared + 0.03**2) / (spread[0] + spread[1] + 0.03**2)).mean(dim=(1, 2, 3))


class ChannelStatistics:
    """Mean, standard deviation and correlation of the channels of maps, from float64 sums over all ranks."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # [1 + C, 1 + C]: the sums of (1, x) (1, x)^T over all sites

    def add(self, maps: Tensor, valid: Tensor) -> None:
        """Add the maps [B, C, h, w] of the samples that are valid, [B] bool."""
        sites = maps.double().transpose(0, 1).flatten(2)
        kept = valid.double()[:, None].expand(sites.shape[1:])
        rows = torch.cat([kept[None], torch.where(valid[:, None], sites, 0.0)]).flatten(1)
        self._sums = rows @ rows.T if self._sums is None else self._sums + rows @ rows.T

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each channel: `mean`, `std` and `correlation_0` and so on."""
        sums = distributed.all_reduce_sum(self._sums).cpu()
        means = sums / sums[0, 0]
        covariance = means[1:, 1:] - torch.outer(means[0, 1:], means[0, 1:])
        stds = covariance.diagonal().clamp_min(0).sqrt()
        correlation = covariance / torch.outer(stds, stds).clamp_min(1e-300)
        rows = []
        for channel, (mean, std) in enumerate(zip(means[0, 1:].tolist(), stds.tolist())):
            others = {f"correlation_{other}": value for other, value in enumerate(correlation[channel].tolist())}
            rows.append({"channel": channel, "mean": mean, "std": std, **others})
        return rows
