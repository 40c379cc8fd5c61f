"""Find labels that are probably wrong: compare the label of an image with the prediction from all other images.

Predictions come from the features of a frozen network. The label of an image has no part in the prediction for the
image, so a wrong label cannot hide. Nothing is random.

right, probs = judge_classes(features, labels)
right, probs = judge_tags(features, targets)
wrong = bound_wrong(probs[:, None], labels[:, None])
"""

import math
from collections.abc import Iterable, Iterator
from itertools import product, starmap

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.ranks.signals import check_stop

_MOST_LANDMARKS = 2_000  # images that all images are compared with
_PENALTIES = (0.3, 1.0)  # 0.1 and 3 find no more (docs/wrong_labels.md#measured)
_SCALES = torch.arange(-16, 17).div(2).exp2().tolist()
_WRONG_SHARES = torch.tensor([0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3]).double()  # of wrong labels
_SHARES = torch.linspace(0, 1, 41).double().square()  # of labels that are drawn at random
_LIKELY = 1.92  # nats below the likeliest share: 95 %, half a quantile of chi squared
_MOST_COUNTED = 2**17  # labels
_EM_ROUNDS = 15
_PAIR_ERRORS = 0.1  # the prior errors of a pair of classes, as a multiple of the mean
_EQUAL_PAIRS = 1e3  # a prior that makes all pairs equal
_MOST_PROBABLE = 0.99  # bounds the probability of a tag by other images
_MISSING_SHARE = 0.1  # the prior share of missing tags, and of superfluous tags
_LEAST_GAIN = 0.05  # nats a wrong label: pairs of classes must explain half of the labels better by this


