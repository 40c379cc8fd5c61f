"""Class labels as a field of samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data.loader import Example


class LabelFields:
    """Add a sample's class index, int64 []. class_ids: [N] of the collection's rows, -1 for none."""

    def __init__(self, class_ids: Sequence[int]) -> None:
        self._class_ids = torch.as_tensor(class_ids, dtype=torch.int64)

    def __call__(self, example: Example) -> dict[str, Tensor]:
        """Return the label."""
        return {"labels": self._class_ids[example.draw.index]}
