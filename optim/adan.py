"""Adan: adaptive Nesterov momentum.

Source: Xie et al., arXiv:2208.06677, algorithm 1, with decoupled weight decay after the step's own proximal form:
theta <- (theta - lr * (m + (1 - beta2) * v) / (sqrt(n) + eps)) / (1 + lr * weight_decay).
Betas are those of the exponential averages (0.98, 0.92, 0.99), as in the authors' code, not their complements.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Adan(torch.optim.Optimizer):
    """Step with three averages: gradient, gradient difference, and squared corrected gradient.

    State of a parameter: `exp_avg`, `exp_avg_diff`, `exp_avg_sq`, `previous_grad`, all of its shape, and `step` (a
    float32 scalar on its device). `found_inf` (a device scalar set by train_step, 1 where a gradient is not finite)
    makes the step leave every tensor unchanged without a host synchronisation.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.found_inf: torch.Tensor | None = None

    def _initialise(self, parameter: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad"):
                state[name] = torch.zeros_like(grad, memory_format=torch.preserve_format)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Make one update of all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update_group(group, parameters)
        return loss

    def _update_group(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        grads = [parameter.grad for parameter in parameters]
        states = [self._initialise(parameter, grad) for parameter, grad in zip(parameters, grads)]
        average, difference, square, previous, steps = (
            [state[name] for state in states]
            for name in ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad", "step")
        )
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        keep = torch.ones((), device=grads[0].device) if self.found_inf is None else 1.0 - self.found_inf
        keep = keep.to(wide)
        skip = keep == 0
        # NaN times zero is NaN, so a step that is left out gets finite gradients before anything is multiplied.
        grads = [grad.masked_fill(skip, 0.0) for grad in grads]
        torch._foreach_add_(steps, keep)
        beta1, beta2, beta3 = group["betas"]
        first = steps[0] <= 1  # every parameter of a group has made the same steps
        # On the first step the difference is 0: the previous gradient is the gradient itself.
        delta = [torch.where(first, 0.0, grad - before) for grad, before in zip(grads, previous)]
        corrected = torch._foreach_add(grads, delta, alpha=beta2)
        self._average(average, grads, (1 - beta1) * keep)
        self._average(difference, delta, (1 - beta2) * keep)
        self._average(square, torch._foreach_mul(corrected, corrected), (1 - beta3) * keep)
        self._average(previous, grads, keep)

        count = steps[0].double()  # in float32, 1 - beta ** count would lose two digits in the first steps
        corrections = [torch.where(count > 0, 1 - beta**count, 1.0).to(wide) for beta in (beta1, beta2, beta3)]
        denominator = torch._foreach_sqrt(square)
        torch._foreach_div_(denominator, corrections[2].sqrt())
        torch._foreach_add_(denominator, group["eps"])
        update = torch._foreach_div(average, corrections[0])
        torch._foreach_add_(update, torch._foreach_mul(torch._foreach_div(difference, corrections[1]), beta2))
        torch._foreach_div_(update, denominator)
        torch._foreach_mul_(update, keep * group["lr"])
        torch._foreach_sub_(parameters, update)
        torch._foreach_div_(parameters, 1 + keep * (group["lr"] * group["weight_decay"]))

    @staticmethod
    def _average(target: list[torch.Tensor], source: list[torch.Tensor], weight: torch.Tensor) -> None:
        """Move target towards source by a device scalar; by 0 it stays the same to the bit."""
        change = torch._foreach_sub(source, target)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(target, change)
