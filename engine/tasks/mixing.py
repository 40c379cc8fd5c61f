"""Mixup and cutmix as in timm and the published recipes: one random draw for the whole micro-batch.

Source: mixup, Zhang et al. 2017 (arXiv 1710.09412); cutmix, Yun et al. 2019 (arXiv 1905.04899);
huggingface/pytorch-image-models:timm/data/mixup.py, mode `batch`.
Differs: a sample whose partner could not be read is not mixed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.tasks.config import MixingConfig
from engine.tasks.kind import ImageTask, Setup
from utils.contracts import Batch


class Mixing(nn.Module):
    """In training, mix a batch with itself in reverse order."""

    def __init__(self, config: MixingConfig) -> None:
        super().__init__()
        self._mixup = config.mixup_alpha
        self._cutmix = config.cutmix_alpha
        self._probability = config.mix_probability
        is_on = config.mixup_alpha > 0, config.cutmix_alpha > 0
        self._cuts = is_on[1] / max(1, sum(is_on))  # the share of cutmix: half, as published, if both are on

    @property
    def is_on(self) -> bool:
        """Whether batches are mixed now."""
        return self.training and self._probability > 0 and (self._mixup > 0 or self._cutmix > 0)

    @torch.compiler.disable
    def forward(self, images: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images [B, C, H, W] and targets [B, K]. `Learner.update` has seeded the random draws.

        images: float [B, C, H, W]; targets: float [B, K]; weight: [B], 0 where an image could not be read.
        """
        if not self.is_on:
            return images, targets
        share, box = self.draw(*images.shape[-2:], images.device)
        partners = images.flip(0)
        mixed = images if self._mixup == 0 else torch.lerp(partners, images, torch.where(box.any(), 1.0, share))
        if self._cutmix > 0:
            mixed = torch.where(box, partners, mixed)
        has_partner = weight.flip(0) > 0
        # The mixed images first: torch.where uses the memory format of its first argument.
        return (
            torch.where(has_partner.view(-1, 1, 1, 1), mixed, images),
            torch.where(has_partner[:, None], torch.lerp(targets.flip(0), targets, share), targets),
        )

    def draw(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw lambda (the sample's own share), [], and the pixels that the partner replaces, bool [H, W].

        The box has about 1 - lambda of the area and is clipped to the image; it is empty for mixup. Lambda is 1 if the
        batch is not mixed. The device draws all numbers: a CUDA graph can repeat the draws, and the host never waits.
        """
        mixes, cuts, y, x = torch.rand(4, device=device)
        mixes = mixes < self._probability
        cuts = mixes & (cuts < self._cuts)
        alpha = torch.where(cuts, self._cutmix or self._mixup, self._mixup or self._cutmix)
        share = torch.distributions.Beta(alpha, alpha, validate_args=False).sample().where(mixes, 1.0)
        ratio = torch.where(cuts, (1.0 - share).sqrt(), 0.0)
        box = _box_side(y, height, ratio)[:, None] & _box_side(x, width, ratio)
        return torch.where(cuts, 1.0 - box.sum() / (height * width), share), box


class MixingTask(ImageTask):
    """A task that mixes its batches. names: the names of the outputs.

    `views(batch)` returns images for the network, and labels [B] or targets [B, K]. In training, both may be mixed.
    """

    def __init__(self, setup: Setup, names: Sequence[str]) -> None:
        super().__init__(setup, outputs=len(names))
        self.names = list(names)
        self.mixing = Mixing(setup.task)

    def show_inputs(self, batch: Batch) -> tuple[Tensor, list[str]]:
        """Return the images of `views`, and the names of their known targets."""
        images, targets = self.views(batch)
        targets = F.one_hot(targets, len(self.names)) if targets.dim() == 1 else targets
        texts = [", ".join(self.names[index] for index in torch.nonzero(row > 0)[:, 0]) for row in targets]
        return self.normalise.undo(images), texts


def _box_side(place: Tensor, size: int, ratio: Tensor) -> Tensor:
    """Return which of `size` pixels a box covers, bool [size]; its centre is at `place` (0 to 1)."""
    pixels = torch.arange(size, device=ratio.device)
    centre = (place * size).long()
    half = (size * ratio).long() // 2
    return (pixels >= centre - half) & (pixels < centre + half)
