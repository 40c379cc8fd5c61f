"""Mixup and cutmix of a batch, as timm and the published recipes have them: one draw for the whole micro-batch.

Source: mixup, Zhang et al. 2017 (arXiv 1710.09412); cutmix, Yun et al. 2019 (arXiv 1905.04899);
huggingface/pytorch-image-models:timm/data/mixup.py, mode `batch`.
Differs: a sample whose partner could not be read is not mixed.
"""

import math

import torch
from torch import Tensor, nn

from engine.tasks.kind import TaskConfig
from utils.config.bounds import Alpha, Fraction


class MixingConfig(TaskConfig):
    """The keys of a task that mixes its batches.

    mixup_alpha, cutmix_alpha: parameters of the beta distribution of the share lambda, 0 for off. mix_probability: that
    a batch is mixed. mix_switch_probability: that it is cutmix, where both are on.
    """

    mixup_alpha: Alpha
    cutmix_alpha: Alpha
    mix_probability: Fraction
    mix_switch_probability: Fraction


class Mixing(nn.Module):
    """Mix a batch with itself in reverse order, in training."""

    def __init__(self, config: MixingConfig) -> None:
        super().__init__()
        self._mixup, self._cutmix = config.mixup_alpha, config.cutmix_alpha
        self._probability, self._switch = config.mix_probability, config.mix_switch_probability

    @property
    def is_on(self) -> bool:
        """Whether batches are mixed now."""
        return self.training and self._probability > 0 and (self._mixup > 0 or self._cutmix > 0)

    @torch.compiler.disable
    def forward(self, images: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images [B, C, H, W] and targets [B, K]; train_step has seeded the draws.

        images: float [B, C, H, W]; targets: float [B, K]; weight: [B], 0 where an image could not be read.
        """
        drawn = self.draw(*images.shape[-2:]) if self.is_on else None
        if drawn is None:
            return images, targets
        share, box = drawn
        if box is None:
            mixed = torch.lerp(images.flip(0), images, share)
        else:
            top, bottom, left, right = box
            mixed = images.clone(memory_format=torch.preserve_format)
            mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
        mixes = weight.flip(0) > 0
        # The mixed images first: torch.where takes the memory format of its first argument.
        return (
            torch.where(mixes.view(-1, 1, 1, 1), mixed, images),
            torch.where(mixes[:, None], torch.lerp(targets.flip(0), targets, share), targets),
        )

    def draw(self, height: int, width: int) -> tuple[float, tuple[int, int, int, int] | None] | None:
        """Draw, from torch's CPU generator, the share of a sample itself, and the box that is its partner's.

        The box (top, bottom, left, right) has about 1 - share of the area, and is cut off at the image's sides; None
        for mixup. None in place of both: this batch is not mixed.
        """
        if torch.rand(()) >= self._probability:
            return None
        cuts = self._cutmix > 0 and (self._mixup == 0 or bool(torch.rand(()) < self._switch))
        alpha = self._cutmix if cuts else self._mixup
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        if not cuts:
            return share, None
        ratio = math.sqrt(1.0 - share)
        half_height, half_width = int(height * ratio) // 2, int(width * ratio) // 2
        y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
        top, bottom = max(y - half_height, 0), min(y + half_height, height)
        left, right = max(x - half_width, 0), min(x + half_width, width)
        return 1.0 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)
