"""An optimiser's state by parameter name: saved in checkpoints, checked, and loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.build import skips_on_device
from utils.errors import UserError
from utils.ranks import sharded
from utils.ranks.sharded import Part

_ELSEWHERE = "give another run_dir, or use init_from=RUN to start from its weights"
# Settings that optim/groups.py puts into a group; they follow from the configuration.
_GROUP_SETTINGS = {
    *("params", "names", "lr_scale", "decays", "fixed_decay", "freeze_steps"),
    *("weight_decay", "lr"),
}
_GROUP_STATE = {"step"}  # what timm's optimisers add to a group in their first step


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimiser's state by parameter name, `<parameter>/<key>`: tensors, and other values.

    State of the shape of a parameter's rows is sharded like the parameter (optim/build.py: check_shardable). State that
    an optimiser keeps in its groups (timm's lamb and adan count steps there) is under `<first parameter's
    name>//<key>`.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for key in group.keys() - optimizer.defaults.keys() - _GROUP_SETTINGS:
            value = group[key]
            (tensors if isinstance(value, Tensor) else others)[f"{group['names'][0]}//{key}"] = value
        for name, parameter in zip(group["names"], group["params"]):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(parameter, Part) and isinstance(value, Tensor) and value.ndim > 0:
                    value = sharded.as_shared(value, parameter.whole)
                (tensors if isinstance(value, Tensor) else others)[f"{name}/{key}"] = value
    return tensors, others


def check_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], others: Mapping[str, Any], path: str
) -> None:
    """Raise UserError where a saved state, which may be on the meta device, cannot be this optimiser's.

    Fused kernels (torch's, those of Adan, and bitsandbytes' AdamW8bit) walk through memory by the size of the parameter
    alone, so their state must be what they would make themselves. timm's optimisers may keep other shapes (adafactor
    keeps rows and columns): torch's operations check these themselves. bitsandbytes' other kernels, which timm can
    name, do not: load their state only from checkpoints that you trust.
    """
    parameters = {
        name: parameter for group in optimizer.param_groups for name, parameter in zip(group["names"], group["params"])
    }
    groups = {group["names"][0]: group for group in optimizer.param_groups}
    fused = skips_on_device(optimizer)
    for full, value in [*tensors.items(), *others.items()]:
        name, _, key = full.rpartition("/")
        if name.endswith("/"):
            group = groups.get(name[:-1])
            if group is None:
                raise UserError(f"resume: the optimiser of {path} has other parameter groups (optim.*)")
            settings = optimizer.defaults.keys() | _GROUP_SETTINGS
            if fused or key in settings or key not in group.keys() | _GROUP_STATE:
                raise UserError(f"resume: {path} holds {full!r}, which is not state of this optimiser; {_ELSEWHERE}")
            continue
        if name not in parameters:
            raise UserError(f"resume: the optimiser of {path} knows {name!r}, which this model does not have")
        wanted = _wanted(optimizer, key, getattr(parameters[name], "whole", parameters[name]))
        if wanted is None:
            continue
        found = (
            (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (type(value).__name__, "not a tensor")
        )
        if found != wanted:
            raise UserError(
                f"resume: {full!r} of the optimiser of {path} is {found[0]} ({found[1]}), where this model needs "
                f"{wanted[0]} ({wanted[1]}); {_ELSEWHERE}"
            )


def _wanted(optimizer: torch.optim.Optimizer, key: str, own: Tensor) -> tuple[Any, Any] | None:
    """Return the shape and dtype of the state of a parameter that its kernel does not check; None where it does.

    Source for 8 bits: bitsandbytes:optim/optimizer.py, whose scales are those of 256 elements each.
    """
    if skips_on_device(optimizer):
        return ((), torch.float32) if key == "step" else (tuple(own.shape), own.dtype)
    if type(optimizer).__name__ != "AdamW8bit":
        return None
    average = (tuple(own.shape), torch.uint8 if own.numel() >= 4096 else torch.float32)
    scales, values = ((-(-own.numel() // 256),), torch.float32), ((256,), torch.float32)
    known = {"step": ("int", "not a tensor"), "state": average, "absmax": scales, "qmap": values}
    return known.get(key.rstrip("12"), ("nothing", "no state of it"))


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], others: dict[str, Any], path: str = "the checkpoint"
) -> None:
    """Load a saved state. Raises UserError where it cannot be this optimiser's over these parameters."""
    check_optimizer_state(optimizer, tensors, others, path)
    fused = skips_on_device(optimizer)
    names = [name for group in optimizer.param_groups for name in group["names"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {name: position for position, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    groups = {group["names"][0]: group for group in optimizer.param_groups}
    for full, value in [*tensors.items(), *others.items()]:
        name, _, key = full.rpartition("/")
        if name.endswith("/"):
            group = groups[name[:-1]]
            group[key] = value.to(group["params"][0].device) if isinstance(value, Tensor) else value
            continue
        parameter = parameters[index[name]]
        if isinstance(parameter, Part) and isinstance(value, Tensor) and value.ndim > 0:
            value = sharded.take_part(value, parameter.whole)
        if fused:
            # A file keeps neither memory layout nor device, and the kernels check neither. load_state_dict restores the
            # device only for groups with `fused`, which Adan's do not have, and the layout never.
            value = value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
        state.setdefault(index[name], {})[key] = value
    current = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
