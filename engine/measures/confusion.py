"""The confusion matrix of a classifier, counted exactly over all ranks, and its scores.

The matrix is sparse, so 22,000 classes need no more memory than their samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array, triu
from torch import Tensor

from utils.io.files import Json
from utils.ranks import distributed
from utils.record.figures import BALANCED, ONE_CLASS


@dataclass(frozen=True)
class Confusion:
    """counts: int64 [K, K], sparse; a row is a label, a column a prediction."""

    counts: csr_array

    @cached_property
    def samples(self) -> np.ndarray:
        """The number of samples of each class, [K]."""
        return self.counts.sum(axis=1)

    @cached_property
    def predicted(self) -> np.ndarray:
        """The number of predictions of each class, [K]."""
        return self.counts.sum(axis=0)

    @cached_property
    def correct(self) -> np.ndarray:
        """The number of correct predictions of each class, [K]."""
        return self.counts.diagonal()

    @cached_property
    def mistakes(self) -> list[tuple[int, int, int]]:
        """Wrong pairs as (label, prediction, count), the most frequent first, then by class."""
        pairs = self.counts.tocoo()
        wrong = np.flatnonzero(pairs.row != pairs.col)
        wrong = wrong[np.argsort(-pairs.data[wrong], kind="stable")]
        return list(zip(*(column[wrong].tolist() for column in (pairs.row, pairs.col, pairs.data))))

    def macro_scalars(self) -> dict[str, float]:
        """Return the mean accuracy and mean F1 over the classes with samples, and the accuracy of one class always."""
        classes = np.flatnonzero(self.samples)
        samples = self.samples[classes]
        correct = self.correct[classes]
        return {
            BALANCED: float((correct / samples).mean()),
            "macro_f1": float((2 * correct / (samples + self.predicted[classes])).mean()),
            ONE_CLASS: float(samples.max() / samples.sum()),
        }

    def class_rows(self, names: Sequence[str]) -> list[Json]:
        """Return a row for each class, with None for scores that would divide by zero and for missing confusions."""
        worst = {label: (names[prediction], count) for label, prediction, count in reversed(self.mistakes)}
        rows = []
        columns = (column.tolist() for column in (self.samples, self.predicted, self.correct))
        for number, (name, samples, predicted, correct) in enumerate(zip(names, *columns)):
            row = {"class": name, "samples": samples, "predicted": predicted, "correct": correct}
            row["recall"] = correct / samples if samples else None
            row["precision"] = correct / predicted if predicted else None
            row["f1"] = 2 * correct / (samples + predicted) if samples else None
            row["confused_with"], row["confused_count"] = worst.get(number, (None, None))
            rows.append(row)
        return rows

    def pair_rows(self, names: Sequence[str], most: int) -> list[Json]:
        """Return a row for each of the `most` most frequent wrong pairs."""
        samples = self.samples.tolist()
        return [
            {"true": names[label], "predicted": names[prediction], "count": count, "share": count / samples[label]}
            for label, prediction, count in self.mistakes[:most]
        ]

    def most_confused(self, most: int) -> list[int]:
        """Return up to `most` classes of the most confused pairs, or the first ones with samples without confusions.

        Confusions count in both directions; ties go to the lower class.
        """
        pairs = triu(self.counts + self.counts.T, 1).tocoo()
        order = np.lexsort((pairs.col, pairs.row, -pairs.data))
        ranked = np.stack([pairs.row, pairs.col], axis=1)[order].ravel().tolist()
        return list(dict.fromkeys(ranked))[:most] or np.flatnonzero(self.samples)[:most].tolist()


class ConfusionCounts:
    """Count (label, prediction) pairs over batches and ranks."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._codes: list[Tensor] = []

    def add(self, labels: Tensor, predictions: Tensor, valid: Tensor) -> None:
        """Add a batch: labels, predictions [B] int64, and valid [B] bool."""
        self._codes.append(torch.where(valid, labels * self.num_classes + predictions, -1))

    def reduce(self) -> Confusion:
        """Return the counts of all ranks."""
        codes, counts = np.unique(torch.cat(self._codes).cpu().numpy(), return_counts=True)
        known = codes >= 0
        pairs = np.divmod(codes[known], self.num_classes)
        local = coo_array((counts[known], pairs), shape=(self.num_classes, self.num_classes)).tocsr()
        return Confusion(sum(distributed.gather_objects(local), start=csr_array(local.shape, dtype=np.int64)))
