"""Weights of earlier runs. Round trips (classifier, FCMAE, timm), the head's rules, GRN shapes, refusals."""

import pytest
import torch
from torch import nn

from models.build import build_network
from models.config import TimmConfig
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from models.weights import fit, initialise
from tests.models.test_fcmae import SETTINGS
from utils.errors import UserError
from utils.io.weights import InitFrom, write_weights

HEAD, NORM = ["head.weight", "head.bias"], ["norm.weight", "norm.bias"]


def build(num_classes=5, dims=(8, 12), depths=(1, 2), in_channels=3):
    network = ConvNeXtV2(
        in_channels=in_channels,
        depths=depths,
        dims=dims,
        stem_stride=2,
        drop_path_rate=0.0,
        head_init_scale=1.0,
        num_classes=num_classes,
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def build_fcmae():
    return FCMAE(encoder=build(0), image_size_hw=(8, 8), **{**SETTINGS, "patch_px": 4})


def load_into(network, state, *, keep_head):
    """Load a state and return the names that were left."""
    return fit.load_into(network, state, keep_head=keep_head).left


def initialise_from(network, path, **settings):
    return initialise.initialise_from(network, InitFrom(path, "model"), **settings)


def copy_state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def loaded_names(network, state):
    """The names whose tensors now equal those of the state."""
    return {name for name, tensor in network.state_dict().items() if name in state and torch.equal(tensor, state[name])}


def test_a_classifier_round_trips():
    source, target = build(), build()
    assert load_into(target, source.state_dict(), keep_head=True) == []
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(source(images), target(images))


def test_without_keep_head_the_norm_is_loaded_and_the_head_left():
    target, state = build(), build().state_dict()
    before = copy_state(target)
    assert load_into(target, state, keep_head=False) == HEAD
    assert loaded_names(target, before) == set(HEAD)
    assert loaded_names(target, state) == set(state) - set(HEAD)


def test_a_head_of_another_class_count_is_left():
    target, state = build(num_classes=7), build(num_classes=5).state_dict()
    before = copy_state(target)
    assert load_into(target, state, keep_head=True) == HEAD
    assert loaded_names(target, before) == set(HEAD)


def test_half_a_head_is_no_head():
    target, state = build(), copy_state(build())
    del state["head.bias"]
    assert load_into(target, state, keep_head=True) == HEAD


def test_a_backbone_loads_into_a_classifier():
    assert load_into(build(), build(0).state_dict(), keep_head=True) == NORM + HEAD


def test_a_classifier_loads_into_a_backbone():
    target, state = build(0), build().state_dict()
    assert load_into(target, state, keep_head=True) == []
    assert loaded_names(target, state) == set(target.state_dict())


@pytest.mark.parametrize("keep_head", [True, False])
def test_the_encoder_of_an_fcmae_loads_into_a_classifier(keep_head):
    source, target = build_fcmae(), build()
    assert load_into(target, source.state_dict(), keep_head=keep_head) == NORM + HEAD
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(source.encoder.forward_features(images), target.forward_features(images))


def test_an_fcmae_round_trips_whole():
    source, target = build_fcmae(), build_fcmae()
    assert load_into(target, source.state_dict(), keep_head=True) == []
    assert loaded_names(target, source.state_dict()) == set(source.state_dict())


def test_decoder_names_are_anchored():
    """A substring test would drop any layer with `pred` or `proj` in its name; only the decoder's own are dropped."""
    state = copy_state(build_fcmae())
    state["encoder.projection.weight"] = torch.zeros(2)
    state["predictor.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^init_from: 2 of") as caught:
        load_into(build(), state, keep_head=True)
    assert "  projection.weight  (2,)               unexpected" in str(caught.value)
    assert "predictor.weight" in str(caught.value)


@pytest.mark.parametrize("axes", [1, 2, 4])
@pytest.mark.parametrize("make", [build, build_fcmae])
def test_grn_tensors_of_every_published_shape_load(axes, make):
    source, target = make(), build()
    state = {
        name: tensor.reshape([1] * (axes - 1) + [-1]) if ".grn." in name else tensor
        for name, tensor in source.state_dict().items()
    }
    load_into(target, state, keep_head=True)
    expected = source.encoder if isinstance(source, FCMAE) else source
    for name, tensor in target.state_dict().items():
        if ".grn." in name:
            assert torch.equal(tensor, expected.state_dict()[name]), name


def test_a_misfit_is_refused_with_a_table_and_changes_nothing():
    target, state = build(), copy_state(build())
    before = copy_state(target)
    del state["stages.0.0.grn.gamma"]
    state["stages.1.0.grn.beta"] = torch.zeros(2, 24)  # right count, no accepted shape
    state["downsample_layers.0.0.weight"] = torch.zeros(9, 3, 2, 2)
    state["stages.1.0.gamma"] = torch.zeros(12)
    with pytest.raises(ValueError, match=r"^init_from: 4 of the checkpoint's tensors do not fit") as caught:
        load_into(target, state, keep_head=True)
    lines = [line.split("  ") for line in str(caught.value).splitlines()]
    rows = {tuple(cell.strip() for cell in line if cell.strip()) for line in lines}
    assert ("name", "in the checkpoint", "in the network") in rows
    assert ("stages.0.0.grn.gamma", "missing", "(1, 1, 1, 32)") in rows
    assert ("stages.1.0.grn.beta", "(2, 24)", "(1, 1, 1, 48)") in rows
    assert ("downsample_layers.0.0.weight", "(9, 3, 2, 2)", "(8, 3, 2, 2)") in rows
    assert ("stages.1.0.gamma", "(12,)", "unexpected") in rows
    assert str(caught.value).splitlines()[-1].startswith("Set the model group (model.name")
    assert loaded_names(target, before) == set(before)


def test_another_size_is_refused_with_a_short_table():
    with pytest.raises(ValueError, match=r"^init_from: .*(?s:.)*\n  \.\.\. and \d+ more\nSet the model group"):
        load_into(build(), build(dims=(8, 16), depths=(1, 3)).state_dict(), keep_head=True)


@pytest.mark.parametrize("name", NORM)
def test_half_a_norm_is_refused(name):
    state = copy_state(build())
    del state[name]
    with pytest.raises(ValueError, match=rf"^init_from: 1 of(?s:.)*{name}  missing"):
        load_into(build(), state, keep_head=False)


def test_an_empty_checkpoint_is_refused():
    with pytest.raises(ValueError, match=r"^init_from: "):
        load_into(build(), {}, keep_head=False)


def test_a_timm_network_follows_the_same_rules():
    config = TimmConfig(family="timm", name="resnet18", in_channels=3, drop_path_rate=None)
    source, same, other = (build_network(config, classes) for classes in (4, 4, 6))
    state = source.state_dict()
    assert load_into(same, state, keep_head=True) == []
    assert loaded_names(same, state) == set(state)
    assert load_into(same, state, keep_head=False) == ["fc.weight", "fc.bias"]
    assert load_into(other, state, keep_head=True) == ["fc.weight", "fc.bias"]
    del state["layer1.0.bn1.running_mean"]
    with pytest.raises(ValueError, match=r"layer1\.0\.bn1\.running_mean  missing"):
        load_into(other, state, keep_head=True)


def test_half_precision_weights_load_into_float32():
    source, target = build(), build()
    load_into(target, {name: tensor.bfloat16() for name, tensor in source.state_dict().items()}, keep_head=True)
    assert target.head.weight.dtype == torch.float32
    torch.testing.assert_close(target.head.weight, source.head.weight, rtol=1e-2, atol=1e-2)


def test_another_kind_of_number_is_refused_before_anything_is_copied():
    """Copying would turn integers into floats in silence."""
    network = build()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in before.items()}
    name = next(iter(state))
    state[name] = state[name].to(torch.int32)
    with pytest.raises(UserError, match="1 of the checkpoint's tensors do not fit") as refused:
        load_into(network, state, keep_head=True)
    (row,) = (line for line in str(refused.value).splitlines() if name in line)
    assert "torch.int32" in row and "torch.float32" in row
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)


