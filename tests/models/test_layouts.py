"""Weights of others: each layout is recognised by its names and gives the logits of the library that it is of.

Norm scales are near 1 and GRN is not the identity, so that logits vary between images and a wrong converter shows.
"""

import argparse
import functools
import re

import pytest
import timm
import torch
from torch import nn
from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from models.interop.parity import vary_weights
from models.weights.initialise import initialise_from
from models.weights.layouts import LAYOUTS, recognise_state
from tests.models.test_fcmae import SETTINGS
from tests.support import assert_same_tensors, refuses
from utils.contracts import InitFrom
from utils.io.weights import write_weights

DEPTHS, DIMS = (1, 1, 2, 1), (8, 12, 16, 20)
CLASSES = 5


def ours(num_classes=CLASSES, in_channels=3, stem_stride=4):
    return ConvNeXtV2(
        in_channels=in_channels, depths=DEPTHS, dims=DIMS, stem_stride=stem_stride, drop_path_rate=0.0,
        head_init_scale=1.0, num_classes=num_classes,
    )  # fmt: skip


def timm_network(num_classes=CLASSES, **settings):
    return timm.create_model("convnextv2_atto", num_classes=num_classes, depths=DEPTHS, dims=DIMS, **settings)


def transformers_network(kind=ConvNextV2ForImageClassification):
    return kind(ConvNextV2Config(depths=DEPTHS, hidden_sizes=DIMS, num_labels=CLASSES, layer_norm_eps=1e-6))


def fcmae(in_channels=3):
    return FCMAE(encoder=ours(0, in_channels), **SETTINGS | {"patch_px": 32})


def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(network, pictures=None):
    found = network(images() if pictures is None else pictures)
    found = getattr(found, "logits", found)
    assert found.std(dim=0).mean() > 0.05  # between images
    return found


@functools.cache
def sources():
    """Networks of all libraries with their states, as (logits, state) by layout; fcmae: a whole FCMAE's."""
    official, theirs, hugging = (vary_weights(make()) for make in (ours, timm_network, transformers_network))
    whole = fcmae()
    whole.encoder.load_state_dict(vary_weights(ours(0)).state_dict())
    return {
        "official": (logits(official), official.state_dict()),
        "timm": (logits(theirs), theirs.state_dict()),
        "transformers": (logits(hugging), hugging.state_dict()),
        "fcmae": (logits(vary_weights(ours(0))), whole.state_dict()),
    }


def sparse_state(state):
    """The state of an FCMAE with the names and shapes of MinkowskiEngine's layers, as the official pretraining has."""
    sparse = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        is_dense = not name.startswith("encoder.") or ".downsample_layers.0." in name
        if is_dense:
            sparse[name] = tensor
        elif tensor.ndim == 4 and leaf == "weight":
            kernel = tensor.mT.flatten(2).permute(2, 1, 0)
            sparse[f"{layer}.kernel"] = kernel[:, 0] if ".dwconv" in layer else kernel
        elif ".dwconv" in layer or re.search(r"downsample_layers\.\d\.1", layer):
            sparse[name] = tensor[None]
        elif ".grn" in layer:
            sparse[name] = tensor.flatten()[None]
        else:
            sparse[f"{layer}.{'linear' if '.pwconv' in layer else 'ln'}.{leaf}"] = tensor
    return sparse


def start(network, path, which="model", keep_head=True):
    """Initialise a network from a file, and return the origin."""
    return initialise_from(network, InitFrom(str(path), which), keep_head=keep_head)


@pytest.mark.parametrize(
    "layout, target, prefix",
    [*((layout, "ours", "") for layout in (*LAYOUTS, "fcmae")),
     ("transformers", "timm", "_orig_mod.module."), ("fcmae", "timm", "")],
)  # fmt: skip
def test_every_layout_gives_the_logits_of_its_library(layout, target, prefix, tmp_path):
    wanted, state = sources()[layout]
    path = tmp_path / "weights.ckpt"
    content = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    if layout == "fcmae":  # as the official pretraining saves it
        content = {"model": sparse_state(content), "optimizer": {}, "epoch": 799, "args": argparse.Namespace(lr=1e-3)}
    torch.save(content, path)
    classes = 0 if layout == "fcmae" else CLASSES
    network = (ours if target == "ours" else timm_network)(classes)
    known = layout.replace("fcmae", "official")
    origin = start(network, path)
    assert {**origin, "weights_hash": 16} == {"source": str(path), "layout": known, "license": None, "weights_hash": 16}
    assert len(origin["weights_hash"]) == 16
    network.eval()
    if layout == "fcmae" and target == "timm":  # timm's pooled features are normalised; compare the maps
        with torch.no_grad():
            assert torch.allclose(network.forward_features(images()).mean(dim=(2, 3)), wanted, atol=1e-5)
        return
    assert torch.allclose(logits(network), wanted, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: ours(0), timm_network])
