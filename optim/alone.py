"""Steps of single parameters, for a fused backward pass (`optim.fused_backward`) and for bfloat16 (`bf16_weights`)."""

import torch
from torch import Tensor, nn

from optim.build import skips_on_device
from optim.vectors import draw_noise, round_stochastically


@torch.no_grad()
def step_alone(
    optimizer: torch.optim.Optimizer, group: dict, parameter: nn.Parameter, skip: Tensor, number: int
) -> None:
    """Update one parameter of a group, unless `skip`, a device scalar, is 1.

    An optimiser that does not skip on the device works on float32 copies, and takes a skipped gradient as zero.
    bfloat16 is rounded stochastically, seeded by `optimizer.update`, the update's number, and the parameter's `number`.
    """
    every, optimizer.param_groups = optimizer.param_groups, [{**group, "params": [parameter]}]
    try:
        if skips_on_device(optimizer):
            optimizer.found_inf = skip
            optimizer.step()
            return
        copy = nn.Parameter(parameter.to(torch.float32, copy=True))
        copy.grad = torch.where(skip > 0, 0.0, parameter.grad.float())
        optimizer.param_groups[0]["params"], optimizer.state[copy] = [copy], optimizer.state.pop(parameter, {})
        optimizer.step()
        optimizer.state[parameter], values = optimizer.state.pop(copy), copy.detach()
    finally:
        optimizer.param_groups = every
    if parameter.dtype == torch.bfloat16:
        values = round_stochastically(values, draw_noise(values.shape, values.device, optimizer.update, number))
    parameter.copy_(torch.where(skip > 0, parameter, values))


def step_each(optimizer: torch.optim.Optimizer) -> None:
    """Update each parameter that has a gradient, one after another."""
    pairs = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for number, (group, parameter) in enumerate(pairs):
        if parameter.grad is not None:
            step_alone(optimizer, group, parameter, torch.zeros((), device=parameter.device), number)
