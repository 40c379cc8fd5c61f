"""Parameter groups. Every trainable parameter is in exactly one.

A parameter's group depends on layer decay, its shape (vectors have no weight decay), and `optim.rules`, which take
precedence.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from optim.config import OptimConfig, RuleConfig
from optim.schedules import GroupValues
from utils.errors import UserError, close_names
from utils.io.files import Json, Values
from utils.record.figures import align_columns


class GroupSettings(NamedTuple):
    """The settings of a group."""

    lr_scale: float
    fixed_decay: float | None  # from a rule, or 0 for vectors; None: scheduled
    freeze_steps: int


def is_vector(parameter: nn.Parameter) -> bool:
    """Return whether a parameter has at most one axis longer than 1, as GRN's (1, 1, 1, C)."""
    return len([size for size in parameter.shape if size > 1]) <= 1


def build_groups(task: nn.Module, networks: Mapping[str, nn.Module], config: OptimConfig) -> list[dict]:
    """Return the optimiser groups of a task's trainable parameters.

    networks: the trained networks by name; layer decay applies within each, and other parameters have scale 1.
    Beside the optimiser's keys, a group has `names` and the fields of GroupSettings.
    Raises UserError (`optim.rules`) if a pattern matches nothing, two rules conflict in another key than lr_scale, or
    all is frozen.
    """
    parameters = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise UserError("model: the task has no trainable parameter")
    scales = {
        f"{network_name}.{name}": scale
        for network_name, network in networks.items()
        for name, scale in layer_scales(network, config.layer_decay_kind, config.layer_decay).items()
    }
    rules = _apply_rules(list(parameters), config.rules)
    if (frozen := min(rule.get("freeze_steps", 0) for rule in rules.values())) > 0:
        raise UserError(
            f"optim.rules: freeze_steps freezes every parameter for the first {frozen:,} steps; exempt some, such as "
            "network.head.*"
        )
    groups = {}
    for name, parameter in parameters.items():
        rule = rules[name]
        scale = scales.get(name, 1.0) * rule.get("lr_scale", 1.0)
        decay = rule.get("weight_decay", 0.0 if is_vector(parameter) else None)
        settings = GroupSettings(scale, decay, rule.get("freeze_steps", 0))
        group = groups.setdefault(settings, {"params": [], "names": [], **settings._asdict(), "weight_decay": 0.0})
        group["params"].append(parameter)
        group["names"].append(name)
    # Scheduled weight decay comes after a fixed one.
    order = sorted(groups, key=lambda settings: [math.inf if value is None else value for value in settings])
    return [groups[settings] for settings in order]


def layer_scales(network: nn.Module, kind: str, decay: float) -> dict[str, float]:
    """Return each parameter's learning-rate scale, by name: decay ** (last + 1 - k) in layer k.

    The network numbers its layers: `layer_of(name, kind)` and `last_layer(kind)` (models/convnextv2.py), or timm's
    `group_matcher`. Raises UserError if it has no layers of `kind`.
    Source: facebookresearch/ConvNeXt-V2:optim_factory.py (`single`, `group`); huggingface/pytorch-image-models
    timm/optim/_param_groups.py (`timm`).
    """
    names = [name for name, _ in network.named_parameters()]
    if decay == 1.0:
        return dict.fromkeys(names, 1.0)
    if hasattr(network, "layer_of"):
        head = network.last_layer(kind) + 1
        return {name: decay ** (head - network.layer_of(name, kind)) for name in names}
    if not hasattr(network, "group_matcher"):
        raise UserError(
            f"optim.layer_decay: {decay:g} needs a network with numbered layers, but {type(network).__name__} has "
            "none; set optim.layer_decay=1.0, or choose a ConvNeXt V2 or a network of timm"
        )
    if kind != "timm":
        raise UserError(
            f"optim.layer_decay_kind: {kind} is for ConvNeXt V2, but {type(network).__name__} is a network of timm; "
            "set optim.layer_decay_kind=timm"
        )
    from timm.models import group_parameters

    # Same as timm.optim.param_groups_layer_decay.
    layers = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def _apply_rules(names: Sequence[str], rules: Sequence[RuleConfig]) -> dict[str, Json]:
    """Return the fields that the rules set, by parameter; the scales of several rules are multiplied."""
    settings = {name: {} for name in names}
    sources = {}
    for index, rule in enumerate(rules):
        matched = [name for name in names if fnmatch.fnmatchcase(name, rule.match)]
        if not matched:
            raise UserError(
                f"optim.rules.{index}.match: {rule.match!r} matches no parameter; {close_names(rule.match, names)}"
            )
        fields = rule.model_dump(exclude={"match"}, exclude_none=True)
        for name in matched:
            for field in fields.keys() & settings[name].keys() - {"lr_scale"}:
                raise UserError(
                    f"optim.rules.{index}.{field}: {rule.match!r} and {sources[name, field]!r} both set it for "
                    f"{name}; make their patterns disjoint"
                )
            scale = settings[name].get("lr_scale", 1.0) * fields.get("lr_scale", 1.0)
            settings[name] |= {**fields, "lr_scale": scale}
            sources |= {(name, field): rule.match for field in fields}
    return settings


def groups_table(groups: list[dict]) -> str:
    """Return the groups as a table: rate scale, weight decay, frozen steps, tensors, parameters, an example."""
    rows = [("lr scale", "decay", "frozen", "tensors", "parameters", "first")]
    for group in groups:
        decay = "yes" if group["fixed_decay"] is None else f"{group['fixed_decay']:g}"
        count = sum(parameter.numel() for parameter in group["params"])
        sizes = (str(group["freeze_steps"]), str(len(group["names"])), f"{count:,}")
        rows.append((f"{group['lr_scale']:.5f}", decay, *sizes, group["names"][0]))
    return align_columns(rows)


def set_group_values(optimizer: Optimizer, values: GroupValues) -> None:
    """Set every group's lr times its scale, weight decay unless fixed, and momentum or beta1 (Muon has both)."""
    for group in optimizer.param_groups:
        group["lr"] = values.lr * group["lr_scale"]
        fixed = group["fixed_decay"]
        group["weight_decay"] = values.weight_decay if fixed is None else fixed
        if values.momentum is None:
            continue
        if "betas" in group:
            group["betas"] = (values.momentum, *group["betas"][1:])
        if "momentum" in group:
            group["momentum"] = values.momentum


def set_peak_lr(optimizer: Optimizer, lr: float) -> None:
    """Set a new peak learning rate in timm's optimisers that decay weights by lr**2 / peak (adamc, sgdc, ...)."""
    for group in optimizer.param_groups:
        if "max_lr_snapshot" in group:
            group["max_lr_snapshot"] = lr


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of all groups, in order."""
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def is_frozen(group: Values, step: int) -> bool:
    """Return whether a group is frozen in update number `step` (from 0)."""
    return step < group.get("freeze_steps", 0)
