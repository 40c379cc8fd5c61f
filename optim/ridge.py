"""Ridge regression in closed form, with the exact predictions of leaving each image out.

All is float64 on the CPU. It uses no random numbers and no gradients. Source of the leave-one-out formula: Allen 1974,
The relationship between variable selection and data augmentation and a method for prediction (PRESS).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from utils.ranks.signals import check_stop

# Candidates for the penalty, per training image; the variance of features is near 1.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_IMAGES_AT_ONCE = 2_000  # images whose predictions are in memory


class Ridge:
    """Ridge regressions of targets [N, K] on features [N, C], both of any dtype, for any penalty.

    Features are standardised (`standardise`), and the intercept is free. One eigendecomposition serves all penalties.
    Targets are converted to float64 by blocks, so bool ones of many classes take little memory.
    """

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        features = features.double()
        self._mean, self._scale = standardise(features)
        self._targets = targets
        self._intercept = targets.mean(dim=0, dtype=torch.float64)
        standard = (features - self._mean) / self._scale
        self._values, self._axes = decompose(standard)
        self._rotated = standard @ self._axes
        self._moments = sum(part.T @ (known - self._intercept) for part, known in self._blocks())

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for features, targets in zip(self._rotated.split(_IMAGES_AT_ONCE), self._targets.split(_IMAGES_AT_ONCE)):
            check_stop(alone=True)
            yield features, targets.double()

    def _shrink(self, penalty: float) -> Tensor:
        return 1 / (self._values + penalty * len(self._targets))

    def left_out(self, penalty: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield targets [n, K] of some images, and what a regression without each image predicts for it, in order."""
        shrink = self._shrink(penalty)
        weight = shrink[:, None] * self._moments
        for features, targets in self._blocks():
            leverage = (features.square() @ shrink + 1 / len(self._targets))[:, None]
            fitted = torch.addmm(self._intercept, features, weight)
            yield targets, (fitted - leverage * targets).div_(1 - leverage)

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Return weight [K, C] and bias [K] for features as they were given."""
        weight = (self._axes @ (self._shrink(penalty)[:, None] * self._moments)).T / self._scale
        return weight, self._intercept - weight @ self._mean

    def compare(self, measure: Callable[[Tensor, Tensor], Tensor]) -> dict[float, Tensor]:
        """Return for each of `PENALTIES` the sum of a measure over the leave-one-out predictions.

        measure: a function of targets [n, K] and predictions [n, K] that returns sums over these images.
        """
        return {penalty: sum(measure(*part) for part in self.left_out(penalty)) for penalty in PENALTIES}


def decompose(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues [R] and eigenvectors [C, R] of the moments of features [N, C], from the smaller matrix.

    With fewer images than features, that is their inner products; directions in which no image differs are left out.
    """
    if len(features) >= features.shape[1]:
        values, axes = torch.linalg.eigh(features.T @ features)
        return values.clamp(min=0), axes
    values, images = torch.linalg.eigh(features @ features.T)
    differs = values > 1e-12 * values[-1]
    values = values[differs]
    return values, features.T @ (images[:, differs] / values.sqrt())


def standardise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and scale [C] of features [N, C]; infinity for constant ones, so they become 0.

    The scale is a feature's standard deviation, and that of all features by the root of its mean square. By its own
    alone, a feature that few images have is large on other images, and leave-one-out predictions do not see that.
    """
    mean = features.mean(dim=0)
    std = features.std(dim=0, correction=0)
    # Ignore the rounding errors of a constant.
    return mean, torch.where(std > 1e-6 * mean.abs(), std.hypot(std.square().mean().sqrt()), torch.inf)