def predict_left_out(features: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """Yield the leave-one-out predictions of a kernel ridge regression, float64 [N, K], for each of `_PENALTIES`.

    features: float32 [N, D]. targets: bool or integer [N, K]. The kernel is Gaussian, on the roots of the features at
    length 1, with the mean distance of images as its width. Some of many images are landmarks (Nystrom), chosen without
    the targets. Source: Arandjelovic & Zisserman 2012 (roots); Allen 1974 (leave-one-out).
    """
    targets = targets.float()
    points = F.normalize(features.sign() * features.abs().sqrt(), dim=1)
    marks = torch.linspace(0, len(points) - 1, min(len(points), _MOST_LANDMARKS)).long()
    distances = torch.cdist(points[marks], points).square()
    near = (-2 * distances / distances.mean().clamp(min=1e-6)).exp() + 1  # 1: the intercept
    unit = torch.eye(len(marks))
    factor = torch.linalg.cholesky(near[:, marks] + 1e-3 * unit)  # without it, float32 fails on copies of an image
    mapped = torch.linalg.solve_triangular(factor, near, upper=False)
    gram = mapped @ mapped.T
    for penalty in _PENALTIES:
        check_stop(alone=True)
        factor = torch.linalg.cholesky(gram + penalty * unit)
        halves = torch.linalg.solve_triangular(factor, mapped, upper=False)
        errors = targets - halves.T @ (halves @ targets)
        yield (targets - errors / (1 - halves.square().sum(0))[:, None]).double()


def judge_classes(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities that labels [N] are right, and of the classes by the other images alone [N, K].

    Every class has an image. One scale turns ridge scores into probabilities. If labels are exchanged between certain
    classes, expectation maximisation learns the pairs from all labels. Otherwise discriminants of the scores are added.
    """
    logits = _calibrate(predict_left_out(features, F.one_hot(labels)), labels)
    half = torch.arange(len(labels))[:, None] % 2  # errors learned from one half predict the other
    by_pairs, by_any = (_explain(logits, labels, prior, half)[1] for prior in (_PAIR_ERRORS, _EQUAL_PAIRS))
    right, _ = _explain(logits, labels, _PAIR_ERRORS)
    if ((by_pairs / by_any).log() * (1 - half)).mean() < _LEAST_GAIN * (1 - right.mean()):
        right, _ = _explain(logits, labels, _EQUAL_PAIRS)
        further = _calibrate([_discriminate(logits, labels, right)], labels)
        logits = _calibrate([logits + further], labels)
        right, _ = _explain(logits, labels, _EQUAL_PAIRS)
    return right, logits.softmax(dim=1)


def judge_tags(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities that targets, bool [N, T], are right, and of no tag and a tag by other images [N, T, 2].

    A target states whether an image has a tag.
    A tag is superfluous if the other images make it less probable than usual. A rare tag is not.
    """
    given = targets.double()
    predicted = min(predict_left_out(features, targets), key=lambda has: (has - given).square().sum().item())
    odds = predicted.logit(eps=1 - _MOST_PROBABLE)
    usual = given.mean(dim=0).logit(eps=1 - _MOST_PROBABLE)
    right = (odds.where(targets, -odds) - usual.where(targets, 0.0) - math.log(_MISSING_SHARE)).sigmoid()
    return right, torch.stack([-odds, odds], dim=-1).sigmoid()


def bound_wrong(probs: Tensor, labels: Tensor) -> dict[str, int]:
    """Return how many of the labels [N, T] are wrong, from some of many images: the ends of a 95 % interval.

    probs: of the classes by other images [N, T, K]. In the model, a share of the labels is drawn at random, and the
    others follow `probs`, to the power that fits a column best. If images tell nothing of labels, all shares are
    equally likely, so the interval begins at 0.
    """
    step = labels.numel() // _MOST_COUNTED + 1
    logits = (probs[::step] + 1e-9).log()
    usual = (F.one_hot(labels).double().mean(dim=0) + 1e-9).log()
    rights = [usual.lerp(logits, power / 10).softmax(dim=-1).gather(-1, labels[::step, :, None]) for power in range(21)]
    likely = torch.stack([right.lerp(rights[0], _SHARES).log().sum(dim=0) for right in rights]).amax(0).sum(0)
    wrong = _SHARES[likely > likely.max() - _LIKELY] * (1 - rights[0]).sum() * step
    return {"wrong, at least": round(wrong[0].item()), "wrong, at most": round(wrong[-1].item())}


def _calibrate(candidates: Iterable[Tensor], labels: Tensor) -> Tensor:
    """Return the scaled scores [N, K] that make the labels most probable, if a share of the labels is wrong."""

    def loss(logits: Tensor) -> float:
        right = logits.softmax(dim=1).gather(1, labels[:, None])
        return -((1 - _WRONG_SHARES) * right + _WRONG_SHARES / logits.shape[1]).log().mean(dim=0).max().item()

    return min(starmap(torch.mul, product(candidates, _SCALES)), key=loss)


def _discriminate(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the negative squared distances [N, K] of scores [N, K] to the classes, whitened by the scatter in classes.

    weights: of the images [N]. The mean of an image's class leaves the image out.
    Source: Hastie, Tibshirani & Buja 1994, Flexible discriminant analysis by optimal scoring.
    """
    given = F.one_hot(labels) * weights[:, None]
    counts = given.sum(dim=0)
    means = given.T @ scores / counts[:, None]
    apart = (scores - means[labels]) * weights[:, None].sqrt()
    within = torch.eye(len(means)) * apart.square().mean() * 0.1 * len(apart) + apart.T @ apart
    whiten = torch.linalg.inv(torch.linalg.cholesky(within)).T
    distances = torch.cdist(scores @ whiten, means @ whiten) * counts / (counts - given).clamp(min=0.5)
    return -distances.square()


def _explain(logits: Tensor, labels: Tensor, smoothing: float, known: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the probabilities that labels are right, [N], and that they are given, [N, 1].

    logits: of the classes [N, K] without the label. A share of the labels is wrong. Expectation maximisation learns the
    share and the pairs of classes. known: 1 for the images to learn from [N, 1].
    """
    beliefs = logits.softmax(dim=1)
    given = F.one_hot(labels).double() * known
    others = 1 - torch.eye(logits.shape[1]).double()
    share = 0.1
    swaps = F.normalize(others, p=1, dim=1)
    for _ in range(_EM_ROUNDS):
        causes = beliefs * ((1 - share) * (1 - others) + share * swaps)[:, labels].T
        likely = causes.sum(dim=1, keepdim=True)
        causes = causes / likely
        errors = causes.T @ given * others
        share = (errors.sum() / given.sum()).clamp(min=1e-3)
        swaps = F.normalize((errors + smoothing * errors.mean()) * others, p=1, dim=1)
    return causes.gather(1, labels[:, None])[:, 0], likely
