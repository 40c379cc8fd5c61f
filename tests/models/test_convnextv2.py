"""ConvNeXt V2. Literal tables (parameter counts and names), property (initial weights)."""

import re

import pytest
import torch
from torch import nn

from models.build import build_network
from models.config import ConvNeXtV2Config
from models.convnextv2 import ConvNeXtV2
from tests.support import read_conf

# (with a 1000-class head, without head and final norm); counted from the published code
PUBLISHED_COUNTS = {
    "atto": (3_708_400, 3_386_760),
    "femto": (5_233_240, 4_847_472),
    "pico": (9_066_280, 8_552_256),
    "nano": (15_623_800, 14_981_520),
    "tiny": (28_635_496, 27_864_960),
    "base": (88_717_800, 87_690_752),
    "large": (197_956_840, 196_416_768),
    "huge": (660_289_640, 657_467_008),
}


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def build_size(size, num_classes):
    config = ConvNeXtV2Config(**read_conf(f"model/convnextv2_{size}"))
    with torch.device("meta"):
        return build_network(config, num_classes)


@pytest.mark.parametrize("size", PUBLISHED_COUNTS)
def test_parameter_counts_are_the_published_ones(size):
    assert count(build_size(size, 1000)) == PUBLISHED_COUNTS[size][0]
    assert count(build_size(size, 0)) == PUBLISHED_COUNTS[size][1]


def test_parameter_names_and_shapes_are_the_published_ones():
    state = build_size("atto", 1000).state_dict()
    assert len(state) == 140 and len(build_size("atto", 0).state_dict()) == 136
    block = r"stages\.[0-3]\.\d+\.(dwconv|norm|pwconv1|pwconv2)\.(weight|bias)|stages\.[0-3]\.\d+\.grn\.(gamma|beta)"
    pattern = rf"downsample_layers\.[0-3]\.[01]\.(weight|bias)|{block}|(norm|head)\.(weight|bias)"
    assert [name for name in state if not re.fullmatch(pattern, name)] == []
    assert state["downsample_layers.1.1.weight"].shape == (80, 40, 2, 2)
    assert state["stages.2.5.grn.gamma"].shape == (1, 1, 1, 640)


def test_initial_weights():
    torch.manual_seed(0)
    network = ConvNeXtV2(
        in_channels=3, depths=[1, 2, 1], dims=[32, 64, 128], stem_stride=2, drop_path_rate=0.0, num_classes=50,
        head_init_scale=0.001,
    )  # fmt: skip
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            expected = 2e-5 if name == "head" else 0.02
            assert module.weight.std().item() == pytest.approx(expected, rel=0.15), name
            assert (module.bias == 0).all(), name
