"""Layer decay. Literal tables for every published size, worked values, reference equality (timm's groups), refusals."""

import functools

import pytest
import timm
import timm.optim
import torch

from models.build import build_network
from models.config import TimmConfig
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from models.weights.layouts import translate_name
from optim.groups import layer_scales
from utils.errors import UserError

SIZES = {"atto": (2, 2, 6, 2), "huge": (3, 3, 27, 3)}  # as published
SMALL = {  # depths 2, 2, 6, 2
    "last": 12,
    "downsample": [1, 3, 5, 11],  # stem, then each the id of the first block of the stage that it opens
    "stages": [[1, 2], [3, 4], [5, 6, 7, 8, 9, 10], [11, 12]],
}
LARGE = {"last": 36, "downsample": [1, 4, 7, 34], "stages": [[1, 2, 3], [4, 5, 6], [*range(7, 34)], [34, 35, 36]]}
SINGLE = {"atto": SMALL, "huge": LARGE}
# `group` counts to 12 whatever the depths: stage 2 in threes from 3 on, downsample 3 and stage 3 at 12.
GROUP_STAGE_2 = {"atto": [3, 3, 3, 4, 4, 4], "huge": [id for id in range(3, 12) for _ in range(3)]}


@functools.cache
def make_network(depths, num_classes=5):
    """A narrow network on the meta device."""
    with torch.device("meta"):
        return ConvNeXtV2(
            in_channels=3, num_classes=num_classes, depths=depths, dims=[4] * len(depths), stem_stride=4,
            drop_path_rate=0.0, head_init_scale=1.0,
        )  # fmt: skip


def block_ids(network, kind):
    """The ids of all blocks, one list per stage; all tensors of a block must agree."""
    tensors = ["dwconv.weight", "norm.bias", "pwconv1.weight", "grn.gamma", "pwconv2.bias"]
    stages = []
    for stage, depth in enumerate(network.depths):
        ids = [
            {network.layer_of(f"stages.{stage}.{block}.{tensor}", kind) for tensor in tensors} for block in range(depth)
        ]
        assert all(len(found) == 1 for found in ids)
        stages.append([found.pop() for found in ids])
    return stages


def downsample_ids(network, kind):
    names = [[f"downsample_layers.{stage}.{part}.weight" for part in (0, 1)] for stage in range(4)]
    ids = [{network.layer_of(name, kind) for name in pair} for pair in names]
    assert all(len(found) == 1 for found in ids)
    return [found.pop() for found in ids]


def head_ids(network, kind):
    return {network.layer_of(name, kind) for name in ("norm.weight", "norm.bias", "head.weight", "head.bias")}


@pytest.mark.parametrize("size", SIZES)
def test_single_ids(size):
    network, table = make_network(SIZES[size]), SINGLE[size]
    assert network.last_layer("single") == table["last"] and head_ids(network, "single") == {table["last"] + 1}
    assert downsample_ids(network, "single") == table["downsample"]
    assert block_ids(network, "single") == table["stages"]


@pytest.mark.parametrize("size", SIZES)
def test_group_ids(size):
    network = make_network(SIZES[size])
    assert network.last_layer("group") == 12 and head_ids(network, "group") == {13}
    assert downsample_ids(network, "group") == [0, 2, 3, 12]
    first, second, third, fourth = block_ids(network, "group")
    assert (set(first), set(second), set(fourth)) == ({1}, {2}, {12})
    assert third == GROUP_STAGE_2[size]


@pytest.mark.parametrize("kind", ["single", "group"])
def test_an_fcmae_has_its_encoders_layers_and_a_decoder_above_them(kind):
    encoder = make_network((2, 2, 6, 2), num_classes=0)
    with torch.device("meta"):
        network = FCMAE(
            encoder=encoder, patch_px=32, mask_ratio=0.5, decoder_dim=8, decoder_depth=1,
            norm_pix_loss=True, execution="sparse",
        )  # fmt: skip
    found = layer_scales(network, kind, 0.5)
    for name, scale in layer_scales(encoder, kind, 0.5).items():
        assert found.pop(f"encoder.{name}") == scale < 1
    assert len(found) > 4 and set(found.values()) == {1.0}


# --- timm


def timms_scales(network):
    groups = timm.optim.param_groups_layer_decay(network, weight_decay=0.05, layer_decay=0.8)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    return {name: scales[id(parameter)] for name, parameter in network.named_parameters()}


def test_timm_kind_equals_timms_own_groups():
    with torch.device("meta"):
        network = timm.create_model("convnextv2_atto", pretrained=False)
    ours = layer_scales(make_network(SIZES["atto"]), "timm", 0.8)
    theirs = {translate_name(name, "timm", "official"): scale for name, scale in timms_scales(network).items()}
    assert theirs == pytest.approx(ours, rel=1e-12)


def test_networks_of_timm_are_numbered_by_timms_matcher():
    config = TimmConfig(family="timm", name="vit_tiny_patch16_224", in_channels=3, drop_path_rate=None)
    with torch.device("meta"):
        network = build_network(config, num_classes=5)
    found = layer_scales(network, "timm", 0.8)
    assert len(set(found.values())) > 3
    assert found == pytest.approx(timms_scales(network), rel=1e-12)


# --- off, and refusals


def test_kinds_of_convnextv2_are_refused_for_a_network_of_timm():
    with pytest.raises(UserError, match=r"^optim\.layer_decay_kind: group .* set optim\.layer_decay_kind=timm"):
        layer_scales(timm.create_model("test_resnet"), "group", 0.75)
