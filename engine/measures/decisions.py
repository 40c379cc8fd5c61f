"""Decisions at each of 100 thresholds of probability: what curves of precision, recall and reliability are drawn from.

A tagger decides on each tag of each image. A classifier decides on the first class of each image, or says nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.ranks import distributed

LEVELS = np.arange(100) / 100


def decision_rows(
    group: str, thresholds: np.ndarray, predicted: np.ndarray, correct: np.ndarray, positives: int
) -> Sequence[dict[str, Any]]:
    """Return a row for each threshold: decisions of at least this probability, and the correct ones, [100] each."""
    columns = zip(thresholds.round(4).tolist(), predicted.tolist(), correct.tolist())
    names = ("group", "threshold", "predicted", "correct", "positives")
    return [dict(zip(names, (group, *values, positives))) for values in columns]


class FirstClasses:
    """Count first classes by their probability, over batches and ranks."""

    def __init__(self) -> None:
        self._codes: list[Tensor] = []

    def add(self, prob: Tensor, is_correct: Tensor, valid: Tensor) -> None:
        """Add a batch: prob [B], is_correct, valid [B] bool."""
        level = (prob * len(LEVELS)).long().clamp(0, len(LEVELS) - 1)
        self._codes.append(torch.where(valid, 2 * level + is_correct, -1))

    def rows(self) -> Sequence[dict[str, Any]]:
        """Return the rows of all ranks."""
        codes = torch.cat(self._codes).cpu().numpy()
        counts = sum(distributed.gather_objects(np.bincount(codes[codes >= 0], minlength=2 * len(LEVELS))))
        wrong, correct = counts.reshape(-1, 2)[::-1].cumsum(axis=0)[::-1].T
        return decision_rows("all", LEVELS, wrong + correct, correct, int(counts.sum()))
