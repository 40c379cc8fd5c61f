"""Adan: adaptive Nesterov momentum.

Source: Xie et al., arXiv:2208.06677, algorithm 1, with decoupled weight decay after the step's own proximal form:
theta <- (theta - lr * (m + beta2 * v) / (sqrt(n) + eps)) / (1 + lr * weight_decay).
Betas are those of the exponential averages (0.98, 0.92, 0.99), as in the authors' code, not their complements.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optim.vectors import VectorOptimizer


class Adan(VectorOptimizer):
    """Step with three averages: of the gradient, of its difference to the previous one, and of their square."""

    averages = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad")

    def factors(self, counts: Tensor, keep: Tensor, group: dict[str, Any]) -> Tensor:
        """Return keep, its products with 1 - beta of each average, 0 in the first step, and of v, root, eps: [8, G].

        The update (m / c1 + beta2 * v / c2) / (sqrt(n / c3) + eps), with c = 1 - beta ** count, is computed with
        numerator and denominator multiplied by c1.
        """
        betas = group["betas"]
        correction1, correction2, correction3 = (1.0 - beta**counts for beta in betas)
        of_root, of_difference = correction1 / correction3.sqrt(), betas[1] * correction1 / correction2
        shares = [(1.0 - beta) * keep for beta in betas]
        return torch.stack([keep, *shares, (counts > 1).double(), of_difference, of_root, group["eps"] * correction1])

    def stepped(
        self, vectors: Sequence[Tensor], grads: Tensor, group: dict[str, Any], factors: Sequence[Tensor], part: int
    ) -> Sequence[Tensor]:
        """Step in place."""
        weights, average, difference, square, previous = vectors
        keep, share1, share2, share3, not_first, of_difference, of_root, eps = factors
        delta = (grads - previous).mul_(not_first)
        average.lerp_(grads, share1)
        difference.lerp_(delta, share2)
        square.lerp_(torch.add(grads, delta, alpha=group["betas"][1]).square_(), share3)
        previous.lerp_(grads, keep)
        update = (difference * of_difference).add_(average).div_(square.sqrt().mul_(of_root).add_(eps))
        # (theta - lr * u) / (1 + lr * decay) = theta - rate * (u + decay * theta)
        rate = group["lr"] / (1 + group["lr"] * group["weight_decay"])
        weights.sub_(update.add_(weights, alpha=group["weight_decay"]).mul_(rate * keep))
        return vectors
