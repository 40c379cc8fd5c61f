"""The base of classifiers and taggers, which mix their batches."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from data.augment.mixing import Mixing
from engine.tasks.kind import ImageTask, Setup
from utils.contracts import Batch


class MixingTask(ImageTask):
    """A task that mixes its batches. names: of its outputs.

    `views(batch)` returns images for the network, and labels [B] or targets [B, K]. In training, both may be mixed.
    """

    def __init__(self, setup: Setup, names: Sequence[str]) -> None:
        super().__init__(setup, outputs=len(names))
        self.names = list(names)
        self.mixing = Mixing(setup.task)

    def show_inputs(self, batch: Batch) -> tuple[Tensor, list[str]]:
        """Return the images of `views`, and the names of each one's targets, without unknown ones."""
        images, targets = self.views(batch)
        targets = F.one_hot(targets, len(self.names)) if targets.dim() == 1 else targets
        texts = [", ".join(self.names[index] for index in torch.nonzero(row > 0)[:, 0]) for row in targets]
        return self.normalise.undo(images), texts
