"""Probes of frozen features: k nearest neighbours, and a linear classifier.

Both are fitted to labelled training images and evaluated on labelled validation images, in float64 on the CPU of rank
0, so the scores do not depend on the ranks. They use no random numbers and no gradients, so a probe does not change the
run. The linear classifier is a ridge regression on one-hot labels; leave-one-out scores choose its penalty.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils.contracts import Batch
from utils.ranks import distributed
from utils.ranks.signals import check_stop
from utils.record.logging import get_logger

log = get_logger(__name__)

# Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4; facebookresearch/dino:eval_knn.py.
TEMPERATURE = 0.07
# Candidates for the ridge penalty, per training image; features have variance 1.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_FIELDS = "labels", "sample_id", "weight"
Pairs = Iterable[tuple[Tensor, Batch]]  # features [B, C] and their batch
_AT_ONCE = 2_000  # images whose neighbours are found between two looks for a stop request


def gather_features(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return features [N, C] float64 and labels [N] of all readable samples, sorted by sample_id, on the CPU.

    All ranks call it together, with batches of the same sizes.
    """
    parts = [(features.float(), *(batch[name] for name in _FIELDS)) for features, batch in pairs]
    features, labels, ids, weight = (distributed.gather_rows(torch.cat(column)).cpu() for column in zip(*parts))
    order = torch.argsort(ids, stable=True)
    order = order[weight[order] > 0]  # without padding and unreadable images
    return features[order].double(), labels[order]


def measure_probes(train: Pairs, val: Pairs, k: int) -> dict[str, float]:
    """Return `probe/knn` and `probe/linear`, the accuracies on `val` of classifiers fitted to `train`.

    Samples of a class without training images count as errors. If a set is empty or features are not finite, warn and
    return nothing.
    """
    collected = (*gather_features(train), *gather_features(val))
    return distributed.rank_zero_call(lambda: _score(*collected, k))


def _score(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, k: int) -> dict[str, float]:
    from sklearn.neighbors import KNeighborsClassifier  # 1.3 s

    if not (len(train) and len(val) and train.isfinite().all() and val.isfinite().all()):
        log.warning("probe: skipped: features are not finite, or no image of the training or validation set was read")
        return {}
    mean, scale = standardise(train)
    train = (train - mean) / scale
    val = (val - mean) / scale
    classes, targets = torch.unique(train_labels, return_inverse=True)
    neighbours = KNeighborsClassifier(
        min(k, len(train)), metric="cosine", weights=lambda far: np.exp(-far / TEMPERATURE)
    )
    neighbours.fit(train.numpy(), targets.numpy())
    votes = []
    for part in val.split(_AT_ONCE):
        check_stop(alone=True)
        votes.append(neighbours.predict_proba(part.numpy()))
    check_stop(alone=True)
    scores = {
        "probe/knn": np.concatenate(votes),
        "probe/linear": fit_ridge(train, targets, len(classes), _count_hits).predict(val.numpy()),
    }
    return {
        name: (classes[score.reshape(len(val), -1).argmax(axis=1)] == val_labels).double().mean().item()
        for name, score in scores.items()
    }


def standardise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [C] of features [N, C]; infinity for constant ones, so they become 0."""
    mean = features.mean(dim=0)
    std = features.std(dim=0, correction=0)
    # Ignore the rounding errors of a constant.
    return mean, torch.where(std > 1e-6 * mean.abs(), std, torch.inf)


def fit_ridge(
    features: Tensor, labels: Tensor, num_classes: int, quality: Callable[[Tensor, Tensor], float]
) -> Any:  # RidgeCV
    """Return the ridge regression of one-hot labels [N] on features [N, C], with the penalty of the best quality.

    quality: a function of the leave-one-out scores [N, K] and the labels; ties go to the lower penalty.
    Differs: RidgeClassifierCV(scoring="accuracy") always takes the lowest penalty for two classes (scikit-learn 1.9).
    """
    from sklearn.linear_model import RidgeCV

    def score(_: object, left_out: np.ndarray, __: np.ndarray) -> float:
        check_stop(alone=True)
        return quality(torch.from_numpy(left_out.reshape(len(labels), num_classes)), labels)

    targets = F.one_hot(labels, num_classes).double()
    penalties = [penalty * len(features) for penalty in PENALTIES]
    return RidgeCV(penalties, scoring=score).fit(features.numpy(), targets.numpy())


def _count_hits(left_out: Tensor, labels: Tensor) -> float:
    """Return the number of correct predictions, plus less than 1 for a small squared error, which breaks ties.

    With many small classes, the squared error alone would choose scores near 0, which recognise nothing.
    """
    hits = (left_out.argmax(dim=1) == labels).sum()
    error = (F.one_hot(labels, left_out.shape[1]) - left_out).square().sum()
    return float(hits + 1 / (1 + error))
