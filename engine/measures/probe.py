"""Probes of frozen features: k nearest neighbours, and a linear classifier.

The probes are fitted to labelled training images and evaluated on labelled validation images, in float64 on the CPU of
rank 0, so the scores do not depend on the ranks. They use no random numbers and no gradients, so they do not change the
run. The linear classifier is a ridge regression on one-hot labels; leave-one-out scores choose its penalty.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.measures.neighbours import find_nearest
from optim.linear import fit_classes
from optim.ridge import standardise
from utils.contracts import Batch, Figures
from utils.ranks import distributed
from utils.record.logging import log

# Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4; facebookresearch/dino:eval_knn.py.
TEMPERATURE = 0.07
Pairs = Iterable[tuple[Tensor, Batch]]  # features [B, C] and their batch


def gather_features(pairs: Pairs, fields: Sequence[str] = ("labels",)) -> tuple[Tensor, ...]:
    """Return features [N, C] float64 and fields [N] of all readable samples, sorted by sample_id, on the CPU.

    All ranks call it together, with batches of the same sizes.
    """
    names = ("sample_id", "weight", *fields)
    parts = [(features.float(), *(batch[name] for name in names)) for features, batch in pairs]
    features, ids, weight, *columns = (distributed.gather_rows(torch.cat(column)).cpu() for column in zip(*parts))
    order = torch.argsort(ids, stable=True)
    order = order[weight[order] > 0]  # without padding and unreadable images
    return features[order].double(), *(column[order] for column in columns)


def measure_probes(train: Pairs, val: Pairs, k: int) -> Figures:
    """Return `probe/knn` and `probe/linear`, the accuracies on `val` of classifiers fitted to `train`.

    Samples of a class without training images count as errors. If a set is empty or features are not finite, warn and
    return nothing.
    """
    samples = (*gather_features(train), *gather_features(val))
    return distributed.rank_zero_call(lambda: _score(*samples, k))


def _score(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, k: int) -> Figures:
    if not (len(train) and len(val) and train.isfinite().all() and val.isfinite().all()):
        log.warning("probe: skipped: features are not finite, or no image of the training or validation set was read")
        return {}
    classes, labels = torch.unique(train_labels, return_inverse=True)
    mean, scale = standardise(train)
    train = (train - mean) / scale
    val = (val - mean) / scale
    weight, bias, *_ = fit_classes(train, labels, len(classes))
    similarities, rows = find_nearest(val, train, min(k, len(train)))
    votes = (F.one_hot(labels)[rows] * (similarities / TEMPERATURE).exp()[:, :, None]).sum(dim=1)
    scores = {"probe/knn": votes, "probe/linear": val @ weight.T + bias}
    return {name: (classes[score.argmax(dim=1)] == val_labels).double().mean().item() for name, score in scores.items()}
