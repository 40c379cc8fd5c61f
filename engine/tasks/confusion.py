"""What a classifier took for what: exact counts over all ranks, and the figures that follow from them.

Only pairs that occur are held, so 22,000 classes cost no more than their samples. Nothing here waits for a device
before `gather_confusion` and `TopSamples.gather`, which every rank calls once, at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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

    def _per_class(self, classes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        totals = np.zeros(self.num_classes, dtype=np.int64)
        np.add.at(totals, classes, counts)
        return totals

    @property
    def samples(self) -> np.ndarray:
        """Return how many samples each class has, [K]."""
        return self._per_class(self.labels, self.counts)

    @property
    def predicted(self) -> np.ndarray:
        """Return how often each class was predicted, [K]."""
        return self._per_class(self.predictions, self.counts)

    @property
    def correct(self) -> np.ndarray:
        """Return how many of each class's samples were predicted as it, [K]."""
        right = self.labels == self.predictions
        return self._per_class(self.labels[right], self.counts[right])

    def mistakes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return labels, predictions and counts of the wrong pairs: the most frequent first, then by class."""
        wrong = np.flatnonzero(self.labels != self.predictions)
        wrong = wrong[np.argsort(-self.counts[wrong], kind="stable")]
        return self.labels[wrong], self.predictions[wrong], self.counts[wrong]

    def macro_scalars(self) -> dict[str, float]:
        """Return the means over the classes that have samples: of accuracy and of F1."""
        held = np.flatnonzero(self.samples)
        samples, predicted, correct = self.samples[held], self.predicted[held], self.correct[held]
        return {
            "mean_class_accuracy": float((correct / samples).mean()),
            "macro_f1": float((2 * correct / (samples + predicted)).mean()),
        }

    def class_rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return a row for each class; None where a figure would divide by zero or there is no confusion."""
        worst: dict[int, tuple[int, int]] = {}
        for label, prediction, count in zip(*(column.tolist() for column in self.mistakes())):
            worst.setdefault(label, (prediction, count))
        rows = []
        for number, (samples, predicted, correct) in enumerate(
            zip(self.samples.tolist(), self.predicted.tolist(), self.correct.tolist())
        ):
            taken_for, times = worst.get(number, (None, None))
            rows.append(
                {
                    "class": names[number],
                    "samples": samples,
                    "predicted": predicted,
                    "correct": correct,
                    "recall": correct / samples if samples else None,
                    "precision": correct / predicted if predicted else None,
                    "f1": 2 * correct / (samples + predicted) if samples else None,
                    "confused_with": None if taken_for is None else names[taken_for],
                    "confused_count": times,
                }
            )
        return rows

    def pair_rows(self, names: Sequence[str], most: int) -> list[dict[str, Any]]:
        """Return a row for each of the most frequent wrong pairs."""
        samples = self.samples
        return [
            {"true": names[label], "predicted": names[prediction], "count": count, "share": count / int(samples[label])}
            for label, prediction, count in zip(*(column[:most].tolist() for column in self.mistakes()))
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
        """Return at most so many classes, those of the most frequent confusions, so that partners are neighbours.

        A confusion of two classes counts both ways round; ties go to the lower class. Where nothing was confused, the
        first classes that have samples.
        """
        links: dict[tuple[int, int], int] = {}
        for label, prediction, count in zip(*(column.tolist() for column in self.mistakes())):
            pair = (min(label, prediction), max(label, prediction))
            links[pair] = links.get(pair, 0) + count
        ranked = sorted(links, key=lambda pair: (-links[pair], pair))
        chosen: dict[int, list[int]] = {}
        for first, second in ranked:
            if len(chosen.keys() | {first, second}) > most:
                continue
            chosen.setdefault(first, []).append(second)
            chosen.setdefault(second, []).append(first)
        order: dict[int, None] = {}

        def place(number: int) -> None:
            order[number] = None
            for partner in chosen[number]:
                if partner not in order:
                    place(partner)

        for number in chosen:
            if number not in order:
                place(number)
        return list(order) or np.flatnonzero(self.samples)[:most].tolist()


def gather_confusion(batches: Sequence[tuple[Tensor, Tensor, Tensor]], num_classes: int) -> Confusion:
    """Count the pairs of all ranks. batches: (labels [B], predictions [B], valid [B] bool) of this one."""
    codes = [torch.where(valid, labels * num_classes + predicted, -1) for labels, predicted, valid in batches]
    own, counts = np.unique(torch.cat(codes).cpu().numpy(), return_counts=True)
    gathered = distributed.gather_objects((own[own >= 0], counts[own >= 0]))
    every = np.concatenate([codes for codes, _ in gathered])
    unique, inverse = np.unique(every, return_inverse=True)
    totals = np.zeros(len(unique), dtype=np.int64)
    np.add.at(totals, inverse, np.concatenate([counts for _, counts in gathered]))
    return Confusion(num_classes, unique // num_classes, unique % num_classes, totals)


class TopSamples:
    """Keep the samples of the highest score, over batches and then over ranks; ties go to the lower sample_id."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: dict[str, Tensor] = {}

    def add(self, score: Tensor, eligible: Tensor, fields: dict[str, Tensor]) -> None:
        """Take a batch: score [B], eligible [B] bool, and what to keep of each sample, sample_id [B] among it."""
        order = _rank_samples(score, eligible, fields["sample_id"])[: self._size]
        batch = {name: tensor[order] for name, tensor in {**fields, "score": score, "eligible": eligible}.items()}
        if self._kept:
            batch = {name: torch.cat([self._kept[name], tensor]) for name, tensor in batch.items()}
            order = _rank_samples(batch["score"], batch["eligible"], batch["sample_id"])[: self._size]
            batch = {name: tensor[order] for name, tensor in batch.items()}
        self._kept = batch

    def gather(self) -> dict[str, np.ndarray]:
        """Return the kept samples' fields, best first, on every rank.

        Only the scores travel at first; images go round once it is known which are chosen.
        """
        own = {name: tensor.cpu() for name, tensor in self._kept.items()}
        marks = [own.pop(name) for name in ("score", "eligible")]
        scores = distributed.gather_objects((*(mark.numpy() for mark in marks), own["sample_id"].numpy()))
        score, eligible, ids = (torch.from_numpy(np.concatenate(column)) for column in zip(*scores))
        chosen = _rank_samples(score, eligible, ids)[: self._size]
        chosen = ids[chosen[eligible[chosen]]]
        mine = torch.isin(own["sample_id"], chosen) & marks[1]
        parts = distributed.gather_objects({name: tensor[mine].numpy() for name, tensor in own.items()})
        every = {name: np.concatenate([part[name] for part in parts]) for name in own}
        place = {number: index for index, number in enumerate(every["sample_id"].tolist())}
        order = [place[number] for number in chosen.tolist()]
        return {name: values[order] for name, values in every.items()}


def _rank_samples(score: Tensor, eligible: Tensor, sample_id: Tensor) -> Tensor:
    """Return the order of samples [B]: eligible ones first, by score from the top, then by id."""
    order = sample_id.argsort(stable=True)
    order = order[score[order].argsort(descending=True, stable=True)]
    return order[eligible[order].to(torch.uint8).argsort(descending=True, stable=True)]
