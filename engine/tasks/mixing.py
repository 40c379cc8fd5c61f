"""Mixup and cutmix of a batch, as timm and the published recipes have them: one draw for the whole micro-batch.

Source: mixup, Zhang et al. 2017 (arXiv 1710.09412); cutmix, Yun et al. 2019 (arXiv 1905.04899);
huggingface/pytorch-image-models:timm/data/mixup.py, mode `batch`.
Differs: a sample whose partner could not be read is not mixed.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.tasks.kind import TaskConfig
from utils.config.bounds import Alpha, Fraction


@dataclass(frozen=True)
class Mixing:
    """How a batch is mixed with itself in reverse order.

    mixup_alpha, cutmix_alpha: parameters of the beta distribution of the share lambda, 0 for off. probability: that a
    batch is mixed. switch_probability: that it is cutmix, where both are on.
    """

    mixup_alpha: float
    cutmix_alpha: float
    probability: float
    switch_probability: float

    @property
    def is_on(self) -> bool:
        """Whether anything is ever mixed."""
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def draw(self, height: int, width: int) -> "_Draw | None":
        """Draw how a batch of images of this size is mixed, from torch's global CPU generator; None: not at all."""
        if torch.rand(()) >= self.probability:
            return None
        cuts = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or bool(torch.rand(()) < self.switch_probability))
        alpha = self.cutmix_alpha if cuts else self.mixup_alpha
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        if not cuts:
            return _Draw(share, None)
        top, bottom, left, right = box = _draw_box(height, width, share)
        return _Draw(1.0 - (bottom - top) * (right - left) / (height * width), box)

    @torch.compiler.disable
    def __call__(self, images: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images [B, C, H, W] and targets [B, K]; train_step has seeded the draws.

        images: float [B, C, H, W]; targets: float [B, K]; weight: [B], 0 where an image could not be read.
        """
        drawn = self.draw(*images.shape[-2:])
        if drawn is None:
            return images, targets
        if drawn.box is None:
            mixed = torch.lerp(images.flip(0), images, drawn.share)
        else:
            top, bottom, left, right = drawn.box
            mixed = images.clone(memory_format=torch.preserve_format)
            mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
        mixes = weight.flip(0) > 0
        # The mixed images first: torch.where takes the memory format of its first argument.
        return (
            torch.where(mixes.view(-1, 1, 1, 1), mixed, images),
            torch.where(mixes[:, None], torch.lerp(targets.flip(0), targets, drawn.share), targets),
        )


class MixingConfig(TaskConfig):
    """The keys of a task that mixes its batches, as `Mixing` explains them."""

    mixup_alpha: Alpha
    cutmix_alpha: Alpha
    mix_probability: Fraction
    mix_switch_probability: Fraction

    def mixing(self) -> Mixing:
        """Return what mixes a batch."""
        return Mixing(self.mixup_alpha, self.cutmix_alpha, self.mix_probability, self.mix_switch_probability)


class _Draw(NamedTuple):
    """The share of a sample itself, and the rectangle (top, bottom, left, right) that is its partner's, or None."""

    share: float
    box: tuple[int, int, int, int] | None


def _draw_box(height: int, width: int, share: float) -> tuple[int, int, int, int]:
    """Draw the rectangle that comes from the partner: about 1 - share of the area, cut off at the image's sides."""
    ratio = math.sqrt(1.0 - share)
    half_height, half_width = int(height * ratio) // 2, int(width * ratio) // 2
    y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    return max(y - half_height, 0), min(y + half_height, height), max(x - half_width, 0), min(x + half_width, width)
