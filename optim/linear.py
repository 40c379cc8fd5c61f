"""Linear classifiers that are fitted at once: of classes by ridge or logistic regression, of tags by the latter."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from optim.ridge import Ridge, decompose
from utils.ranks.signals import check_stop

_SCALES = tuple(2.0 ** (step / 2) for step in range(33))  # 1 to 65536; scores of the regression are between 0 and 1
_PENALTY = 2.0  # of squared weights, in units of the curvature of a tag's loss
_RARE_IMAGES = 100  # images with a tag, from which the penalty weighs less
_STEPS = 20
_FOLDS = 5
PENALTIES = [10 ** (-step / 2) for step in range(-2, 11)]  # of squared weights, times the mean variance of features
TRAINED_PENALTY = 0.03  # of features that know the labels by heart (docs/results.md#from-weights-in-two-minutes)
_UNSEEN = -100  # the label that `F.cross_entropy` ignores


def fit_classes(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, float, float]:
    """Return a head for standardised features [N, C]: weight [K, C], bias [K], leave-one-out loss and accuracy.

    Penalty and scale minimise the cross-entropy of the leave-one-out scores. On its own training images, a head with
    many classes and few images of each is right too often, and would start overconfident.
    """

    def measure(targets: Tensor, scores: Tensor) -> Tensor:
        labels = targets.argmax(dim=1)
        losses = [F.cross_entropy(scale * scores.float(), labels, reduction="sum") for scale in _SCALES]
        return torch.stack([*losses, (scores.argmax(dim=1) == labels).sum()]) / len(features)

    ridge = Ridge(features, F.one_hot(labels, num_classes).double())
    measured = {penalty: values.tolist() for penalty, values in ridge.compare(measure).items()}
    penalty = min(measured, key=lambda penalty: min(measured[penalty][:-1]))
    *losses, accuracy = measured[penalty]
    loss = min(losses)
    scale = _SCALES[losses.index(loss)]
    weight, bias = ridge.solve(penalty)
    return scale * weight, scale * bias, loss, accuracy


def count_right(features: Tensor, labels: Tensor) -> int:
    """Return how many of the labels [N] a ridge regression on features [N, C] names without the image itself."""
    ridge = Ridge(features, F.one_hot(labels))
    hits = ridge.compare(lambda targets, scores: (scores.argmax(dim=1) == targets.argmax(dim=1)).sum())
    return int(max(hits.values()).item())


def fit_logits(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [T, C] and bias [T] of logistic regressions of targets [N, T], NaN if unknown, on features [N, C].

    Features are standardised.
    """
    values, axes = decompose(features)
    known = ~targets.isnan()
    share = targets.nanmean(dim=0).nan_to_num()
    # Of a tag's loss at the start. The penalty is in proportion, so it does not outweigh the few images of a rare tag.
    curvature = (share * (1 - share)).clamp(min=1e-6)
    penalty = _PENALTY * _RARE_IMAGES / (targets == 1).sum(dim=0).clamp(min=_RARE_IMAGES)

    def measure(logits: Tensor) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
        losses = losses.where(known, 0.0).sum(dim=0) / known.sum(dim=0).clamp(min=1)
        return (losses / curvature).sum()

    shrink = (values / len(features) + _PENALTY).rsqrt()
    weight = features.new_zeros(targets.shape[1], len(values))
    weight, bias = _descend(features @ axes, (weight, share.logit(eps=1e-6)), shrink, penalty, _STEPS, measure)
    return weight @ axes.T, bias


def fit_softmax(
    features: Tensor, labels: Tensor, num_classes: int, penalties: list[float] = PENALTIES
) -> tuple[Tensor, Tensor, float, float]:
    """Return weight [K, C] and bias [K] for standardised features [N, C], and left-out images' loss and accuracy.

    Five fits of a multinomial logistic regression to four fifths of the images choose the penalty. A class deals its
    images to the fifths in turn, so there are no random numbers.
    """
    fold = labels.argsort(stable=True).argsort() % _FOLDS
    seen = labels.where(fold != torch.arange(_FOLDS + 1)[:, None], _UNSEEN)  # the last fit sees all
    values, axes = decompose(features)
    variances = (values / len(labels)).float()
    points = (features @ axes).float()
    bias = (labels.bincount(minlength=num_classes) + 1).float().log().repeat(len(seen), 1)
    weight = bias.new_zeros(*bias.shape, len(values))
    fits = []

    def measure(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), seen.flatten(), reduction="sum") / len(points)

    for relative in penalties:
        penalty = relative * (variances.sum() / features.shape[1]).clamp(min=1e-9)
        shrink = (variances * (1 - 1 / num_classes) / num_classes + penalty).rsqrt()
        weight, bias = _descend(points, (weight, bias), shrink, penalty, _STEPS // 2, measure)
        logits = (points @ weight.mT + bias[:, None])[fold, range(len(labels))]
        loss = F.cross_entropy(logits, labels).item()
        accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
        fits.append((weight[-1].double() @ axes.T, bias[-1].double(), loss, accuracy))
        if loss > fits[-2:][0][2]:  # than that of the penalty before
            break
    return min(fits, key=lambda fit: fit[2])


def _descend(
    points: Tensor,
    start: tuple[Tensor, Tensor],
    shrink: Tensor,
    penalty: Tensor | float,
    steps: int,
    measure: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return weight [..., K, R] and bias [..., K] after some steps from the start, for points on principal axes [N, R].

    measure: returns the loss of logits [..., N, K]. Scaled by the shrinkage of a ridge regression, the loss curves
    about equally in all directions, so few steps suffice.
    """
    weight, bias = start
    scaled = (weight / shrink).requires_grad_()
    bias = bias.clone().requires_grad_()
    solver = torch.optim.LBFGS([scaled, bias], max_iter=steps, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def closure() -> Tensor:
        check_stop(alone=True)
        solver.zero_grad()
        weight = scaled * shrink
        loss = measure(points @ weight.mT + bias[..., None, :])
        loss = loss + (penalty * weight.square().sum(dim=-1)).sum() / 2
        loss.backward()
        return loss

    solver.step(closure)
    return scaled.detach() * shrink, bias.detach()
