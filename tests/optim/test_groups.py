"""Parameter groups. Properties (a partition of what is trainable), literal tables (who is spared decay), refusals."""

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch import nn

from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from optim.config import OptimConfig
from optim.groups import build_groups, groups_table, is_exempt, set_group_values, trainable_parameters
from utils.config.entry_point import CONF
from utils.errors import UserError

DEPTHS = [1, 2, 3, 1]


def config(name="adamw", **changes):
    values = yaml.safe_load((CONF / "optim" / f"{name}.yaml").read_text()) | changes
    return TypeAdapter(OptimConfig).validate_python(values)


def encoder(num_classes):
    return ConvNeXtV2(
        in_channels=3,
        num_classes=num_classes,
        depths=DEPTHS,
        dims=[4, 8, 8, 12],
        stem_stride=4,
        drop_path_rate=0.0,
        head_init_scale=1.0,
    )


def owner(network):
    """A module that owns a network as a task does."""
    task = nn.Module()
    task.network = network
    return task


def classifier():
    return owner(encoder(5))


def fcmae():
    return owner(
        FCMAE(
            encoder=encoder(0),
            image_size_hw=(32, 64),
            patch_px=32,
            decoder_dim=8,
            decoder_depth=1,
            norm_pix_loss=True,
            mask_ratio=0.5,
            execution="sparse",
            grn_over="sample",
        )
    )


def by_name(groups):
    """Name -> group, after checking that names and parameters belong together."""
    found = {}
    for group in groups:
        assert len(group["names"]) == len(group["params"])
        for name in group["names"]:
            assert name not in found, f"{name} is in two groups"
            found[name] = group
    return found


# --- a partition


@pytest.mark.parametrize("kind", ["single", "group", "timm"])
@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize("make", [classifier, fcmae])
def test_groups_partition_the_trainable_parameters(make, decay, kind):
    task = make()
    named = dict(task.named_parameters())
    groups = build_groups(task, config(layer_decay=decay, layer_decay_kind=kind), DEPTHS)
    found = by_name(groups)
    assert set(found) == set(named)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(map(id, named.values()))
    for group in groups:
        assert all(named[name] is parameter for name, parameter in zip(group["names"], group["params"]))
    assert len({(group["lr_scale"], group["decays"]) for group in groups}) == len(groups)


def test_groups_come_in_one_order_from_the_lowest_rate_up():
    groups = build_groups(classifier(), config(layer_decay=0.7), DEPTHS)
    keys = [(group["lr_scale"], group["decays"]) for group in groups]
    assert keys == sorted(keys)
    assert keys[0][0] == pytest.approx(0.7**7) and keys[-1] == (1.0, True)


def test_without_layer_decay_there_are_two_groups():
    groups = build_groups(classifier(), config(), None)
    assert [(group["lr_scale"], group["decays"]) for group in groups] == [(1.0, False), (1.0, True)]


def test_frozen_parameters_are_left_out():
    task = classifier()
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(name.startswith("network.head."))
    found = by_name(build_groups(task, config(layer_decay=0.5), DEPTHS))
    assert set(found) == set(trainable_parameters(task)) == {"network.head.weight", "network.head.bias"}


def test_a_parameter_with_two_names_is_in_one_group():
    task = nn.Module()
    task.first = nn.Linear(4, 4, bias=False)
    task.second = nn.Linear(4, 4, bias=False)
    task.second.weight = task.first.weight
    assert [group["names"] for group in build_groups(task, config(), None)] == [["first.weight"]]


# --- weight decay

SPARED = [
    ((8,), True, "a bias or a norm"),
    ((), True, "a scalar"),
    ((1, 1, 1, 32), True, "GRN's gamma and beta, which published code decayed for being 4-D"),
    ((1, 32), True, "GRN of the sparse layers"),
    ((1, 8, 1, 1), True, "the mask token"),
    ((5, 8), False, "a linear layer"),
    ((8, 1, 7, 7), False, "a depthwise convolution"),
    ((8, 3, 1, 1), False, "a pointwise convolution"),
    ((1, 1, 3, 3), False, "a convolution of one channel"),
]


@pytest.mark.parametrize("shape, spared, why", SPARED)
def test_vectors_by_logical_shape_are_spared_decay(shape, spared, why):
    assert is_exempt("network.weight", nn.Parameter(torch.zeros(shape)), []) == spared, why


