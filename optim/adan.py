"""Adan: adaptive Nesterov momentum.

Source: Xie et al., arXiv:2208.06677, algorithm 1, with proximal decoupled weight decay:
theta <- (theta - lr * (m + beta2 * v) / (sqrt(n) + eps)) / (1 + lr * weight_decay).
Differs: betas are (0.98, 0.92, 0.99), as in the authors' code, and not 1 - beta as in the paper.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optim.vectors import VectorOptimizer


class Adan(VectorOptimizer):
    """Keep averages of the gradient m, of its difference to the previous gradient v, and of the square n."""

    averages = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad")

    def factors(self, counts: Tensor, keep: Tensor, group: dict[str, Any]) -> Tensor:
        """Return keep, keep * (1 - beta) of each average, 0 in the first step or 1, and the factors of v, root and eps.

        The update (m / c1 + beta2 * v / c2) / (sqrt(n / c3) + eps), with c = 1 - beta ** count, is computed with
        numerator and denominator multiplied by c1.
        """
        betas = group["betas"]
        correction1, correction2, correction3 = (1.0 - beta**counts for beta in betas)
        root_factor, difference_factor = correction1 / correction3.sqrt(), betas[1] * correction1 / correction2
        shares, not_first = [(1.0 - beta) * keep for beta in betas], (counts > 1).double()
        return torch.stack([keep, *shares, not_first, difference_factor, root_factor, group["eps"] * correction1])

    def stepped(
        self, vectors: Sequence[Tensor], grads: Tensor, group: dict[str, Any], factors: Sequence[Tensor], part: int
    ) -> Sequence[Tensor]:
        """Step in place."""
        weights, average, difference, square, previous = vectors
        keep, share1, share2, share3, not_first, difference_factor, root_factor, eps = factors
        delta = (grads - previous).mul_(not_first)
        average.lerp_(grads, share1)
        difference.lerp_(delta, share2)
        square.lerp_(torch.add(grads, delta, alpha=group["betas"][1]).square_(), share3)
        previous.lerp_(grads, keep)
        update = (difference * difference_factor).add_(average).div_(square.sqrt().mul_(root_factor).add_(eps))
        # (theta - lr * u) / (1 + lr * decay) = theta - rate * (u + decay * theta)
        rate = group["lr"] / (1 + group["lr"] * group["weight_decay"])
        weights.sub_(update.add_(weights, alpha=group["weight_decay"]).mul_(rate * keep))
        return vectors
