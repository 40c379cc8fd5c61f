"""AdamW on bfloat16 weights, which steps on vectors of many parameters and can skip a step on the device."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from utils import rng

# Elements of a vector. CPU: the fastest of 2**14 to 2**20 on convnextv2_atto; a step's data fits the caches.
# GPU: 64 MiB for each of about ten float32 temporaries, for any model size.
PART_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW on bfloat16 weights: 8 bytes per parameter with its gradient, instead of 16.

    It computes in float32 and rounds stochastically, seeded by the update's and parameter's numbers: rounding to
    nearest would lose updates below 1/512 of a weight, which are most. A part joins the memory of several parameters.
    Source: Zamirai et al. 2020 (arXiv 2010.06192), section 3; Loshchilov, Hutter 2017 (arXiv 1711.05101), algorithm 2.

    State of a parameter: `exp_avg` and `exp_avg_sq`, with its dtype and layout, and `step`, a float32 scalar on its
    device, equal for the parameters of a group. The learner sets `found_inf`, a device scalar (1: the step changes no
    tensor, without a host synchronisation), and `update`, the update's number.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, ...], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None
        self.update = 0
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        self._numbers = {parameter: number for number, parameter in enumerate(every)}

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
        for (group, parameters), (count, *_) in zip(members, steps):
            count = count.clamp(min=1).double()  # float32 would lose digits of 1 - beta**count
            shares = [((1.0 - beta) * keep.double()).float() for beta in group["betas"]]
            corrections = [(1.0 - beta**count).float() for beta in group["betas"]]
            for part in _parts(map(self._vectors, parameters), PART_ELEMENTS[keep.device.type]):
                *columns, noise = zip(*part)
                noise = torch.cat(noise, dim=1)
                vectors = [torch.cat(pieces).float() for pieces in columns]
                grads, weights, average, square = vectors
                grads.mul_(keep).nan_to_num_(0.0, 0.0, 0.0)  # all 0 in a skipped step
                average.lerp_(grads, shares[0])
                square.lerp_(grads.square(), shares[1])
                change = (average / corrections[0]) / ((square / corrections[1]).sqrt() + group["eps"])
                weights.sub_((change + group["weight_decay"] * weights) * (group["lr"] * keep))
                # The values of a skipped step are not rounded.
                for pieces, values, own in zip(columns[1:], vectors[1:], noise):
                    rounded = round_stochastically(values, own)
                    torch._foreach_copy_(list(pieces), rounded.split([len(piece) for piece in pieces]))

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return state

    def _vectors(self, parameter: Tensor) -> list[Tensor]:
        """Return a parameter's gradient, weights and averages as vectors in its memory's order, and noise [3, N]."""
        grad, state = parameter.grad, self.state[parameter]
        if grad.stride() != parameter.stride():
            grad = torch.empty_like(parameter).copy_(grad)
        vectors = [flat_view(tensor) for tensor in (grad, parameter, state["exp_avg"], state["exp_avg_sq"])]
        return [*vectors, draw_noise((3, len(vectors[0])), grad.device, self.update, self._numbers[parameter])]


def flat_view(tensor: Tensor) -> Tensor:
    """Return a dense tensor's memory as a vector, for any memory layout."""
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).view(-1)


def _parts(rows: Iterable[list[Tensor]], limit: int) -> Iterator[list[tuple[Tensor, ...]]]:
    """Yield parts of at most `limit` elements from rows of equally long vectors; longer vectors are cut."""
    part: list[tuple[Tensor, ...]] = []
    size = 0
    for row in rows:
        for pieces in zip(*(vector.split(limit, dim=-1) for vector in row)):
            if part and size + len(pieces[0]) > limit:
                yield part
                part, size = [], 0
            part.append(pieces)
            size += len(pieces[0])
    if part:
        yield part


def draw_noise(shape: Sequence[int], device: torch.device, update: int, number: int) -> Tensor:
    """Return noise for `round_stochastically`, seeded by the numbers of an update and of a parameter."""
    generator = torch.Generator(device).manual_seed(rng.hash_counters(update, number))
    return torch.empty(shape, dtype=torch.int32, device=device).random_(1 << 16, generator=generator)


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 values up or down to bfloat16 by random `noise`, so that the expected value is exact.

    A bfloat16 is the upper half of a float32. Adding a random lower half carries into it with the right probability.
    """
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
