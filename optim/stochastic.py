"""AdamW on bfloat16 weights with stochastic rounding: 8 bytes per parameter with its gradient, instead of 16.

bfloat16 has 8 bits of precision. Rounding to nearest would lose updates below 1/512 of a weight, which are most.
Stochastic rounding chooses either neighbour, so that the expected value is exact.
Source: Zamirai et al. 2020 (arXiv 2010.06192), section 3; Loshchilov, Hutter 2017 (arXiv 1711.05101), algorithm 2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optim.vectors import VectorOptimizer
from utils import rng


class StochasticAdamW(VectorOptimizer):
    """Compute in float32 and store in bfloat16 by stochastic rounding, seeded by the update's and part's numbers."""

    averages = ("exp_avg", "exp_avg_sq")

    def factors(self, counts: Tensor, keep: Tensor, group: dict[str, Any]) -> Tensor:
        """Return keep, keep * (1 - beta) of both averages, and their bias corrections, float64 [5, G]."""
        shares = [(1.0 - beta) * keep for beta in group["betas"]]
        return torch.stack([keep, *shares, *(1.0 - beta**counts for beta in group["betas"])])

    def stepped(
        self, vectors: Sequence[Tensor], grads: Tensor, group: dict[str, Any], factors: Sequence[Tensor], part: int
    ) -> Sequence[Tensor]:
        """Return weights, average and average square in bfloat16. In a skipped step they are not rounded."""
        weights, average, square = vectors
        keep, share1, share2, correction1, correction2 = factors
        average.lerp_(grads, share1)
        square.lerp_(grads.square(), share2)
        change = (average / correction1) / ((square / correction2).sqrt() + group["eps"])
        weights.sub_((change + group["weight_decay"] * weights) * (group["lr"] * keep))
        generator = torch.Generator(grads.device).manual_seed(rng.hash_counters(self.update, part))
        return [round_stochastically(vector, generator) for vector in vectors]


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 values up or down to bfloat16 at random, so that the expected value is exact.

    A bfloat16 is the upper half of a float32. Adding a random lower half carries into it with the right probability.
    """
    noise = torch.empty_like(values, dtype=torch.int32).random_(1 << 16, generator=generator)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
