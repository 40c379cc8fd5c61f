"""Build optimisers from the configuration."""

from typing import assert_never

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optim.config import OneCycleConfig, OptimConfig, ScheduleConfig
from optim.groups import parameters_of
from utils.errors import UserError, close_names
from utils.start import open_name


def skips_on_device(optimizer: Optimizer) -> bool:
    """Return whether the optimiser skips a step by itself if `found_inf` is 1, without a host synchronisation."""
    return any(group.get("fused") for group in optimizer.param_groups)


def step_by_gradients(optimizer: Optimizer, applied: Tensor, step: int) -> None:
    """Make update number `step` of all parameters, unless `applied`, a device scalar, is 0.

    This waits for the device only if the optimiser counts its steps on the host.
    """
    skip = 1.0 - applied
    if skips_on_device(optimizer):
        optimizer.found_inf = skip
    elif optimizer.param_groups[0].get("capturable"):
        _step_or_stay(optimizer, applied)
        return
    elif skip:
        return
    if optimizer.param_groups[0]["params"][0].dtype == torch.bfloat16:
        open_name("optim.alone:step_each")(optimizer, skip, step)
    else:
        optimizer.step()


@torch.no_grad()
def _step_or_stay(optimizer: Optimizer, applied: Tensor) -> None:
    """Make a step of an optimiser whose state is on the device, such as Muon; it changes nothing if `applied` is 0.

    Then gradients, which may not be finite, and rates become 0, so weights stay, and a momentum of 1 keeps its average.
    Other state is small and is put back. A float32 is selected by its bits, times 1 or 0, because NaN times 0 is NaN.
    """
    groups = optimizer.param_groups
    one = applied.int()
    gradients = [each.grad for each in parameters_of(optimizer) if each.grad is not None]
    torch._foreach_mul_([each.view(torch.int32) for each in gradients], one)
    tensors, _ = open_name("optim.state:optimizer_state")(optimizer)
    small = [value for name, value in tensors.items() if not name.endswith("momentum_buffer")]
    state = [each.view(torch.int32) for each in (one.clone(), *small)]  # never none
    before = torch._foreach_mul(state, 1 - one)
    optimizer.param_groups = [
        {**group, "lr": group["lr"] * applied, "momentum": torch.where(applied > 0, group.get("momentum", 0.0), 1.0)}
        for group in groups
    ]
    optimizer.step()
    optimizer.param_groups = groups
    torch._foreach_mul_(state, one)
    torch._foreach_add_(state, before)


def build_optimizer(config: OptimConfig, groups: list[dict], lr: float) -> Optimizer:
    """Build the optimiser. groups: from `build_groups`; lr: the peak learning rate before a group's scale."""
    optimizer = _build(config, groups, lr)
    for group in optimizer.param_groups:
        if "capturable" in group and all(parameter.is_cuda for parameter in group["params"]):
            group["capturable"] = True
    return optimizer


def _build(config: OptimConfig, groups: list[dict], lr: float) -> Optimizer:
    match config.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=tuple(config.betas), fused=True)
        case "prodigy":
            from prodigyopt import Prodigy

            return Prodigy(groups, lr=lr, betas=tuple(config.betas), **config.extra)
        case "sgd":
            optimizer = torch.optim.SGD(groups, lr, config.momentum, nesterov=config.momentum > 0, fused=True)
            # torch would create the buffers in the first step, and leave them uninitialised if that step is skipped.
            # Needed without momentum too, because a one-cycle schedule sets it.
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return optimizer
        case "timm":
            return _timm_class(config.opt)(groups, lr=lr, **config.extra)
        case _:
            assert_never(config.name)


def _timm_class(opt: str) -> type[Optimizer]:
    """Return a class of timm with its defaults. Raises UserError (`optim.opt`) if it cannot be used here."""
    import timm.optim  # takes 0.8 s

    if opt.startswith(("kron", "adahessian")):
        raise UserError(
            f"optim.opt: {opt} is not supported: it needs second derivatives, or random state that checkpoints do not "
            "hold; choose another, such as optim.opt=nadamw"
        )
    try:
        return timm.optim.get_optimizer_class(opt)
    except (ValueError, AssertionError, ImportError) as error:  # unknown; apex or bitsandbytes without a GPU
        advice = close_names(opt, timm.optim.list_optimizers())
        raise UserError(f"optim.opt: {opt!r} cannot be used here ({error}); {advice}") from error


def check_optimizer(config: OptimConfig, schedule: ScheduleConfig) -> None:
    """Raise UserError if a library's optimiser cannot be built or step, or has no betas for the schedule."""
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    try:
        optimizer = build_optimizer(config, [{"params": [parameter], "weight_decay": 0.0}], 0.1)
        runs_on_cpu = hasattr(config, "extra") and not getattr(config, "opt", "").startswith(("bnb", "fused"))
        if runs_on_cpu:
            optimizer.step()
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        key = "extra" if hasattr(config, "extra") else "name"
        raise UserError(f"optim.{key}: {getattr(config, 'opt', config.name)} refuses its keys: {error}") from error
    moves = isinstance(schedule, OneCycleConfig) and schedule.cycle_momentum
    if moves and config.name == "timm" and "betas" not in optimizer.param_groups[0]:
        raise UserError(
            f"schedule.cycle_momentum: true changes beta1, which timm's {config.opt} does not have; set "
            "schedule.cycle_momentum=false, or another optimiser, such as optim=sgd, optim=adamw or optim=muon"
        )
