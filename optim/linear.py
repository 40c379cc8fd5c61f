"""Linear classifiers that are fitted at once: of classes by ridge regression, of tags by logistic regression."""

import torch
from torch import Tensor
from torch.nn import functional as F

from optim.ridge import Ridge, decompose
from utils.ranks.signals import check_stop

_SCALES = tuple(2.0 ** (step / 2) for step in range(33))  # 1 to 65536; scores of the regression are between 0 and 1
_PENALTY = 2.0  # of squared weights, in units of the curvature of a tag's loss
_RARE_IMAGES = 100  # images with a tag, from which the penalty weighs less
_SOLVER_STEPS = 20


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


def count_hits(targets: Tensor, scores: Tensor) -> Tensor:
    """Return the number of correct predictions, and the negative squared error, which breaks ties.

    With many small classes, the squared error alone would choose scores near 0, which recognise nothing.
    """
    hits = (scores.argmax(dim=1) == targets.argmax(dim=1)).sum()
    return torch.stack([hits, -(targets - scores).square().sum()])


def count_right(features: Tensor, labels: Tensor) -> int:
    """Return how many of the labels [N] a ridge regression on features [N, C] names without the image itself."""
    return int(max(hits.item() for hits, _ in Ridge(features, F.one_hot(labels)).compare(count_hits).values()))


@torch.enable_grad()
def fit_logits(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [T, C] and bias [T] of logistic regressions of targets [N, T], NaN if unknown, on features [N, C].

    Features are standardised. On the axes of a ridge regression, scaled by its shrinkage, the loss curves about equally
    in all directions, so few steps suffice.
    """
    values, axes = decompose(features)
    shrink = (values / len(features) + _PENALTY).rsqrt()
    rotated = features @ (axes * shrink)
    known = ~targets.isnan()
    share = targets.nanmean(dim=0).nan_to_num()
    # Of a tag's loss at the start. The penalty is in proportion, so it does not outweigh the few images of a rare tag.
    curvature = (share * (1 - share)).clamp(min=1e-6)
    penalty = _PENALTY * _RARE_IMAGES / (targets == 1).sum(dim=0).clamp(min=_RARE_IMAGES)
    weight = torch.zeros(targets.shape[1], rotated.shape[1], dtype=torch.float64, requires_grad=True)
    bias = share.logit(eps=1e-6).requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=_SOLVER_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        check_stop(alone=True)
        logits = rotated @ weight.T + bias
        losses = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
        losses = losses.where(known, 0.0).sum(dim=0) / known.sum(dim=0).clamp(min=1)
        loss = (losses / curvature).sum() + (penalty * (weight * shrink).square().sum(dim=1)).sum() / 2
        loss.backward()
        return loss

    solver.step(closure)
    return (weight.detach() * shrink) @ axes.T, bias.detach()
