"""AdamW on bfloat16 weights with stochastic rounding: 8 bytes per parameter, gradient included, where float32 takes 16.

bfloat16 keeps 8 bits. An update below 1/512 of a weight would be lost by rounding to the nearest number, and most
updates are. Stochastic rounding goes to either neighbour, with probabilities that make the mean right.
Source: Zamirai et al. 2020 (arXiv 2010.06192), section 3; Loshchilov, Hutter 2017 (arXiv 1711.05101), algorithm 2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optim.vectors import VectorOptimizer
from utils import rng


class StochasticAdamW(VectorOptimizer):
    """Step on bfloat16 parameters; computed in float32, stored by stochastic rounding.

    The random numbers of the rounding follow from the number of the update and that of the part.
    """

    averages = ("exp_avg", "exp_avg_sq")

    def factors(self, counts: Tensor, keep: Tensor, group: dict[str, Any]) -> Tensor:
        """Return keep, its products with 1 - beta of both averages, and their corrections, float64 [5, G]."""
        shares = [(1.0 - beta) * keep for beta in group["betas"]]
        return torch.stack([keep, *shares, *(1.0 - beta**counts for beta in group["betas"])])

    def stepped(
        self, vectors: Sequence[Tensor], grads: Tensor, group: dict[str, Any], factors: Sequence[Tensor], part: int
    ) -> Sequence[Tensor]:
        """Return weights, average and average square, bfloat16; those of a skipped step are, so none is rounded."""
        weights, average, square = vectors
        keep, share1, share2, correction1, correction2 = factors
        average.lerp_(grads, share1)
        square.lerp_(grads.square(), share2)
        change = (average / correction1) / ((square / correction2).sqrt() + group["eps"])
        weights.sub_((change + group["weight_decay"] * weights) * (group["lr"] * keep))
        generator = torch.Generator(grads.device).manual_seed(rng.hash_counters(self.update, part))
        return [round_stochastically(vector, generator) for vector in vectors]


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 values as bfloat16, rounded up or down at random so that the expected value is the value.

    A bfloat16 is the upper half of a float32's bits. Adding a random lower half carries into the upper one with the
    probability that the value's own lower half stands for.
    """
    noise = torch.empty_like(values, dtype=torch.int32).random_(1 << 16, generator=generator)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
