"""An optimiser's state by parameter name: saved in checkpoints, and loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.build import skips_on_device
from utils.errors import UserError
from utils.ranks import sharded
from utils.ranks.sharded import Part

# Settings that optim/groups.py puts into a group; they follow from the configuration.
_GROUP_SETTINGS = {
    *("params", "names", "lr_scale", "decays", "fixed_decay", "freeze_steps"),
    *("weight_decay", "lr"),
}


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
            (tensors if isinstance(group[key], Tensor) else others)[f"{group['names'][0]}//{key}"] = group[key]
        for name, parameter in zip(group["names"], group["params"]):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(parameter, Part) and isinstance(value, Tensor) and value.ndim > 0:
                    value = sharded.as_shared(value, parameter.whole)
                (tensors if isinstance(value, Tensor) else others)[f"{name}/{key}"] = value
    return tensors, others


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], others: Mapping[str, Any], source: str
) -> None:
    """Load a saved state of the same kind of optimiser. Raises UserError where it is over other parameters."""
    groups = {group["names"][0]: group for group in optimizer.param_groups}
    parameters = {
        name: parameter for group in groups.values() for name, parameter in zip(group["names"], group["params"])
    }
    index = {name: position for position, name in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    for full, value in [*tensors.items(), *others.items()]:
        name, _, key = full.rpartition("/")
        of_group = name.endswith("/")
        if name.removesuffix("/") not in (groups if of_group else parameters):
            raise UserError(f"resume: the optimiser of {source} has {full!r}, which is not of this model's optimiser")
        if of_group:
            group = groups[name.removesuffix("/")]
            group[key] = value.to(group["params"][0].device) if isinstance(value, Tensor) else value
            continue
        parameter = parameters[name]
        if isinstance(parameter, Part) and isinstance(value, Tensor) and value.ndim > 0:
            value = sharded.take_part(value, parameter.whole)
        if skips_on_device(optimizer):
            # A file keeps neither memory layout nor device, and the kernels check neither. load_state_dict restores the
            # device only for groups with `fused`, which Adan's do not have, and the layout never.
            value = value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
        state.setdefault(index[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
