"""The confusion matrix of a classifier: exact counts over all ranks, and the scores that follow from them.

Only pairs that occur are stored, so 22,000 classes need no more memory than their samples.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.ranks import distributed


@dataclass(frozen=True)
class Confusion:
    """Counts of (label, prediction) pairs, int64 [P] each, ascending by label, then prediction; each pair once."""

    num_classes: int
    labels: np.ndarray
    predictions: np.ndarray
    counts: np.ndarray

    def _per_class(self, chosen: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return np.bincount(classes[chosen], self.counts[chosen], self.num_classes).astype(np.int64)

    @cached_property
    def samples(self) -> np.ndarray:
        """How many samples each class has, [K]."""
        return self._per_class(self.labels >= 0, self.labels)

    @cached_property
    def predicted(self) -> np.ndarray:
        """How often each class was predicted, [K]."""
        return self._per_class(self.labels >= 0, self.predictions)

    @cached_property
    def correct(self) -> np.ndarray:
        """How many of each class's samples were predicted as it, [K]."""
        return self._per_class(self.labels == self.predictions, self.labels)

    @cached_property
    def mistakes(self) -> list[tuple[int, int, int]]:
        """(label, prediction, count) of the wrong pairs: the most frequent first, then by class."""
        wrong = np.flatnonzero(self.labels != self.predictions)
        wrong = wrong[np.argsort(-self.counts[wrong], kind="stable")]
        return list(zip(*(column[wrong].tolist() for column in (self.labels, self.predictions, self.counts))))

    def macro_scalars(self) -> dict[str, float]:
        """Return the means over the classes that have samples: of accuracy and of F1."""
        held = np.flatnonzero(self.samples)
        samples, predicted, correct = self.samples[held], self.predicted[held], self.correct[held]
        return {
            "mean_class_accuracy": float((correct / samples).mean()),
            "macro_f1": float((2 * correct / (samples + predicted)).mean()),
        }

    def class_rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return a row for each class; None where a score would divide by zero or there is no confusion."""
        worst: dict[int, tuple[str | None, int | None]] = {}
        for label, prediction, count in self.mistakes:
            worst.setdefault(label, (names[prediction], count))
        rows = []
        columns = (self.samples.tolist(), self.predicted.tolist(), self.correct.tolist())
        for number, (samples, predicted, correct) in enumerate(zip(*columns)):
            confused_with, times = worst.get(number, (None, None))
            rows.append(
                {
                    "class": names[number],
                    "samples": samples,
                    "predicted": predicted,
                    "correct": correct,
                    "recall": correct / samples if samples else None,
                    "precision": correct / predicted if predicted else None,
                    "f1": 2 * correct / (samples + predicted) if samples else None,
                    "confused_with": confused_with,
                    "confused_count": times,
                }
            )
        return rows

    def pair_rows(self, names: Sequence[str], most: int) -> list[dict[str, Any]]:
        """Return a row for each of the most frequent wrong pairs."""
        return [
            {"true": names[label], "predicted": names[prediction], "count": count, "share": count / of}
            for label, prediction, count in self.mistakes[:most]
            if (of := int(self.samples[label]))
        ]

    def matrix(self, classes: Sequence[int]) -> np.ndarray:
        """Return the counts among some classes, int64 [N, N], row true, column predicted, in their order."""
        place = np.full(self.num_classes, -1)
        place[list(classes)] = np.arange(len(classes))
        inside = (place[self.labels] >= 0) & (place[self.predictions] >= 0)
        counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
        counts[place[self.labels[inside]], place[self.predictions[inside]]] = self.counts[inside]
        return counts

    def most_confused(self, most: int) -> list[int]:
        """Return at most `most` classes, those of the pairs that are confused most often, pair by pair.

        Confusions of two classes count in both directions; ties go to the lower class. Without any confusion these are
        the first classes that have samples.
        """
        links: Counter[tuple[int, int]] = Counter()
        for label, prediction, count in self.mistakes:
            links[min(label, prediction), max(label, prediction)] += count
        ranked = sorted(links, key=lambda pair: (-links[pair], pair))
        return list(dict.fromkeys(chain(*ranked)))[:most] or np.flatnonzero(self.samples)[:most].tolist()


class ConfusionCounts:
    """Count (label, prediction) pairs over batches and ranks."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._codes: list[Tensor] = []

    def add(self, labels: Tensor, predictions: Tensor, valid: Tensor) -> None:
        """Take a batch: labels, predictions [B] int64, and valid [B] bool."""
        self._codes.append(torch.where(valid, labels * self.num_classes + predictions, -1))

    def reduce(self) -> Confusion:
        """Return the counts of all ranks."""
        own, counts = np.unique(torch.cat(self._codes).cpu().numpy(), return_counts=True)
        gathered = distributed.gather_objects((own[own >= 0], counts[own >= 0]))
        codes = np.concatenate([codes for codes, _ in gathered])
        unique, inverse = np.unique(codes, return_inverse=True)
        totals = np.bincount(inverse, np.concatenate([counts for _, counts in gathered])).astype(np.int64)
        return Confusion(self.num_classes, unique // self.num_classes, unique % self.num_classes, totals)
