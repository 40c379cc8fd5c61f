"""The base of our own optimisers: they step on vectors of many parameters, and skip a step on the device."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Elements of a vector. CPU: of 2**14 to 2**20 the fastest on convnextv2_atto, whose caches hold all that one step
# touches. GPU: 64 MiB for each of about fifteen float32 temporaries, however large the model is.
PART_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}


class VectorOptimizer(torch.optim.Optimizer):
    """Step on each group part by part; a part is the memory of some of its parameters, joined to one vector.

    State of a parameter: `averages`, of its shape, dtype and layout, and `step`, a float32 scalar on its device. Groups
    have the same betas and eps; the parameters of one have made the same number of steps.

    Set by train_step: `found_inf`, a device scalar, 1 where a gradient is not finite (the step then changes no tensor,
    without a host synchronisation), and `update`, the number of the update.
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
        """Return what follows from the steps made, counts float64 [G] from 1 on: float64 [F, G].

        keep: 0 where this step is skipped, else 1; the weight of what a step adds is a multiple of it.
        """
        raise NotImplementedError

    def stepped(
        self, vectors: Sequence[Tensor], grads: Tensor, group: dict[str, Any], factors: Sequence[Tensor], part: int
    ) -> Sequence[Tensor]:
        """Return the weights and `averages` after a step, vectors of float32 or wider that it may change; part: number.

        The gradients of a step that is skipped are 0.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:
        """Make one update of all groups."""
        members = [(group, [one for one in group["params"] if one.grad is not None]) for group in self.param_groups]
        members = [(group, parameters) for group, parameters in members if parameters]
        steps = [[self._state_of(parameter)["step"] for parameter in parameters] for _, parameters in members]
        if not members:
            return
        keep = steps[0][0].new_ones(()) if self.found_inf is None else 1.0 - self.found_inf
        # torch._foreach_add_ would read the scalar on the host.
        torch.ops.aten._foreach_add_.Tensor([step for own in steps for step in own], keep)
        counts = torch.stack([own[0] for own in steps]).clamp(min=1).double()  # float32 loses digits of 1 - beta**count
        factors = self.factors(counts, keep.double().expand_as(counts), members[0][0])
        number = 0
        for (group, parameters), own in zip(members, factors.unbind(1)):
            own = own.to(torch.promote_types(parameters[0].dtype, torch.float32))
            for part in _parts(map(self._vectors, parameters), PART_ELEMENTS[own.device.type]):
                columns = list(zip(*part))
                joined = [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in columns]
                grads, *stored = (vector.to(own.dtype) for vector in joined)
                grads = (grads * keep).nan_to_num_(0.0, 0.0, 0.0)  # all 0 where the step is skipped
                made = self.stepped(stored, grads, group, own.unbind(), number)
                for pieces, vector in zip(columns[1:], made):
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
        """Return gradient, weights and averages of a parameter as vectors, in the order of the parameter's memory."""
        grad = parameter.grad
        if grad.stride() != parameter.stride():
            grad = torch.empty_like(parameter).copy_(grad)
        return [flat_view(tensor) for tensor in (grad, parameter, *(self.state[parameter][n] for n in self.averages))]


def flat_view(tensor: Tensor) -> Tensor:
    """Return a view of a dense tensor's memory as a vector, for any order of its axes."""
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).view(-1)


def _parts(rows: Iterable[list[Tensor]], limit: int) -> Iterator[list[tuple[Tensor, ...]]]:
    """Yield parts of at most `limit` elements of rows of equally long vectors; longer vectors are cut."""
    part: list[tuple[Tensor, ...]] = []
    size = 0
    for row in rows:
        for pieces in zip(*(vector.split(limit) for vector in row)):
            if len(pieces[0]) > limit // 8:  # worth a part of its own, which nothing is copied for
                yield [pieces]
                continue
            if part and size + len(pieces[0]) > limit:
                yield part
                part, size = [], 0
            part.append(pieces)
            size += len(pieces[0])
    if part:
        yield part
