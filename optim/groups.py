"""Parameter groups that refuse to guess: every trainable parameter in exactly one, and no pattern without a match."""

import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from optim.config import OptimConfig
from optim.layer_decay import layer_scale
from utils.errors import UserError, close_names


def is_exempt(name: str, parameter: nn.Parameter, patterns: Sequence[str]) -> bool:
    """Return whether a parameter is spared weight decay: vectors by logical shape (biases, norms, GRN), or a pattern.

    The logical shape leaves out axes of size 1, so that GRN's (1, 1, 1, C) counts as the vector that it is.
    """
    logical = [size for size in parameter.shape if size > 1]
    return len(logical) <= 1 or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def trainable_parameters(task: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that receive gradients, by name."""
    return {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}


def build_groups(task: nn.Module, config: OptimConfig, depths: Sequence[int] | None) -> list[dict]:
    """Return optimiser groups with `names`, `lr_scale` and `decays`, one per (layer scale, decay or not).

    Raises UserError where a pattern of optim.no_decay matches nothing or where nothing is trainable.
    """
    parameters = trainable_parameters(task)
    if not parameters:
        raise UserError("model: no parameter of the task is trainable; nothing to optimise")
    for pattern in config.no_decay:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in parameters):
            raise UserError(f"optim.no_decay: {pattern!r} matches no parameter; {close_names(pattern, parameters)}")
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in parameters.items():
        scale = layer_scale(name, depths, config.layer_decay_kind, config.layer_decay)
        decays = not is_exempt(name, parameter, config.no_decay)
        group = groups.setdefault(
            (scale, decays), {"params": [], "names": [], "lr_scale": scale, "decays": decays, "weight_decay": 0.0}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    ordered = [groups[key] for key in sorted(groups)]
    assert sum(len(group["names"]) for group in ordered) == len(parameters)
    return ordered


def groups_table(groups: list[dict]) -> str:
    """Return the groups as a table: scale of the rate, decayed or not, tensors, parameters, an example."""
    lines = [f"{'lr scale':>9}  {'decay':<5}  {'tensors':>7}  {'parameters':>12}  first"]
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        decays = "yes" if group["decays"] else "no"
        lines.append(
            f"{group['lr_scale']:>9.5f}  {decays:<5}  {len(group['names']):>7}  {count:>12,}  {group['names'][0]}"
        )
    return "\n".join(lines)


def set_group_values(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, momentum: float | None) -> None:
    """Give every group its scheduled values: lr times its scale, weight decay where it decays, momentum or beta1."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
        if momentum is None:
            continue
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        else:
            group["momentum"] = momentum