@pytest.mark.parametrize("make", [classifier, fcmae])
def test_grn_mask_token_biases_and_norms_are_not_decayed_and_kernels_are(make):
    spared = ("grn.gamma", "grn.beta", "mask_token", ".bias", "norm.weight")
    spared += ("downsample_layers.0.1.weight", *(f"downsample_layers.{stage}.0.weight" for stage in (1, 2, 3)))
    found = by_name(build_groups(make(), config(layer_decay=0.9), DEPTHS))
    for name, group in found.items():
        assert group["decays"] == (not name.endswith(spared)), name
    assert sum(name.endswith("grn.gamma") for name in found) >= sum(DEPTHS)


def test_a_pattern_spares_what_it_matches_and_nothing_else():
    usual = by_name(build_groups(classifier(), config(), None))
    spared = by_name(build_groups(classifier(), config(no_decay=["*.dwconv.weight", "network.head.weight"]), None))
    changed = {name for name in usual if usual[name]["decays"] != spared[name]["decays"]}
    assert changed == {"network.head.weight", *(name for name in usual if name.endswith(".dwconv.weight"))}
    assert not any(spared[name]["decays"] for name in changed)


def test_patterns_tell_capital_letters():
    with pytest.raises(UserError, match="matches no parameter"):
        build_groups(classifier(), config(no_decay=["Network.head.weight"]), None)


# --- refusals


def test_a_pattern_without_a_match_is_refused_with_close_names():
    with pytest.raises(UserError) as caught:
        build_groups(classifier(), config(no_decay=["*.dwconv.weight", "network.heed.weight"]), None)
    message = str(caught.value)
    assert message.startswith("optim.no_decay: 'network.heed.weight' matches no parameter; close: ")
    assert "network.head.weight" in message


def test_a_task_with_nothing_to_train_is_refused():
    task = classifier()
    task.requires_grad_(False)
    with pytest.raises(UserError, match=r"^model: no parameter of the task is trainable"):
        build_groups(task, config(), DEPTHS)


def test_layer_decay_of_a_network_without_stages_is_refused():
    with pytest.raises(UserError, match=r"^optim\.layer_decay: 0\.9 needs a ConvNeXt V2 network"):
        build_groups(owner(nn.Linear(3, 3)), config(layer_decay=0.9), None)


# --- what is made of the groups


def test_the_table_counts_tensors_and_parameters():
    groups = build_groups(owner(nn.Linear(30, 100)), config(), None)
    header, spared, decayed = groups_table(groups).splitlines()
    assert header.split() == ["lr", "scale", "decay", "tensors", "parameters", "first"]
    assert spared.split() == ["1.00000", "no", "1", "100", "network.bias"]
    assert decayed.split() == ["1.00000", "yes", "1", "3,000", "network.weight"]


def made(optimizer_class, **settings):
    groups = build_groups(classifier(), config(layer_decay=0.5), DEPTHS)
    return optimizer_class(groups, lr=1.0, **settings)


def test_every_group_gets_its_share_of_the_rate_and_decays_or_not():
    optimizer = made(torch.optim.AdamW, betas=(0.9, 0.999))
    set_group_values(optimizer, 0.2, 0.05, None)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.2 * group["lr_scale"]
        assert group["weight_decay"] == (0.05 if group["decays"] else 0.0)
        assert group["betas"] == (0.9, 0.999)
    assert {group["lr"] for group in optimizer.param_groups} == {0.2 * 0.5**exponent for exponent in range(8)}


def test_values_are_set_not_multiplied_up():
    optimizer = made(torch.optim.AdamW)
    for _ in range(3):
        set_group_values(optimizer, 0.2, 0.05, None)
    assert max(group["lr"] for group in optimizer.param_groups) == 0.2


def test_momentum_is_beta1_or_momentum():
    adam, sgd = made(torch.optim.AdamW, betas=(0.9, 0.999)), made(torch.optim.SGD, momentum=0.9)
    for optimizer in (adam, sgd):
        set_group_values(optimizer, 0.1, 0.0, 0.85)
    assert all(group["betas"] == (0.85, 0.999) for group in adam.param_groups)
    assert all(group["momentum"] == 0.85 for group in sgd.param_groups)
