"""The samples with the highest scores, for pictures of an evaluation."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils.ranks import distributed


class TopSamples:
    """Keep the samples of the highest score, over batches and then over ranks; ties go to the lower sample_id."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: dict[str, Tensor] = {}

    def add(self, score: Tensor, eligible: Tensor, fields: dict[str, Tensor]) -> None:
        """Take a batch: score [B], eligible [B] bool, and the fields to keep of each sample; one is sample_id [B]."""
        order = _rank_samples(score, eligible, fields["sample_id"])[: self._size]
        batch = {name: tensor[order] for name, tensor in {**fields, "score": score, "eligible": eligible}.items()}
        if self._kept:
            batch = {name: torch.cat(_of_one_shape([self._kept[name], tensor])) for name, tensor in batch.items()}
            order = _rank_samples(batch["score"], batch["eligible"], batch["sample_id"])[: self._size]
            batch = {name: tensor[order] for name, tensor in batch.items()}
        self._kept = batch

    def reduce(self) -> dict[str, np.ndarray]:
        """Return the fields of the best samples of all ranks, best first.

        Scores are gathered first, and images only of the samples that they select.
        """
        own = {name: tensor.cpu() for name, tensor in self._kept.items()}
        marks = [own.pop(name) for name in ("score", "eligible")]
        scores = distributed.gather_objects((*(mark.numpy() for mark in marks), own["sample_id"].numpy()))
        score, eligible, ids = (torch.from_numpy(np.concatenate(column)) for column in zip(*scores))
        chosen = _rank_samples(score, eligible, ids)[: self._size]
        chosen = ids[chosen[eligible[chosen]]]
        mine = torch.isin(own["sample_id"], chosen) & marks[1]
        parts = distributed.gather_objects({name: tensor[mine].numpy() for name, tensor in own.items()})
        every = {
            name: torch.cat(_of_one_shape([torch.from_numpy(part[name]) for part in parts])).numpy() for name in own
        }
        place = {number: index for index, number in enumerate(every["sample_id"].tolist())}
        order = [place[number] for number in chosen.tolist()]
        return {name: values[order] for name, values in every.items()}


def _of_one_shape(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return parts that can be joined: images of bytes [B, C, H, W] get white edges at the right and bottom."""
    if len({part.shape[1:] for part in parts}) == 1:
        return parts
    height, width = (max(part.shape[axis] for part in parts) for axis in (-2, -1))
    return [F.pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2]), value=255) for part in parts]


def _rank_samples(score: Tensor, eligible: Tensor, sample_id: Tensor) -> Tensor:
    """Return the order of samples [B]: eligible ones first, by score from the top, then by id."""
    order = sample_id.argsort(stable=True)
    order = order[score[order].argsort(descending=True, stable=True)]
    return order[eligible[order].to(torch.uint8).argsort(descending=True, stable=True)]
