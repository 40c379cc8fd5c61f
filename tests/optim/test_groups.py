"""Parameter groups. Properties (a partition of what is trainable), literal tables (who is spared decay), refusals."""

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from bench.measure import read_values
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from optim.config import OptimConfig
from optim.groups import build_groups as build
from optim.groups import set_group_values
from optim.schedules import GroupValues
from tests.support import refuses

DEPTHS = [1, 2, 3, 1]


def config(name="adamw", **changes):
    return TypeAdapter(OptimConfig).validate_python(read_values("optim", name) | changes)


def encoder(num_classes):
    return ConvNeXtV2(
        in_channels=3, num_classes=num_classes, depths=DEPTHS, dims=[4, 8, 8, 12], stem_stride=4, drop_path_rate=0.0,
        head_init_scale=1.0,
    )  # fmt: skip


def owner(network):
    """A module that owns a network as a task does."""
    task = nn.Module()
    task.network = network
    return task


def build_groups(task, config):
    return build(task, {"network": task.network} if hasattr(task, "network") else {}, config)


def classifier():
    return owner(encoder(5))


def fcmae():
    network = FCMAE(
        encoder=encoder(0), patch_px=32, decoder_dim=8, decoder_depth=1, mask_ratio=0.5,
    )  # fmt: skip
    return owner(network)


def rule(match, **settings):
    return {"match": match, **settings}


def by_name(groups):
    """Name -> group, after checking that names and parameters belong together."""
    found = {}
    for group in groups:
        assert len(group["names"]) == len(group["params"])
        for name in group["names"]:
            assert name not in found, f"{name} is in two groups"
            found[name] = group
    return found


@pytest.mark.parametrize("make, decay", [(classifier, 1.0), (fcmae, 0.7)])
def test_groups_partition_the_trainable_parameters(make, decay):
    task = make()
    named = dict(task.named_parameters())
    groups = build_groups(task, config(layer_decay=decay, layer_decay_kind="group"))
    assert set(by_name(groups)) == set(named)
    for group in groups:
        assert all(named[name] is parameter for name, parameter in zip(group["names"], group["params"]))
    keys = [(group["lr_scale"], group["fixed_decay"] is None) for group in groups]
    assert keys == sorted(set(keys)) and keys[-1] == (1.0, True)


def test_rules_set_what_they_state_and_nothing_else():
    rules = [
        rule("*.dwconv.weight", weight_decay=0.0),
        rule("network.head.*", lr_scale=10.0, freeze_steps=3),
        rule("network.head.bias", weight_decay=0.3, lr_scale=0.5),
    ]
    usual = by_name(build_groups(classifier(), config(layer_decay=0.5)))
    found = by_name(build_groups(classifier(), config(layer_decay=0.5, rules=rules)))
    keys = ("lr_scale", "freeze_steps", "fixed_decay")
    values = {name: tuple(group[key] for key in keys) for name, group in found.items()}
    kernels = {name for name in usual if name.endswith(".dwconv.weight")}
    changed = {name for name in usual if values[name] != tuple(usual[name][key] for key in keys)}
    assert changed == {"network.head.weight", "network.head.bias", *kernels}
    for name in kernels:
        assert found[name]["fixed_decay"] == 0.0 and found[name]["lr_scale"] == usual[name]["lr_scale"] < 1
    assert values["network.head.weight"] == (10.0, 3, None)
    assert values["network.head.bias"] == (5.0, 3, 0.3)


@pytest.mark.parametrize(
    "rules, message",
    [
        ([rule("network.heed.weight", lr_scale=0.5)], r"optim\.rules\.0\.match: .* close: .*network\.head\.weight"),
        ([rule("Network.head.weight", lr_scale=0.5)], "optim.rules.0.match"),  # patterns tell capital letters
        ([rule("network.head.*", weight_decay=0.5), rule("*.weight", weight_decay=2.0)], r"optim\.rules\.1\.weight"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, message):
    with refuses(f"^{message}"):
        build_groups(classifier(), config(rules=rules))


def test_every_group_gets_its_share_of_the_rate_and_its_decay():
    rules = [rule("network.head.*", weight_decay=0.3, lr_scale=0.25)]
    groups = build_groups(classifier(), config(layer_decay=0.5, rules=rules))
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999))
    for _ in range(2):  # values are set, not multiplied up
        set_group_values(optimizer, GroupValues(0.2, 0.05, None))
    for group in optimizer.param_groups:
        head = any(name.startswith("network.head.") for name in group["names"])
        assert group["lr"] == 0.2 * group["lr_scale"]
        assert group["weight_decay"] == (0.3 if head else 0.05 if group["fixed_decay"] is None else 0.0)
        assert group["betas"] == (0.9, 0.999)
    assert {group["lr"] for group in optimizer.param_groups} == {0.2 * 0.5**exponent for exponent in {2, *range(8)}}


def test_momentum_is_beta1_or_momentum():
    groups = [build_groups(classifier(), config()) for _ in "ab"]
    adam, sgd = torch.optim.AdamW(groups[0], betas=(0.9, 0.999)), torch.optim.SGD(groups[1], momentum=0.9)
    for optimizer in (adam, sgd):
        set_group_values(optimizer, GroupValues(0.1, 0.0, 0.85))
    assert all(group["betas"] == (0.85, 0.999) for group in adam.param_groups)
    assert all(group["momentum"] == 0.85 for group in sgd.param_groups)
