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
from optim.layer_decay import layer_scales
from utils.errors import UserError

SIZES = {"atto": [2, 2, 6, 2], "nano": [2, 2, 8, 2], "tiny": [3, 3, 9, 3], "huge": [3, 3, 27, 3]}  # as published
SMALL = {  # depths 2, 2, 6, 2
    "last": 12,
    "downsample": [1, 3, 5, 11],  # stem, then each the id of the first block of the stage that it opens
    "stages": [[1, 2], [3, 4], [5, 6, 7, 8, 9, 10], [11, 12]],
}
NANO = {"last": 14, "downsample": [1, 3, 5, 13], "stages": [[1, 2], [3, 4], [*range(5, 13)], [13, 14]]}
TINY = {"last": 18, "downsample": [1, 4, 7, 16], "stages": [[1, 2, 3], [4, 5, 6], [*range(7, 16)], [16, 17, 18]]}
LARGE = {"last": 36, "downsample": [1, 4, 7, 34], "stages": [[1, 2, 3], [4, 5, 6], [*range(7, 34)], [34, 35, 36]]}
SINGLE = {"atto": SMALL, "nano": NANO, "tiny": TINY, "huge": LARGE}
# `group` counts to 12 whatever the depths: stage 2 in threes from 3 on, downsample 3 and stage 3 at 12.
GROUP_STAGE_2 = {
    "atto": [3, 3, 3, 4, 4, 4],
    "nano": [3, 3, 3, 4, 4, 4, 5, 5],
    "tiny": [3, 3, 3, 4, 4, 4, 5, 5, 5],
    "huge": [id for id in range(3, 12) for _ in range(3)],
}


@functools.cache
def make_network(depths, num_classes=5):
    """A narrow network on the meta device."""
    with torch.device("meta"):
        return ConvNeXtV2(
            in_channels=3, num_classes=num_classes, depths=depths, dims=[4] * len(depths), stem_stride=4,
            drop_path_rate=0.0, head_init_scale=1.0,
        )  # fmt: skip


def layer_id(name, depths, kind):
    return make_network(tuple(depths)).layer_of(name, kind)


def last_layer(depths, kind):
    return make_network(tuple(depths)).last_layer(kind)


def layer_scale(name, depths, kind, decay):
    return layer_scales(make_network(tuple(depths)), kind, decay)[name]


HEAD = ["norm.weight", "norm.bias", "head.weight", "head.bias"]


def block_ids(depths, kind):
    """The ids of all blocks, one list per stage; all tensors of a block must agree."""
    tensors = ["dwconv.weight", "norm.bias", "pwconv1.weight", "grn.gamma", "pwconv2.bias"]
    stages = []
    for stage, depth in enumerate(depths):
        names = [[f"stages.{stage}.{block}.{tensor}" for tensor in tensors] for block in range(depth)]
        ids = [{layer_id(name, depths, kind) for name in block} for block in names]
        assert all(len(found) == 1 for found in ids)
        stages.append([found.pop() for found in ids])
    return stages


def downsample_ids(depths, kind):
    ids = [
        {layer_id(f"downsample_layers.{stage}.{part}.weight", depths, kind) for part in (0, 1)}
        for stage in range(len(depths))
    ]
    assert all(len(found) == 1 for found in ids)
    return [found.pop() for found in ids]


@pytest.mark.parametrize("size", SINGLE)
def test_single_ids(size):
    depths, table = SIZES[size], SINGLE[size]
    assert last_layer(depths, "single") == table["last"]
    assert downsample_ids(depths, "single") == table["downsample"]
    assert block_ids(depths, "single") == table["stages"]
    assert {layer_id(name, depths, "single") for name in HEAD} == {table["last"] + 1}


@pytest.mark.parametrize("size", GROUP_STAGE_2)
def test_group_ids(size):
    depths = SIZES[size]
    assert last_layer(depths, "group") == 12
    assert downsample_ids(depths, "group") == [0, 2, 3, 12]
    first, second, third, fourth = block_ids(depths, "group")
    assert (set(first), set(second), set(fourth)) == ({1}, {2}, {12})
    assert third == GROUP_STAGE_2[size]
    assert {layer_id(name, depths, "group") for name in HEAD} == {13}


STEM, HEAD_WEIGHT = "downsample_layers.0.0.weight", "head.weight"


@pytest.mark.parametrize(
    "size, kind, decay, name, scale",
    [
        ("huge", "group", 0.6, "stages.2.26.pwconv1.weight", 0.36),  # id 11
        ("huge", "group", 0.6, HEAD_WEIGHT, 1.0),
        ("atto", "single", 0.9, STEM, 0.282),  # 0.9^12: id 0 is never used
        ("atto", "timm", 0.9, STEM, 0.254),  # 0.9^13
        ("huge", "group", 0.75, STEM, 0.02376),  # 0.75^13
    ],
)
def test_worked_values(size, kind, decay, name, scale):
    assert layer_scale(name, SIZES[size], kind, decay) == pytest.approx(scale, rel=4e-3)  # three digits


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


def test_group_keeps_a_third_stage_deeper_than_published_below_the_fourth():
    first, second, third, fourth = block_ids([3, 3, 40, 3], "group")
    assert third == [*(id for id in range(3, 11) for _ in range(3)), *[11] * 16]
    assert set(fourth) == {12}


# --- timm


def timms_scales(network):
    groups = timm.optim.param_groups_layer_decay(network, weight_decay=0.05, layer_decay=0.8)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    return {name: scales[id(parameter)] for name, parameter in network.named_parameters()}


def test_timm_kind_equals_timms_own_groups():
    with torch.device("meta"):
        network = timm.create_model("convnextv2_nano", pretrained=False)
    ours = layer_scales(make_network(tuple(SIZES["nano"])), "timm", 0.8)
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
