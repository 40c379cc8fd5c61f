"""The samples with the highest scores, for pictures of an evaluation."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils.contracts import State, Tensors
from utils.ranks import distributed


class TopSamples:
    """Collect the samples with the highest scores over batches and ranks. On a tie, the lower sample_id wins."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept = {}

    def add(self, score: Tensor, eligible: Tensor, fields: Tensors) -> None:
        """Add a batch: score [B], eligible [B] bool, and fields of the samples, which include sample_id [B]."""
        best = self._best({**fields, "score": torch.where(eligible, score.double(), -torch.inf)})
        self._kept = self._best(_join([self._kept, best])) if self._kept else best

    def _best(self, samples: Tensors) -> State:
        order = samples["sample_id"].argsort(stable=True)
        order = order[samples["score"][order].argsort(descending=True, stable=True)][: self._size]
        return {name: tensor[order] for name, tensor in samples.items()}

    def reduce(self) -> dict[str, np.ndarray]:
        """Return the fields of the best samples of all ranks, best first."""
        parts = distributed.gather_objects({name: tensor.cpu() for name, tensor in self._kept.items()})
        best = self._best(_join(parts))
        eligible = best["score"] != -torch.inf
        return {name: tensor[eligible].numpy() for name, tensor in best.items()}


def _join(parts: Sequence[Tensors]) -> State:
    """Concatenate samples; images [B, C, H, W] of several sizes are padded with white at the right and bottom."""
    joined = {}
    for name in parts[0]:
        column = [part[name] for part in parts]
        if len({part.shape[1:] for part in column}) > 1:
            height, width = (max(part.shape[axis] for part in column) for axis in (-2, -1))
            column = [
                F.pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2]), value=255) for part in column
            ]
        joined[name] = torch.cat(column)
    return joined
