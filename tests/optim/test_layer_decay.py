"""Layer decay. Literal tables for every published size, worked values, reference equality (timm's groups), refusals."""

import functools

import pytest
import timm
import timm.optim
import torch

from models.build import build_network
from models.config import timm_config
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from models.weights.layouts import official_name
from optim.groups import layer_scales


@functools.cache
def make_network(depths, num_classes=5):
    """A narrow network on the meta device."""
    with torch.device("meta"):
        return ConvNeXtV2(
            in_channels=3, num_classes=num_classes, depths=depths, dims=[4] * len(depths), stem_stride=4,
            drop_path_rate=0.0, head_init_scale=1.0,
        )  # fmt: skip


ATTO, HUGE = (2, 2, 6, 2), (3, 3, 27, 3)  # as published
THIRDS = [*(number for number in range(3, 12) for _ in range(3)), 12, 12, 12]
IDS = [  # kind, depths, ids of the four downsample layers, of all blocks one after another, of norm and head
    ("single", ATTO, [1, 3, 5, 11], [*range(1, 13)], 13),
    ("single", HUGE, [1, 4, 7, 34], [*range(1, 37)], 37),
    # Whatever the depths: stage 2 in threes from 3 on, downsample 3 and stage 3 at 12.
    ("group", ATTO, [0, 2, 3, 12], [1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 12, 12], 13),
    ("group", HUGE, [0, 2, 3, 12], [1, 1, 1, 2, 2, 2, *THIRDS], 13),
]


@pytest.mark.parametrize("kind, depths, downsample, blocks, head", IDS)
def test_every_tensor_has_the_id_of_its_layer(kind, depths, downsample, blocks, head):
    network = make_network(depths)
    places = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]
    wanted = {f"stages.{stage}.{block}": number for (stage, block), number in zip(places, blocks, strict=True)}
    wanted |= {f"downsample_layers.{stage}": number for stage, number in enumerate(downsample)}
    wanted |= {"norm": head, "head": head}
    for name, _ in network.named_parameters():
        (number,) = [number for layer, number in wanted.items() if name.startswith(f"{layer}.")]
        assert network.layer_of(name, kind) == number, name
    assert network.last_layer(kind) == head - 1


@pytest.mark.parametrize("kind", ["single", "group"])
def test_an_fcmae_has_its_encoders_layers_and_a_decoder_above_them(kind):
    encoder = make_network((2, 2, 6, 2), num_classes=0)
    with torch.device("meta"):
        network = FCMAE(
            encoder=encoder, patch_px=32, mask_ratio=0.5, decoder_dim=8, decoder_depth=1,
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
    ours = layer_scales(make_network(ATTO), "timm", 0.8)
    theirs = {official_name(name, "timm"): scale for name, scale in timms_scales(network).items()}
    assert theirs == pytest.approx(ours, rel=1e-12)


def test_networks_of_timm_are_numbered_by_timms_matcher():
    config = timm_config("vit_tiny_patch16_224")
    with torch.device("meta"):
        network = build_network(config, num_classes=5)
    found = layer_scales(network, "timm", 0.8)
    assert len(set(found.values())) > 3
    assert found == pytest.approx(timms_scales(network), rel=1e-12)
