"""Configuration and building. Refusals (each message), built shapes, checkpointing of gradients."""

import pytest
import torch
from pydantic import TypeAdapter

from models.build import build_network, check_image_size
from models.config import ModelConfig
from models.convnextv2 import ConvNeXtV2
from tests.models.outcome import outcome
from tests.support import assert_same_tensors, refuses

SMALL = {
    "family": "convnextv2", "name": "convnextv2_test", "in_channels": 3, "depths": [1, 1], "dims": [4, 8],
    "stem_stride": 4, "drop_path_rate": 0, "head_init_scale": 0.001,
}  # fmt: skip
TIMM = {
    "family": "timm", "name": "resnet18", "in_channels": 3, "drop_path_rate": None, "image_size_hw": None,
    "channels": None, "arguments": {}, "pretrained": "auto",
}  # fmt: skip


def parse(values):
    return TypeAdapter(ModelConfig).validate_python(values)


def test_build_passes_every_value_on():
    changes = {"in_channels": 4, "depths": [1, 2], "stem_stride": 2, "drop_path_rate": 0.2, "head_init_scale": 0}
    network = build_network(parse({**SMALL, **changes}), 7)
    assert isinstance(network, ConvNeXtV2)
    assert (network.in_channels, network.depths, network.num_features, network.total_stride) == (4, (1, 2), 8, 4)
    assert network.stages[1][1].drop_path.rate == 0.2
    assert network.head.weight.shape == (7, 8) and (network.head.weight == 0).all()


def test_a_timm_network_is_built_with_its_channels_classes_and_drop_path():
    network = build_network(parse({**TIMM, "in_channels": 1, "drop_path_rate": 0.5}), 5)
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert network.layer4[1].drop_path.drop_prob == 0.5
    assert build_network(parse(TIMM), 0)(torch.randn(2, 3, 32, 32)).shape == (2, 512)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "resnet81"}, "model.name: .*resnet18"),
        ({"name": "hf-hub:timm/resnet18"}, "model.name: "),  # no internet
        ({"name": "vgg11", "drop_path_rate": 0.1}, "model.drop_path_rate: .*vgg11"),
        ({"name": "vgg11", "channels": [16, 32, 64, 128]}, "model.channels: .*vgg11"),
    ],
)
def test_what_timm_has_not_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build_network(parse({**TIMM, **changes}), 5)


def test_an_image_size_is_tried_without_drawing_anything():
    state = torch.random.get_rng_state()
    check_image_size(parse({**TIMM, "name": "test_vit"}), (64, 64))  # timm calls it of fixed size, and it takes others
    with refuses(r"^augment\.image_size_hw: .*set \[32, 16\]"):
        check_image_size(parse(SMALL), (28, 16))
    with refuses(r"^augment\.image_size_hw: .*=\[224,224\]"):
        check_image_size(parse({**TIMM, "name": "vit_tiny_patch16_224"}), (64, 64))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_network_of_one_size_takes_others_with_the_same_weights_and_outputs(name):
    networks = []
    for any_size in (False, True):
        torch.manual_seed(0)
        networks.append(build_network(parse({**TIMM, "name": name}), 2, any_size=any_size).eval())
    assert_same_tensors(*(network.state_dict() for network in networks))
    with torch.no_grad():
        assert torch.equal(*(network(torch.ones(1, 3, 224, 224)) for network in networks))
    check_image_size(parse({**TIMM, "name": name}), (64, 64), any_size=True)


def test_a_vit_is_made_for_another_size():
    values = {**TIMM, "name": "test_vit", "image_size_hw": [64, 32]}
    check_image_size(parse(values), (64, 32))
    with refuses(r"^model.image_size_hw: .*resnet18"):
        build_network(parse({**values, "name": "resnet18"}), 3)


@pytest.mark.parametrize("values", [SMALL, {**TIMM, "name": "convnextv2_atto"}])
def test_gradient_checkpointing_changes_neither_logits_nor_gradients(values):
    network, images = build_network(parse(values), 5).train(), torch.randn(2, 3, 32, 32)
    network.set_grad_checkpointing(False)
    wanted = outcome(network, images)
    network.set_grad_checkpointing(True)
    assert all(map(torch.equal, outcome(network, images), wanted))
