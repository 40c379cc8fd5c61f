"""Mixup and cutmix as in timm and the published recipes: one random draw for the whole micro-batch.

Source: mixup, Zhang et al. 2017 (arXiv 1710.09412); cutmix, Yun et al. 2019 (arXiv 1905.04899);
huggingface/pytorch-image-models:timm/data/mixup.py, mode `batch`.
Differs: a sample whose partner could not be read is not mixed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.tasks.kind import TaskConfig
from utils.config.bounds import Alpha, Fraction


class MixingConfig(TaskConfig):
    """The keys of a task that mixes its batches. Each alpha is a parameter of lambda's beta distribution; 0: off."""

    mixup_alpha: Alpha
    cutmix_alpha: Alpha
    mix_probability: Fraction  # of mixing a batch
    mix_switch_probability: Fraction  # of cutmix, if both are on


def name_targets(targets: Tensor, names: Sequence[str]) -> list[str]:
    """Return the names of each sample's targets [B, K]; a part of one with its share, an unknown one with `?`."""
    found = [[(names[index], row[index].item()) for index in row.nonzero()[:, 0]] for row in targets]
    return [", ".join(f"{n} {f'{p:.0%}' if p == p else '?'}" if p != 1 else n for n, p in row) for row in found]


class Mixing(nn.Module):
    """In training, mix a batch with itself in reverse order."""

    def __init__(self, config: MixingConfig) -> None:
        super().__init__()
        self.enter_phase(config)

    def enter_phase(self, config: MixingConfig) -> None:
        """Take over the settings of a phase."""
        self._mixup, self._cutmix = config.mixup_alpha, config.cutmix_alpha
        self._probability, self._switch = config.mix_probability, config.mix_switch_probability

    @property
    def is_on(self) -> bool:
        """Whether batches are mixed now."""
        return self.training and self._probability > 0 and (self._mixup > 0 or self._cutmix > 0)

    @torch.compiler.disable
    def forward(self, images: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images [B, C, H, W] and targets [B, K]. `Learner.update` has seeded the random draws.

        images: float [B, C, H, W]; targets: float [B, K]; weight: [B], 0 where an image could not be read.
        """
        mix = self.draw(*images.shape[-2:]) if self.is_on else None
        if mix is None:
            return images, targets
        share, box = mix
        if box is None:
            mixed = torch.lerp(images.flip(0), images, share)
        else:
            top, bottom, left, right = box
            mixed = images.clone(memory_format=torch.preserve_format)
            mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
        has_partner = weight.flip(0) > 0
        # The mixed images first: torch.where uses the memory format of its first argument.
        return (
            torch.where(has_partner.view(-1, 1, 1, 1), mixed, images),
            torch.where(has_partner[:, None], torch.lerp(targets.flip(0), targets, share), targets),
        )

    def draw(self, height: int, width: int) -> tuple[float, tuple[int, int, int, int] | None] | None:
        """Draw lambda (the sample's own share) and the partner's box from torch's CPU generator; None: do not mix.

        The box (top, bottom, left, right) has about 1 - lambda of the area and is clipped to the image. It is None for
        mixup.
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
