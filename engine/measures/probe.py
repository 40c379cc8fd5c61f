"""Probes of frozen features: k nearest neighbours, and a linear classifier.

Both are fitted to labelled training images and measured on labelled validation images, in float64 on the CPU of rank 0,
so the scores do not depend on the ranks. Nothing is drawn at random and no gradient is taken: a probe does not change
the run.

The linear classifier is ridge regression onto the classes. Its solution is closed, so there is no step size and no
number of iterations to set. One decomposition gives the leave-one-out predictions for every penalty, which choose the
penalty.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)

# Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4; facebookresearch/dino:eval_knn.py.
TEMPERATURE = 0.07
# Candidates of the ridge penalty, per training image; features have variance 1.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_ROWS = 1024  # validation images compared with all training images at once


class Features:
    """Collect the features and labels of labelled samples from all ranks."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, features: Tensor, labels: Tensor, sample_id: Tensor, weight: Tensor) -> None:
        """Take a batch: features [B, C]; labels, sample_id, weight [B]. All ranks add batches of the same sizes."""
        self._batches.append((features.float(), labels, sample_id, weight))

    def reduce(self) -> tuple[Tensor, Tensor]:
        """Return features [N, C] float64 and labels [N] of all readable samples, by sample_id, on the CPU."""
        gathered = (distributed.gather_rows(torch.cat(column)).cpu() for column in zip(*self._batches))
        features, labels, ids, weight = gathered
        order = torch.argsort(ids, stable=True)
        order = order[weight[order] > 0]  # without padding and unreadable images
        return features[order].double(), labels[order]


class Probe:
    """Score features of validation images by a kNN and a linear classifier fitted to those of training images."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.train, self.val = Features(), Features()

    def reduce(self) -> dict[str, float]:
        """Return `probe/knn` and `probe/linear`, the accuracies on `val`.

        A class without a training image counts as an error. Without a readable image in both sets, or with features
        that are not finite, it warns and returns nothing.
        """
        train, val = self.train.reduce(), self.val.reduce()
        return distributed.rank_zero_call(lambda: _score(*train, *val, self.k))


def _score(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, k: int) -> dict[str, float]:
    if len(train) == 0 or len(val) == 0:
        log.warning("probe: skipped, because no image of one of its two sets could be read")
        return {}
    if not (train.isfinite().all() and val.isfinite().all()):
        log.warning("probe: skipped, because the encoder's features are not finite")
        return {}
    mean, scale = standardise(train)
    train, val = (train - mean) / scale, (val - mean) / scale
    classes, targets = torch.unique(train_labels, return_inverse=True)
    weight, bias = fit_linear(train, F.one_hot(targets, len(classes)).double())
    predicted = {
        "probe/knn": knn_scores(train, targets, val, k, len(classes)).argmax(dim=1),
        "probe/linear": (val @ weight + bias).argmax(dim=1),
    }
    return {name: (classes[index] == val_labels).double().mean().item() for name, index in predicted.items()}


def standardise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation [C] of features [N, C]; infinity for a constant one, so that division makes it 0."""
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    # Rounding errors of a constant are no signal.
    return mean, torch.where(std > 1e-6 * mean.abs(), std, torch.inf)


def knn_scores(train: Tensor, targets: Tensor, val: Tensor, k: int, num_classes: int) -> Tensor:
    """Return the votes [M, K] for each class of the k nearest of `train` [N, C], or of all where there are fewer.

    Distance is by cosine; a neighbour votes for its class, targets [N], with weight exp(cosine / TEMPERATURE).
    """
    train = F.normalize(train, dim=1)
    scores = []
    for rows in val.split(_ROWS):
        nearest = (F.normalize(rows, dim=1) @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(rows), num_classes, dtype=train.dtype)
        scores.append(votes.scatter_add_(1, targets[nearest.indices], (nearest.values / TEMPERATURE).exp()))
    return torch.cat(scores)


class Ridge(NamedTuple):
    """A ridge regression: weight [C, K], bias [K], and the scores [N, K] of each sample by a fit without it."""

    weight: Tensor
    bias: Tensor
    left_out: Tensor


def fit_ridges(features: Tensor, targets: Tensor) -> Iterator[Ridge]:
    """Yield the ridge regression of one-hot targets [N, K] on centred features [N, C] for each of PENALTIES, times N.

    The bias has no penalty.
    Source: Golub, Heath, Wahba, "Generalized cross-validation as a method for choosing a good ridge parameter",
    Technometrics 1979, section 1 (the ordinary form, Allen's PRESS).
    """
    count, bias = len(features), targets.mean(dim=0)
    left, singular, right = torch.linalg.svd(features, full_matrices=False)
    projected = left.T @ (targets - bias)
    for penalty in PENALTIES:
        shrink = singular.square() / (singular.square() + penalty * count)
        # The weight of a sample in its own prediction, at most 1.
        leverage = left.square() @ shrink + 1 / count
        residual = targets - bias - left @ (shrink[:, None] * projected)
        error = residual / (1 - leverage).clamp(min=1e-12)[:, None]
        weight = right.T @ ((singular / (singular.square() + penalty * count))[:, None] * projected)
        yield Ridge(weight, bias, targets - error)


def fit_linear(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [C, K] and bias [K] of the ridge regression with the most correct leave-one-out predictions.

    Ties go to the least squared error. Differs from the usual choice by that error alone: with many classes of a few
    images each, it is least where all scores are nearly 0, and such a classifier recognises almost nothing.
    """
    labels = targets.argmax(dim=1)

    def quality(ridge: Ridge) -> tuple[int, float]:
        hits = (ridge.left_out.argmax(dim=1) == labels).sum()
        return int(hits), -float((targets - ridge.left_out).square().sum())

    best = max(fit_ridges(features, targets), key=quality)
    return best.weight, best.bias
