"""Adan: adaptive Nesterov momentum.

Source: Xie et al., arXiv:2208.06677, algorithm 1, with decoupled weight decay after the step's own proximal form:
theta <- (theta - lr * (m + beta2 * v) / (sqrt(n) + eps)) / (1 + lr * weight_decay).
Betas are those of the exponential averages (0.98, 0.92, 0.99), as in the authors' code, not their complements.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from optim.fused import aligned_grad, flat_view, subtract_scaled_

_AVERAGES = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad")
# Elements updated at once. CPU: of 2**14 to 2**20 the fastest on convnextv2_atto (5 MiB for all that one part touches).
# GPU: 256 MiB of float32, so that the four temporaries of a part take 1 GiB however large the model is.
_PART_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}


class Adan(torch.optim.Optimizer):
    """Step with three averages: gradient, gradient difference, and squared corrected gradient.

    State of a parameter: `exp_avg`, `exp_avg_diff`, `exp_avg_sq`, `previous_grad`, all of its shape, and `step` (a
    float32 scalar on its device). `found_inf` (a device scalar set by train_step, 1 where a gradient is not finite)
    makes the step change no tensor, without a host synchronisation.
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
        """Return a parameter's state, made on its first step; all of it in the gradient's layout."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in _AVERAGES:
                state[name] = torch.zeros_like(grad, memory_format=torch.preserve_format)
        elif state["exp_avg"].stride() != grad.stride():  # from a checkpoint, which keeps no layout
            for name in _AVERAGES:
                state[name] = torch.empty_like(grad).copy_(state[name])
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Make one update of all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Groups of the same betas share the few small operations that their step count needs.
        parts: dict[tuple[Any, ...], list[tuple[dict[str, Any], list[torch.Tensor]]]] = {}
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
            for (device, _), parameters in alike.items():
                parts.setdefault((device, *group["betas"], group["eps"]), []).append((group, parameters))
        for (device, *betas, eps), members in parts.items():
            self._update(members, betas, eps, device)
        return loss

    def _update(
        self,
        members: list[tuple[dict[str, Any], list[torch.Tensor]]],
        betas: list[float],
        eps: float,
        device: torch.device,
    ) -> None:
        """Update (group, parameters); the parameters of one are of one dtype and have made the same number of steps."""
        grads = [[aligned_grad(parameter) for parameter in parameters] for _, parameters in members]
        states = [
            [self._initialise(parameter, grad) for parameter, grad in zip(parameters, own)]
            for (_, parameters), own in zip(members, grads)
        ]
        steps = [state["step"] for own in states for state in own]
        subtract_scaled_(steps, [torch.ones((), device=device)] * len(steps), -1.0, found_inf=self.found_inf)
        scalars = self._scalars(torch.stack([own[0]["step"] for own in states]), betas, eps)
        for index, ((group, parameters), own, state) in enumerate(zip(members, grads, states)):
            lists = [parameters, own, *([each[name] for each in state] for name in _AVERAGES)]
            wide = torch.promote_types(own[0].dtype, torch.float32)
            factors = scalars[:, index].to(wide).unbind()
            for chunk in _cut(lists, _PART_ELEMENTS[device.type]):
                self._update_chunk(group, factors, *chunk)

    def _scalars(self, count: torch.Tensor, betas: list[float], eps: float) -> torch.Tensor:
        """Return the factors that depend on the steps made, `count` [G], and on a skip of this one: float64 [5, G].

        The first is 1 in a skipped step, the second 0 in the first step. With c = 1 - beta ** count, the others belong
        to the update (m / c1 + beta2 * v / c2) / (sqrt(n / c3) + eps), numerator and denominator multiplied by c1.
        """
        count = count.double()  # in float32, 1 - beta ** count would lose two digits in the first steps
        keep = torch.ones_like(count) if self.found_inf is None else (1.0 - self.found_inf.double()).expand_as(count)
        correction1, correction2, correction3 = (1.0 - beta**count for beta in betas)
        return torch.stack(
            [
                betas[0] ** keep,
                (count > 1).double(),
                betas[1] * correction1 / correction2,
                correction1 / correction3.sqrt(),
                eps * correction1,
            ]
        )

    def _update_chunk(
        self,
        group: dict[str, Any],
        factors: Sequence[torch.Tensor],
        parameters: list[torch.Tensor],
        grads: list[torch.Tensor],
        average: list[torch.Tensor],
        difference: list[torch.Tensor],
        square: list[torch.Tensor],
        previous: list[torch.Tensor],
    ) -> None:
        shrink, not_first, of_difference, of_root, eps = factors
        beta1, beta2, beta3 = group["betas"]
        delta = torch._foreach_sub(grads, previous)
        torch._foreach_mul_(delta, not_first)  # on the first step the previous gradient is the gradient itself
        corrected = torch._foreach_add(grads, delta, alpha=beta2)
        torch._foreach_mul_(corrected, corrected)
        torch._foreach_mul_(average, shrink)
        subtract_scaled_(average, grads, beta1 - 1, copy_to=previous, found_inf=self.found_inf)
        subtract_scaled_(difference, delta, beta2 - 1, decay=-1.0, found_inf=self.found_inf)
        subtract_scaled_(square, corrected, beta3 - 1, decay=-1.0, found_inf=self.found_inf)
        denominator = torch._foreach_sqrt(square)
        torch._foreach_mul_(denominator, of_root)
        torch.ops.aten._foreach_add_.Tensor(denominator, eps)  # torch._foreach_add_ would read the scalar on the host
        update = torch._foreach_mul(difference, of_difference)
        torch._foreach_add_(update, average)
        torch._foreach_div_(update, denominator)
        # (theta - lr * u) / (1 + lr * decay) = theta - rate * (u + decay * theta), with
        rate = group["lr"] / (1 + group["lr"] * group["weight_decay"])
        subtract_scaled_(parameters, update, rate, decay=group["weight_decay"], found_inf=self.found_inf)


def _cut(lists: list[list[torch.Tensor]], limit: int) -> Iterator[list[list[torch.Tensor]]]:
    """Cut lists of tensors into parts of at most `limit` elements; on a CPU they stay in its cache."""
    part, size = [[] for _ in lists], 0
    for tensors in zip(*lists):
        count = tensors[0].numel()
        if count > limit:
            flat = list(map(flat_view, tensors))
            for start in range(0, count, limit):
                yield [[vector[start : start + limit]] for vector in flat]
            continue
        if size + count > limit:
            yield part
            part, size = [[] for _ in lists], 0
        for members, tensor in zip(part, tensors):
            members.append(tensor)
        size += count
    if size:
        yield part
