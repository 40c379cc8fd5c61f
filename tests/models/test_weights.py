"""Weights of earlier runs. Round trips (classifier, FCMAE, timm), the head's rules, GRN shapes, refusals."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from models.convnextv2 import ConvNeXtV2
from models.weights import fit, initialise
from tests.support import refuses
from utils.contracts import InitFrom
from utils.io.files import write_json
from utils.io.weights import write_weights

HEAD, NORM = ["head.weight", "head.bias"], ["norm.weight", "norm.bias"]


def build(num_classes=5, dims=(8, 12), depths=(1, 2)):
    network = ConvNeXtV2(
        in_channels=3, depths=depths, dims=dims, stem_stride=2, drop_path_rate=0.0, head_init_scale=1.0,
        num_classes=num_classes,
    )  # fmt: skip
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def load_into(network, state, *, keep_head):
    """Load a state and return the names that were left."""
    found = fit.fit_state(network, state, keep_head=keep_head)
    network.load_state_dict(found.given, strict=False)
    return found.left


def initialise_from(network, path, **settings):
    return initialise.initialise_from(network, InitFrom(path, "model"), **settings)


def loaded_names(network, state):
    """The names whose tensors now equal those of the state."""
    return {name for name, tensor in network.state_dict().items() if name in state and torch.equal(tensor, state[name])}


@pytest.mark.parametrize(
    "given, keep_head, left", [(5, True, []), (5, False, HEAD), (7, True, HEAD), (0, True, NORM + HEAD)]
)
def test_what_is_loaded_and_what_is_left(given, keep_head, left):
    target, state = build(), build(num_classes=given).state_dict()
    before = deepcopy(target.state_dict())
    assert load_into(target, state, keep_head=keep_head) == left
    assert loaded_names(target, before) == set(left)
    assert loaded_names(target, state) == set(target.state_dict()) - set(left)


def test_a_misfit_is_refused_with_a_table_and_changes_nothing():
    target, state = build(), build().state_dict()
    before = deepcopy(target.state_dict())
    for name in ("stages.0.0.grn.gamma", "norm.weight"):
        del state[name]
    state["stages.1.0.grn.beta"] = torch.zeros(2, 24)  # right count, no accepted shape
    state["downsample_layers.0.0.weight"] = torch.zeros(9, 3, 2, 2)
    state["stages.1.0.gamma"] = torch.zeros(12)
    state["head.bias"] = state["head.bias"].to(torch.int32)  # copying would turn integers into floats in silence
    with refuses(r"^6 of the tensors of the checkpoint do not fit") as caught:
        load_into(target, state, keep_head=True)
    for name in ("stages.0.0.grn.gamma", "(2, 24)", "(9, 3, 2, 2)", "unexpected", "torch.int32"):
        assert name in str(caught.value)
    assert loaded_names(target, before) == set(before)


def save(path, network, classes=None):
    write_weights(path, network.state_dict(), {} if classes is None else {"class_names": classes})
    return str(path)


def test_a_kept_head_is_put_into_the_order_of_the_classes(tmp_path):
    """In the file's own order, its outputs would be given to other classes, and top-1 would be wrong without a word."""
    source, target = build(num_classes=3), build(num_classes=3)
    initialise_from(target, save(tmp_path / "w.safetensors", source, ["b", "c", "a"]), keep_head=True,
                    class_names=["a", "b", "c"])  # fmt: skip
    for name in ("head.weight", "head.bias"):
        assert torch.equal(target.state_dict()[name], source.state_dict()[name][[2, 0, 1]])
    folder = tmp_path / "timm"  # config.json beside the file names them, or numbers them
    folder.mkdir()
    path = save(folder / "model.safetensors", source)
    for stated, rows in (
        ({"label_names": ["b", "c", "a"]}, [2, 0, 1]), ({"id2label": {"0": "c", "1": "b", "2": "a"}}, [2, 1, 0]),
        ({"id2label": {str(row): f"LABEL_{row}" for row in range(3)}}, [0, 1, 2]), ([1], [0, 1, 2]),
    ):  # fmt: skip
        write_json(folder / "config.json", stated)
        initialise_from(target, path, keep_head=True, class_names=["a", "b", "c"])
        assert torch.equal(target.head.weight, source.head.weight[rows])


def test_a_kept_head_of_other_classes_is_refused(tmp_path):
    target = build(num_classes=3)
    before = deepcopy(target.state_dict())
    path = save(tmp_path / "w.safetensors", build(num_classes=3), ["a", "c", "x"])
    with refuses(r"^task\.head: kept, but .*'x'.*'b'"):
        initialise_from(target, path, keep_head=True, class_names=["a", "b", "c"])
    assert loaded_names(target, before) == set(before)
    initialise_from(target, path, keep_head=False, class_names=["a", "b", "c"])  # a head that is drawn anew