def test_shapes_alone_are_enough_to_refuse_a_file(tmp_path, monkeypatch):
    write_weights(tmp_path / "w.safetensors", {"other": torch.ones(3)}, {})
    monkeypatch.setattr("utils.io.weights.load_file", lambda path: pytest.fail("the tensors were read"))
    with pytest.raises(UserError, match="tensors do not fit the network"):
        initialise_from(build(), str(tmp_path / "w.safetensors"), keep_head=True)


def save(path, network, classes=None):
    write_weights(path, network.state_dict(), {} if classes is None else {"class_names": classes})
    return str(path)


@pytest.mark.parametrize("named", [True, False])
def test_a_kept_head_of_the_same_classes_is_loaded(named, tmp_path):
    source, target = build(num_classes=3), build(num_classes=3)
    path = save(tmp_path / "w.safetensors", source, ["a", "b", "c"] if named else None)
    initialise_from(target, path, keep_head=True, class_names=("a", "b", "c"))
    assert loaded_names(target, source.state_dict()) == set(target.state_dict())


@pytest.mark.parametrize(
    ("known", "difference"),
    [
        (["a", "c", "b"], "of 3 classes and this run of 3, and class 1 is 'c' there and 'b' here"),
        (["a", "b"], "of 2 classes and this run of 3, and class 2 is none there and 'c' here"),
        (["a", "b", "c", "ä"], "of 4 classes and this run of 3, and class 3 is 'ä' there and none here"),
        (5, "of 0 classes and this run of 3, and class 0 is none there and 'a' here"),
        (
            [["b" * 1000], "b", "c"],
            "of 3 classes and this run of 3, and class 0 is ['" + "b" * 118 + " there and 'a' here",
        ),
        (["a", "b", "c", None], "of 4 classes and this run of 3, and class 3 is None there and none here"),
    ],
)
def test_a_kept_head_of_other_classes_is_refused(known, difference, tmp_path):
    target = build(num_classes=3)
    before = copy_state(target)
    path = save(tmp_path / "w.safetensors", build(num_classes=len(known) if isinstance(known, list) else 3), known)
    with pytest.raises(UserError) as refused:
        initialise_from(target, path, keep_head=True, class_names=["a", "b", "c"])
    assert str(refused.value) == (
        f"task.head: kept, but {path} is {difference}; set task.head=drawn or fitted, or give it the same classes in "
        "the same order"
    )
    assert loaded_names(target, before) == set(before)
    initialise_from(target, path, keep_head=False, class_names=["a", "b", "c"])  # a head that is drawn anew


@pytest.mark.parametrize("make", [build_fcmae, lambda: build(0), lambda: build(num_classes=7)])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_kept_head_that_the_file_has_not_is_refused(make, suffix, tmp_path):
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save(make().state_dict(), path)
    else:
        save(path, make())
    with pytest.raises(UserError) as refused:
        initialise_from(build(num_classes=3), str(path), keep_head=True, class_names=["a", "b", "c"])
    assert str(refused.value) == (
        f"task.head: kept, but {path} has no head of these 3 classes; set task.head=drawn or fitted"
    )


def test_a_kept_head_of_a_timm_network(tmp_path):
    config = TimmConfig(family="timm", name="test_resnet", in_channels=3, drop_path_rate=None)
    path = save(tmp_path / "w.safetensors", build_network(config, 4))
    initialise_from(build_network(config, 4), path, keep_head=True, class_names=list("abcd"))
    with pytest.raises(UserError, match=r"^task\.head: kept, but .* has no head of these 3 classes"):
        initialise_from(build_network(config, 3), path, keep_head=True, class_names=list("abc"))
