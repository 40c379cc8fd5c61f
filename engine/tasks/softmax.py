"""A multinomial logistic regression, with the penalty that predicts left-out images best."""

import torch
from torch import Tensor
from torch.nn import functional as F

from optim.ridge import decompose
from utils.ranks.signals import check_stop

_FOLDS = 5
_PENALTIES = [10 ** (-step / 2) for step in range(-2, 11)]  # of squared weights, times the mean variance of features
_SOLVER_STEPS = 10  # for each penalty, from the solution for the penalty before
_UNSEEN = -100  # the label that `F.cross_entropy` ignores


def fit_softmax(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, float, float]:
    """Return weight [K, C] and bias [K] for standardised features [N, C], and left-out images' loss and accuracy.

    Five fits to four fifths of the images choose the penalty. A class deals its images to the fifths in turn, so there
    are no random numbers.
    """
    fold = labels.argsort(stable=True).argsort() % _FOLDS
    seen = labels.where(fold != torch.arange(_FOLDS + 1)[:, None], _UNSEEN)  # the last fit sees all
    values, axes = decompose(features)
    variances = (values / len(labels)).float()
    points = (features @ axes).float()
    bias = (labels.bincount(minlength=num_classes) + 1).float().log().repeat(len(seen), 1)
    weight = bias.new_zeros(*bias.shape, len(values))
    fits = []
    for relative in _PENALTIES:
        penalty = relative * (variances.sum() / features.shape[1]).clamp(min=1e-9)
        weight, bias = _descend(points, seen, weight, bias, variances, penalty)
        logits = (points @ weight.mT + bias[:, None])[fold, range(len(labels))]
        loss = F.cross_entropy(logits, labels).item()
        accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
        fits.append((weight[-1].double() @ axes.T, bias[-1].double(), loss, accuracy))
        if loss > fits[-2:][0][2]:  # than that of the penalty before
            break
    return min(fits, key=lambda fit: fit[2])


@torch.enable_grad()
def _descend(
    points: Tensor, seen: Tensor, weight: Tensor, bias: Tensor, variances: Tensor, penalty: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weights [B, K, R] and biases [B, K] of B regressions after some steps from those given.

    points: features on their principal axes [N, R], with variances [R]. seen: labels [B, N]. Scaled by the shrinkage of
    a ridge regression, the loss curves about equally in all directions, so few steps suffice.
    """
    classes = bias.shape[1]
    shrink = (variances * (1 - 1 / classes) / classes + penalty).rsqrt()
    scaled = (weight / shrink).requires_grad_()
    bias = bias.clone().requires_grad_()
    solver = torch.optim.LBFGS([scaled, bias], max_iter=_SOLVER_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        check_stop(alone=True)
        solver.zero_grad()
        logits = points @ (scaled * shrink).mT + bias[:, None]
        loss = F.cross_entropy(logits.flatten(0, 1), seen.flatten(), reduction="sum") / len(points)
        loss = loss + penalty / 2 * (scaled * shrink).square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return scaled.detach() * shrink, bias.detach()
