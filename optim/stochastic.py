"""AdamW on bfloat16 weights with stochastic rounding: 8 bytes per parameter, gradient included, where float32 takes 16.

bfloat16 keeps 8 bits. An update below 1/512 of a weight would be lost by rounding to the nearest number, and most
updates are. Stochastic rounding goes to either neighbour, with probabilities that make the mean right.
Source: Zamirai et al. 2020 (arXiv 2010.06192), section 3; Loshchilov, Hutter 2017 (arXiv 1711.05101), algorithm 2.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from optim.fused import aligned_grad, flat_view
from utils import rng

_AVERAGES = ("exp_avg", "exp_avg_sq")
_PART_ELEMENTS = 1 << 24  # updated at once: 64 MiB for each of about ten float32 temporaries


class StochasticAdamW(torch.optim.Optimizer):
    """Step on bfloat16 parameters; computed in float32, stored by stochastic rounding.

    State of a parameter: `exp_avg` and `exp_avg_sq`, bfloat16 of its shape, and `step`, a float32 scalar on its device.
    Set by train_step: `found_inf`, as in optim/adan.py, and `update`, the number of the update, from which the random
    numbers of its rounding follow.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        assert all(parameter.dtype == torch.bfloat16 for group in self.param_groups for parameter in group["params"])
        self.found_inf: Tensor | None = None
        self.update = 0

    @torch.no_grad()
    def step(self) -> None:
        """Make one update of all groups."""
        number = 0
        for group in self.param_groups:
            for parameters in _parts([parameter for parameter in group["params"] if parameter.grad is not None]):
                self._update_part(group, parameters, rng.hash_counters(self.update, number))
                number += 1

    def _update_part(self, group: dict[str, Any], parameters: list[Tensor], key: int) -> None:
        """Update parameters that have made the same number of steps, all as one vector."""
        states = [self._state_of(parameter) for parameter in parameters]
        device = parameters[0].device
        skip = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        torch.ops.aten._foreach_add_.Tensor([state["step"] for state in states], 1.0 - skip)  # as in optim/adan.py
        stored = [parameters, *([state[name] for state in states] for name in _AVERAGES)]
        old = [_join(tensors) for tensors in stored]
        grads = _join(map(aligned_grad, parameters)).float()
        new = _step_of_adamw(*(vector.float() for vector in old), grads, group, states[0]["step"])
        generator = torch.Generator(device).manual_seed(key)
        for tensors, before, after in zip(stored, old, new):
            kept = torch.where(skip > 0, before, round_stochastically(after, generator))
            flat = [flat_view(tensor) for tensor in tensors]
            torch._foreach_copy_(flat, kept.split([vector.numel() for vector in flat]))

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {name: torch.zeros_like(parameter) for name in _AVERAGES}
        return state


def _step_of_adamw(
    weights: Tensor, average: Tensor, square: Tensor, grads: Tensor, group: dict[str, Any], count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, average and average square after step number `count`, a scalar that begins at 1."""
    beta1, beta2 = group["betas"]
    average = average.lerp(grads, 1 - beta1)
    square = square.lerp(grads.square(), 1 - beta2)
    correction1, correction2 = ((1.0 - beta ** count.double()).float() for beta in (beta1, beta2))
    change = (average / correction1) / ((square / correction2).sqrt() + group["eps"])
    return weights * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * change, average, square


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 values as bfloat16, rounded up or down at random so that the expected value is the value.

    A bfloat16 is the upper half of a float32's bits. Adding a random lower half carries into the upper one with the
    probability that the value's own lower half stands for.
    """
    noise = torch.empty_like(values, dtype=torch.int32).random_(1 << 16, generator=generator)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def _join(tensors: Iterable[Tensor]) -> Tensor:
    """Return dense tensors as one vector, in the order of their memory."""
    return torch.cat([flat_view(tensor) for tensor in tensors])


def _parts(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list into parts of at most `_PART_ELEMENTS` elements, or of one parameter."""
    part, size = [], 0
    for parameter in parameters:
        if part and size + parameter.numel() > _PART_ELEMENTS:
            yield part
            part, size = [], 0
        part.append(parameter)
        size += parameter.numel()
    if part:
        yield part
