"""Configuration and building. Literal table (files of conf/model), refusals (each message), built shapes."""

from pathlib import Path

import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from models.build import build_network, check_image_size
from models.config import ConvNeXtV2Config, ModelConfig
from models.convnextv2 import ConvNeXtV2
from utils.errors import UserError

FILES = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
FILES = [path for path in FILES if not path.stem.startswith("sdxl")]  # tests/models/test_sdxl_files.py has those
SMALL = {
    "family": "convnextv2",
    "name": "convnextv2_test",
    "in_channels": 3,
    "depths": [1, 1],
    "dims": [4, 8],
    "stem_stride": 4,
    "drop_path_rate": 0,
    "head_init_scale": 0.001,
}
TIMM = {"family": "timm", "name": "resnet18", "in_channels": 3, "drop_path_rate": None}


def parse(values):
    return TypeAdapter(ModelConfig).validate_python(values)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_builds_on_the_meta_device(path):
    config = parse(yaml.safe_load(path.read_text()))
    with torch.device("meta"):
        network = build_network(config, 11)
    assert all(parameter.is_meta for parameter in network.parameters())
    if isinstance(config, ConvNeXtV2Config):
        assert config.name == path.stem
        assert config.total_stride == network.total_stride == (8 if config.name == "convnextv2_glyph" else 32)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"in_channels": 0}, "in_channels"),
        ({"depths": [1], "dims": [4]}, "depths"),
        ({"depths": [1] * 6, "dims": [4] * 6}, "depths"),
        ({"stem_stride": True}, "stem_stride"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"head_init_scale": float("nan")}, "head_init_scale"),
        ({"name": ""}, "name"),
        ({"pretrained": True}, "pretrained"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(changes, key):
    with pytest.raises(ValidationError) as caught:
        parse({**SMALL, **changes})
    assert key in {location for error in caught.value.errors() for location in error["loc"]}


def test_depths_and_dims_of_different_length_are_refused():
    with pytest.raises(
        ValidationError, match=r"model\.dims: 3 widths \[4, 8, 16\] for 2 stages \(model\.depths=\[1, 1"
    ):
        parse({**SMALL, "dims": [4, 8, 16]})


def test_build_passes_every_value_on():
    changes = {"in_channels": 4, "depths": [1, 2], "stem_stride": 1, "drop_path_rate": 0.2, "head_init_scale": 0}
    network = build_network(parse({**SMALL, **changes}), 7)
    assert isinstance(network, ConvNeXtV2)
    assert (network.in_channels, network.depths, network.dims, network.stem_stride) == (4, (1, 2), (4, 8), 1)
    assert network.stages[1][1].drop_path.rate == 0.2
    assert network.head.weight.shape == (7, 8) and (network.head.weight == 0).all()


def test_a_timm_network_is_built_with_its_channels_classes_and_drop_path():
    network = build_network(parse({**TIMM, "in_channels": 1, "drop_path_rate": 0.5}), 5)
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert network.layer4[1].drop_path.drop_prob == 0.5
    assert build_network(parse(TIMM), 0)(torch.randn(2, 3, 32, 32)).shape == (2, 512)


def test_an_unknown_timm_name_is_refused_with_close_names():
    with pytest.raises(ValueError, match=r"^model\.name: unknown timm model 'resnet81'; close: .*resnet18"):
        build_network(parse({**TIMM, "name": "resnet81"}), 5)
    with pytest.raises(ValueError, match=r"^model\.name: unknown timm model 'hf-hub:timm/resnet18'"):  # no internet
        build_network(parse({**TIMM, "name": "hf-hub:timm/resnet18"}), 5)


def test_a_wrong_weight_tag_is_refused():
    with pytest.raises(ValueError, match=r"^model\.name: 'resnet18\.none' names weights .* set resnet18$"):
        build_network(parse({**TIMM, "name": "resnet18.none"}), 5)


def test_drop_path_for_a_timm_network_without_it_is_refused():
    with pytest.raises(ValueError, match=r"^model\.drop_path_rate: 0\.1 given, but timm's vgg11 takes none; set null"):
        build_network(parse({**TIMM, "name": "vgg11", "drop_path_rate": 0.1}), 5)


@pytest.mark.parametrize(("size", "nearest"), [((28, 16), "[32, 16]"), ((0, 8), "[8, 8]")])
def test_an_image_size_off_the_stride_is_refused(size, nearest):
    with pytest.raises(ValueError, match=r"^augment\.image_size_hw: ") as caught:
        check_image_size(parse(SMALL), size)
    assert f"total stride 8 of convnextv2_test on both sides; set {nearest}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", (31, 33)),
        ("vit_tiny_patch16_224", [224, 224]),
        ("xcit_nano_12_p16_224", (64, 96)),
        ("test_vit", (64, 64)),
    ],
)
def test_a_size_that_a_timm_network_takes_passes_and_draws_nothing(name, size):
    """timm calls the last two of fixed size, and they take others."""
    state = torch.random.get_rng_state()
    check_image_size(parse({**TIMM, "name": name}), size)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "size", "reason", "own"),
    [
        ("vit_tiny_patch16_224", (64, 64), "Input height (64) doesn't match model (224)", "[224,224]"),
        ("levit_128s", (64, 64), "", "[224,224]"),
    ],
)
def test_a_size_that_a_timm_network_refuses_is_refused(name, size, reason, own, device):
    with torch.device(device), pytest.raises(UserError) as refused:
        check_image_size(parse({**TIMM, "name": name}), size)
    assert str(refused.value).startswith(f"augment.image_size_hw: {list(size)} is no size for {name} ({reason}")
    assert f"; set augment.image_size_hw={own}, for which it is made, or choose a network that" in str(refused.value)


def test_a_vit_is_made_for_another_size():
    values = {**TIMM, "name": "test_vit", "image_size_hw": [64, 32]}
    assert build_network(parse(values), 3)(torch.zeros(1, 3, 64, 32)).shape == (1, 3)
    check_image_size(parse(values), (64, 32))
    with pytest.raises(UserError, match=r"^model.image_size_hw: \[64, 32\] given, but timm's resnet18 takes none"):
        build_network(parse({**values, "name": "resnet18"}), 3)


def test_what_cannot_be_tried_on_the_meta_device_passes(monkeypatch):
    forward = "timm.models.vision_transformer.VisionTransformer.forward"
    monkeypatch.setattr(forward, lambda self, images: images.sum().item())
    check_image_size(parse({**TIMM, "name": "test_vit"}), (64, 64))
    monkeypatch.setattr("timm.create_model", lambda *_, **__: torch.zeros(()).item())
    check_image_size(parse({**TIMM, "name": "test_vit"}), (64, 64))


@pytest.mark.parametrize("values", [SMALL, {**TIMM, "name": "convnextv2_atto"}], ids=["ours", "timm"])
def test_gradient_checkpointing_changes_neither_logits_nor_gradients(values):
    network, outcomes = build_network(parse(values), 5).train(), []
    images = torch.randn(2, 3, 32, 32)
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        network.zero_grad()
        logits = network(images)
        logits.square().sum().backward()
        outcomes.append([logits.detach(), *(parameter.grad.clone() for parameter in network.parameters())])
    assert all(torch.equal(before, after) for before, after in zip(*outcomes))
