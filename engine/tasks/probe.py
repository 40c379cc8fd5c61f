"""What frozen features tell a simple classifier: k nearest neighbours, and a linear one.

Both are fitted to labelled training images and measured on labelled validation images, in float64 on the CPU of rank 0,
so that the figures do not depend on the ranks. Nothing is drawn at random and no gradient is taken: a training run with
a probe is the same run.

The linear classifier is ridge regression onto the classes: its solution is closed, so there is neither a step size nor
a number of iterations to set, and one decomposition tells for every penalty how many training images are recognised
when each is left out of the fit, by which the penalty is chosen.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.task import Batch
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)

# Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4; facebookresearch/dino:eval_knn.py.
TEMPERATURE = 0.07
# Candidates of the ridge penalty, per training image; features have variance 1.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_ROWS = 1024  # validation images that are compared with all training images at once


def measure_features(
    encode: Callable[[Tensor], Tensor], train: Iterable[Batch], val: Iterable[Batch], *, k: int
) -> dict[str, float]:
    """Return `probe/knn` and `probe/linear`: the shares of `val` that are recognised by the features of `train`.

    `encode` turns a batch's images into features [B, C]; batches carry `labels` [B]. Every rank calls it, with batches
    of the same sizes, and gets the same figures; a class without a training image counts as missed. Without a readable
    image in both, or with features that are not finite, it warns and returns nothing.
    """
    gathered = [gather_features(encode, batches) for batches in (train, val)]
    return distributed.rank_zero_call(lambda: _measure(*gathered[0], *gathered[1], k))


def gather_features(encode: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return features [N, C] and labels [N] of all ranks' readable samples, in the order of their ids, on the CPU."""
    columns = [(encode(batch["images"]).float(), batch["labels"], batch["sample_id"], batch["weight"])
               for batch in batches]  # fmt: skip
    features, labels, ids, weight = (distributed.gather_rows(torch.cat(column)).cpu() for column in zip(*columns))
    order = torch.argsort(ids, stable=True)
    order = order[weight[order] > 0]  # without padding and unreadable images
    return features[order].double(), labels[order]


def _measure(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, k: int) -> dict[str, float]:
    """Return the figures of gathered features."""
    if len(train) == 0 or len(val) == 0:
        log.warning("probe: left out, since no image of one of its two sets could be read")
        return {}
    if not (train.isfinite().all() and val.isfinite().all()):
        log.warning("probe: left out, since the encoder's features are not finite")
        return {}
    mean, scale = standardise(train)
    train, val = (train - mean) / scale, (val - mean) / scale
    classes, targets = torch.unique(train_labels, return_inverse=True)
    weight, bias = fit_linear(train, F.one_hot(targets, len(classes)).double())
    found = {
        "probe/knn": knn_scores(train, targets, val, k, len(classes)).argmax(dim=1),
        "probe/linear": (val @ weight + bias).argmax(dim=1),
    }
    return {name: (classes[index] == val_labels).double().mean().item() for name, index in found.items()}


def standardise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation [C] of features [N, C]; infinity for a constant one, which division makes 0."""
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    # What rounding leaves of a constant is no signal.
    return mean, torch.where(std > 1e-6 * mean.abs(), std, torch.inf)


def knn_scores(train: Tensor, targets: Tensor, val: Tensor, k: int, num_classes: int) -> Tensor:
    """Return each class's votes [M, K] by the k nearest of `train` [N, C], or by all where there are fewer.

    Nearness is the cosine; a neighbour's vote for its class, targets [N], is exp(cosine / TEMPERATURE).
    """
    train = F.normalize(train, dim=1)
    scores = []
    for rows in val.split(_ROWS):
        nearest = (F.normalize(rows, dim=1) @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(rows), num_classes, dtype=train.dtype)
        scores.append(votes.scatter_add_(1, targets[nearest.indices], (nearest.values / TEMPERATURE).exp()))
    return torch.cat(scores)


def fit_linear(features: Tensor, targets: Tensor, penalties: Sequence[float] = PENALTIES) -> tuple[Tensor, Tensor]:
    """Return weight [C, K] and bias [K] of the ridge regression of one-hot targets [N, K] on centred features [N, C].

    The bias bears no penalty. The penalty is the one of `penalties`, times N, that recognises most samples when each is
    predicted by a fit to all others; of equals the one of the least squared error.
    Source: Golub, Heath, Wahba, "Generalized cross-validation as a method for choosing a good ridge parameter",
    Technometrics 1979, section 1 (the ordinary form, Allen's PRESS).
    Differs: it counts hits. Of many classes with a few images each, the squared error is least where all scores are
    nearly 0, which recognises next to nothing.
    """
    count = len(features)
    labels, bias = targets.argmax(dim=1), targets.mean(dim=0)
    left, singular, right = torch.linalg.svd(features, full_matrices=False)
    projected = left.T @ (targets - bias)
    found = []
    for penalty in penalties:
        shrink = singular.square() / (singular.square() + penalty * count)
        # A sample's own pull on its prediction; 1 at most, and that only where it is the one sample.
        leverage = left.square() @ shrink + 1 / count
        residual = targets - bias - left @ (shrink[:, None] * projected)
        error = residual / (1 - leverage).clamp(min=1e-12)[:, None]
        hits = ((targets - error).argmax(dim=1) == labels).sum()
        found.append((int(hits), -float(error.square().sum()), penalty))
    best = max(found)[2]
    return right.T @ ((singular / (singular.square() + best * count))[:, None] * projected), bias
