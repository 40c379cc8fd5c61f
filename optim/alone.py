"""An optimiser's step of each parameter alone.

It is made in a fused backward pass (`optim.fused_backward`), and of bfloat16 weights (`optim.bf16_weights`). These are
updated in float32 and rounded stochastically: rounding to nearest would lose updates below 1/512 of a weight, which are
most. Source: Zamirai et al. 2020 (arXiv 2010.06192), section 3.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optim.build import skips_on_device
from optim.groups import is_frozen
from utils import rng
from utils.errors import UserError


def step_each(optimizer: Optimizer, skip: Tensor, step: int) -> None:
    """Update the parameters that have a gradient one after another, unless `skip`, a device scalar, is 1."""
    pairs = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for number, (group, parameter) in enumerate(pairs):
        if parameter.grad is not None:
            _step_alone(optimizer, group, parameter, skip, (step, number))


@torch.no_grad()
def _step_alone(
    optimizer: Optimizer, group: dict, parameter: nn.Parameter, skip: Tensor, numbers: tuple[int, int]
) -> None:
    """Update one parameter of a group, unless `skip`, a device scalar, is 1.

    numbers: of the update and of the parameter; they seed the noise of rounding.
    """
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [parameter]}]
    skips = skips_on_device(optimizer)
    if skips:
        optimizer.found_inf = skip
    try:
        if skips and parameter.dtype != torch.bfloat16:
            optimizer.step()
        else:
            _step_copy(optimizer, parameter, skip, numbers)
    finally:
        optimizer.param_groups = groups


def _step_copy(optimizer: Optimizer, parameter: nn.Parameter, skip: Tensor, numbers: tuple[int, int]) -> None:
    """Update a float32 copy of the only parameter of an optimiser, and store it.

    An optimiser that cannot skip on the device takes a skipped gradient as zero. torch's AdamW has its averages in the
    dtype of the weights; timm's Adafactor, whose state is small, in float32.
    """
    is_bf16 = parameter.dtype == torch.bfloat16
    rounded = ("exp_avg", "exp_avg_sq") if is_bf16 and isinstance(optimizer, torch.optim.AdamW) else ()
    copy = nn.Parameter(parameter.to(torch.float32, copy=True))
    copy.grad = torch.empty_like(copy).copy_(torch.where(skip > 0, 0.0, parameter.grad))
    optimizer.param_groups[0]["params"] = [copy]
    state = optimizer.state.pop(parameter, {})
    optimizer.state[copy] = state | {key: state[key].float() for key in rounded if key in state}
    optimizer.step()
    state = optimizer.state.pop(copy)
    values = torch.where(skip > 0, parameter, copy)
    if is_bf16:
        generator = torch.Generator(values.device).manual_seed(rng.hash_counters(*numbers))
        values = round_stochastically(values, generator)
        state |= {key: round_stochastically(state[key], generator) for key in rounded}
    optimizer.state[parameter] = state
    parameter.copy_(values)


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 values up or down to bfloat16 at random, so that the expected value is exact.

    A bfloat16 is the upper half of a float32. Adding a random lower half carries into it with the right probability.
    """
    noise = torch.empty_like(values, dtype=torch.int32).random_(1 << 16, generator=generator)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


class FusedBackward:
    """Update each parameter once its gradient is complete, and free the gradient (`optim.fused_backward`).

    The updates equal those after a whole backward pass, bit for bit. A loss that is not finite, or no weight, skips the
    update; a gradient that is not finite skips its own parameter, and the step counts as skipped.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._norms = {}
        self._skip = None
        self._step = 0
        self._is_off = False
        groups = enumerate(optimizer.param_groups)  # `load_state_dict` replaces them, but keeps their order
        pairs = [(index, parameter) for index, group in groups for parameter in group["params"]]
        self._places = {parameter: (index, number) for number, (index, parameter) in enumerate(pairs)}
        for parameter in self._places:
            parameter.register_post_accumulate_grad_hook(self._update)

    def begin(self, step: int, loss: Tensor, weight: Tensor) -> None:
        """Begin update number `step`: its backward pass updates the parameters. loss: the weighted sum."""
        self._step = step
        self._skip = (~torch.isfinite(loss) | (weight == 0)).float()
        self._norms = {}
        # An optimiser that counts its steps on the host waits for the loss.
        self._is_off = not skips_on_device(self._optimizer) and bool(self._skip)

    def end(self) -> list[Tensor]:
        """Return the norms of the gradients, in the optimiser's order."""
        self._skip = None
        return [self._norms[parameter] for parameter in self._places if parameter in self._norms]

    def _update(self, parameter: nn.Parameter) -> None:
        if self._skip is None:
            return
        assert parameter not in self._norms, "the backward pass computes a gradient in two parts"
        index, number = self._places[parameter]
        group = self._optimizer.param_groups[index]
        if not is_frozen(group, self._step):
            (norm,) = torch._foreach_norm([parameter.grad])
            self._norms[parameter] = norm
            if not self._is_off:
                skip = torch.where(torch.isfinite(norm), self._skip, 1.0)
                _step_alone(self._optimizer, group, parameter, skip, (self._step, number))
        parameter.grad = None


def store_in_bf16(parameters: Iterable[nn.Parameter], precision: str) -> None:
    """Convert the trained parameters. Raises UserError (`optim.bf16_weights`) unless activations are bfloat16."""
    if precision != "bf16":
        raise UserError(
            f"optim.bf16_weights: true needs runtime.precision=bf16, not {precision}; change one of the two"
        )
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
