"""Optimisers that step on vectors of many parameters and can skip a step on the device: Adan, StochasticAdamW."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from utils import rng

# Elements of a vector. CPU: the fastest of 2**14 to 2**20 on convnextv2_atto; a step's data fits the caches.
# GPU: 64 MiB for each of about fifteen float32 temporaries, for any model size.
PART_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}


class VectorOptimizer(torch.optim.Optimizer):
    """Step on each group in parts. A part joins the memory of several parameters to one vector.

    State of a parameter: `averages`, with its shape, dtype and layout, and `step`, a float32 scalar on its device. All
    groups have the same eps; parameters of one group have made the same number of steps.

    The learner sets `found_inf`, a device scalar (1: the step changes no tensor, without a host synchronisation), and
    `update`, the update's number.
    """

    _step_supports_amp_scaling = True
    averages: tuple[str, ...]

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, ...], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None
        self.update = 0

    def factors(self, counts: Tensor, keep: Tensor, group: dict[str, Any]) -> Tensor:
        """Return float64 factors [F, G] from the step counts, float64 [G] from 1 on.

        keep: 0 if this step is skipped, else 1; multiply all changes by it.
        """
        raise NotImplementedError

    def stepped(
        self, vectors: Sequence[Tensor], grads: Tensor, group: dict[str, Any], factors: Sequence[Tensor], part: int
    ) -> Sequence[Tensor]:
        """Return weights and `averages` after a step on float32 or wider vectors, which may change in place.

        part: the part's number. In a skipped step, gradients are 0.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:
        """Make one update of all groups."""
        members = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        members = [(group, parameters) for group, parameters in members if parameters]
        steps = [[self._state_of(parameter)["step"] for parameter in parameters] for _, parameters in members]
        if not members:
            return
        keep = steps[0][0].new_ones(()) if self.found_inf is None else 1.0 - self.found_inf
        # torch._foreach_add_ would read the scalar on the host.
        torch.ops.aten._foreach_add_.Tensor([step for group in steps for step in group], keep)
        # float32 would lose digits of 1 - beta**count.
        counts = torch.stack([group[0] for group in steps]).clamp(min=1).double()
        columns: list[Tensor] = []
        for _, run in groupby(members, key=lambda member: member[0]["betas"]):  # usually all groups
            (group, _), *others = run
            part = counts[len(columns) : len(columns) + 1 + len(others)]
            columns += self.factors(part, keep.double().expand_as(part), group).unbind(1)
        number = 0
        for (group, parameters), column in zip(members, columns):
            column = column.to(torch.promote_types(parameters[0].dtype, torch.float32))
            for part in _parts(map(self._vectors, parameters), PART_ELEMENTS[column.device.type]):
                columns = list(zip(*part))
                joined = [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in columns]
                grads, *stored = (vector.to(column.dtype) for vector in joined)
                grads = (grads * keep).nan_to_num_(0.0, 0.0, 0.0)  # all 0 in a skipped step
                results = self.stepped(stored, grads, group, column.unbind(), number)
                for pieces, vector in zip(columns[1:], results):
                    if vector is not pieces[0]:
                        torch._foreach_copy_(list(pieces), vector.split([len(piece) for piece in pieces]))
                number += 1

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {name: torch.zeros_like(parameter) for name in self.averages}
        return state

    def _vectors(self, parameter: Tensor) -> list[Tensor]:
        """Return a parameter's gradient, weights and averages as vectors, in the order of its memory."""
        grad = parameter.grad
        if grad.stride() != parameter.stride():
            grad = torch.empty_like(parameter).copy_(grad)
        return [flat_view(tensor) for tensor in (grad, parameter, *(self.state[parameter][n] for n in self.averages))]


def flat_view(tensor: Tensor) -> Tensor:
    """Return a dense tensor's memory as a vector, for any memory layout."""
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).view(-1)


def _parts(rows: Iterable[list[Tensor]], limit: int) -> Iterator[list[tuple[Tensor, ...]]]:
    """Yield parts of at most `limit` elements from rows of equally long vectors; longer vectors are cut."""
    part: list[tuple[Tensor, ...]] = []
    size = 0
    for row in rows:
        for pieces in zip(*(vector.split(limit) for vector in row)):
            if len(pieces[0]) > limit // 8:  # large enough for its own part, which needs no copy
                yield [pieces]
                continue
            if part and size + len(pieces[0]) > limit:
                yield part
                part, size = [], 0
            part.append(pieces)
            size += len(pieces[0])
    if part:
        yield part


class Adan(VectorOptimizer):
    """Adan, adaptive Nesterov momentum: averages of the gradient m, of its difference v, and of the square n.

    Source: Xie et al., arXiv:2208.06677, algorithm 1, with proximal decoupled weight decay:
    theta <- (theta - lr * (m + beta2 * v) / (sqrt(n) + eps)) / (1 + lr * weight_decay).
    Differs: betas are (0.98, 0.92, 0.99), as in the authors' code, and not 1 - beta as in the paper.
    """

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


class StochasticAdamW(VectorOptimizer):
    """AdamW on bfloat16 weights: 8 bytes per parameter with its gradient, instead of 16.

    It computes in float32 and rounds stochastically, seeded by the update's and part's numbers: rounding to nearest
    would lose updates below 1/512 of a weight, which are most.
    Source: Zamirai et al. 2020 (arXiv 2010.06192), section 3; Loshchilov, Hutter 2017 (arXiv 1711.05101), algorithm 2.
    """

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