def test_an_encoder_goes_into_an_fcmae_with_a_fresh_decoder(make, tmp_path):
    """Continued pretraining: from released encoders, and from classifiers of any layout."""
    source, target = vary_weights(make()), fcmae()
    fresh = {name: tensor.clone() for name, tensor in target.state_dict().items() if not name.startswith("encoder.")}
    write_weights(tmp_path / "w.safetensors", source.state_dict(), {})
    start(target, tmp_path / "w.safetensors")
    assert all(torch.equal(tensor, target.state_dict()[name]) for name, tensor in fresh.items())
    expected = recognise_state(source.state_dict())[1]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in target.encoder.state_dict().items())


def test_a_checkpoint_of_the_official_pretraining_continues_with_its_decoder(tmp_path):
    source, target = vary_weights(fcmae()), fcmae()
    torch.save({"model": sparse_state(source.state_dict())}, tmp_path / "checkpoint.pth")
    start(target, tmp_path / "checkpoint.pth")
    assert_same_tensors(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("make", [lambda: ours(0), lambda: timm.create_model("test_resnet", num_classes=0)])
def test_the_encoder_of_any_pretraining_is_taken(make, tmp_path, log):
    """A method of one's own: an encoder, and layers of any names, which fine-tuning does not need."""
    encoder, target = vary_weights(make()), make()
    method = nn.ModuleDict({"encoder": encoder, "pixels": nn.Conv2d(encoder.num_features, 3, 1)})
    write_weights(tmp_path / "w.safetensors", method.state_dict(), {"task": {"name": "simmim"}})
    start(target, tmp_path / "w.safetensors")
    assert_same_tensors(target.state_dict(), encoder.state_dict())
    assert log.text.count("pixels.weight, pixels.bias") + log.text.count("pixels.bias, pixels.weight") == 1


def test_the_weights_or_their_average_are_taken_as_asked(tmp_path):
    """Released and converted files do not say that they hold an average: plain weights must not pass for one."""
    networks, both = {"model": ours(), "ema": ours()}, "checkpoint-best-ema.pth.tar"
    content = {"state_dict": networks["model"].state_dict(), "state_dict_ema": networks["ema"].state_dict()}
    torch.save({**content, "epoch": "best-ema", "optimizer": {"state": {}}}, tmp_path / both)
    path = tmp_path / "w.safetensors"
    write_weights(path, content["state_dict_ema"], {"task": {}})
    with refuses(r"^init_weights: ema"):
        start(ours(), path, "ema")
    write_weights(path, content["state_dict_ema"], {"task": {}, "average": True})
    for file, which in ((both, "model"), (both, "ema"), (path, "ema")):
        start(target := ours(), tmp_path / file, which)
        assert torch.equal(target.head.weight, networks[which].head.weight)


# --- the stem


@pytest.mark.parametrize("old, new, make", [(3, 1, ours), (1, 3, timm_network)])
def test_a_stem_adapts_to_other_channels_by_the_stated_rule(old, new, make, tmp_path, log):
    key = "in_channels" if make is ours else "in_chans"
    source, target = vary_weights(make(**{key: old})), make(**{key: new}).eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    start(target, tmp_path / "w.pth")
    name = "downsample_layers.0.0.weight" if make is ours else "stem.0.weight"
    weight, found = source.state_dict()[name], target.state_dict()[name]
    assert torch.allclose(found, timm.models.adapt_input_conv(new, weight.clone(), base_chans=old))
    assert f"takes {new} channels instead of {old}" in log.text
    if new == 1:  # a grey picture gives what its equal channels gave
        grey = torch.randn(2, 1, 64, 64)
        assert torch.allclose(logits(target, grey), logits(source, grey.expand(-1, old, -1, -1)), atol=1e-4)
