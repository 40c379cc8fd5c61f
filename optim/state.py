"""Save and load an optimiser's state by parameter name."""

from itertools import chain

import torch
from torch import Tensor
from torch.optim import Optimizer

from optim.build import skips_on_device
from optim.groups import GroupSettings, parameters_of
from utils.contracts import State, Tensors
from utils.errors import UserError
from utils.io.files import Json, Values

_COUNTS = {"k", "d", "d_max", "d_numerator"}  # of Prodigy, in its groups
# Keys of a group that optim/groups.py sets from the configuration.
_SET_ANEW = {"params", "names", "weight_decay", "lr", *GroupSettings._fields}


def optimizer_state(optimizer: Optimizer) -> tuple[State, Json]:
    """Return the optimiser's tensors and other values by `<parameter>/<key>`.

    The state of a group (timm's lamb and adan count steps there) is under `<first parameter>//<key>`.
    """
    state = {}
    for group in optimizer.param_groups:
        for key in group.keys() - (optimizer.defaults.keys() - _COUNTS) - _SET_ANEW:
            state[f"{group['names'][0]}//{key}"] = group[key]
        for name, parameter in zip(group["names"], group["params"]):
            state |= {f"{name}/{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def load_optimizer_state(optimizer: Optimizer, tensors: Tensors, others: Values, source: str) -> None:
    """Load the state of an optimiser of the same kind. Raises UserError if it has other parameters."""
    groups = {group["names"][0]: group for group in optimizer.param_groups}
    names = list(chain.from_iterable(group["names"] for group in groups.values()))
    parameters = dict(zip(names, parameters_of(optimizer)))
    numbers = {name: number for number, name in enumerate(names)}
    state = {}
    for full, value in [*tensors.items(), *others.items()]:
        name, _, key = full.rpartition("/")
        is_group = name.endswith("/")
        if name.removesuffix("/") not in (groups if is_group else parameters):
            raise UserError(f"resume: the optimiser of {source} has {full!r}, which this model's does not have")
        if is_group:
            group = groups[name.removesuffix("/")]
            group[key] = value.to(group["params"][0].device) if isinstance(value, Tensor) else value
            continue
        parameter = parameters[name]
        if skips_on_device(optimizer):
            # A file stores no memory layout, the kernels do not check it, and load_state_dict does not restore it.
            value = value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
        state.setdefault(numbers[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
