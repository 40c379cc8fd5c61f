"""Classes of a file that is not ours: in the order of the file where it names them, else in that of the collection."""

import json
from types import SimpleNamespace

import pytest

from engine.tasks.exporting import open_other
from engine.tasks.foreign import ForeignSource, rebuild_foreign
from models.build import build_network
from models.config import ConvNeXtV2Config
from models.export.parity import vary_weights
from models.export.targets import TARGETS, export_folder
from utils.errors import UserError
from utils.io.weights import read_weights, write_weights

CONFIG = ConvNeXtV2Config(
    family="convnextv2", name="small", in_channels=3, depths=[1, 1], dims=[8, 12], stem_stride=4, drop_path_rate=0.0,
    head_init_scale=1.0,
)  # fmt: skip


def save_turned(folder, names):
    """Write a classifier whose outputs have these names, as a file of ours and as a folder of timm's; return both."""
    network = vary_weights(build_network(CONFIG, len(names)))
    metadata = {"task": {"name": "classification"}, "class_names": names}
    write_weights(folder / "own.safetensors", network.state_dict(), metadata)
    (folder / "timm").mkdir()
    write_weights(folder / "timm/model.safetensors", network.state_dict(), {})
    (folder / "timm/config.json").write_text(json.dumps({"label_names": names}))
    return folder / "own.safetensors", folder / "timm"


def source_of(path):
    preprocessing = {"image_size_hw": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "channels": 3, "eval_crop": 1.0,
                     "interpolation": "bilinear"}  # fmt: skip
    augment = SimpleNamespace(preprocessing=lambda channels: preprocessing, shrink=False)
    return ForeignSource(str(path), CONFIG, augment, "model")


def open_as(path, wanted):
    return rebuild_foreign(source_of(path), SimpleNamespace(class_names=lambda split: wanted))


def test_a_file_that_names_its_classes_gives_their_order(tmp_path):
    """In sorted order, its outputs would be given to other classes, and top-1 would be wrong without a word."""
    paths = save_turned(tmp_path, ["dog", "cat"])
    for path in paths:
        rebuilt = open_as(path, ["cat", "dog"])
        assert rebuilt.task.class_names == rebuilt.metadata["class_names"] == ["dog", "cat"]
        with pytest.raises(UserError) as refused:
            open_as(path, ["cat", "eel", "fox"])
        assert str(refused.value).startswith(f"weights: {path} names other classes") and "('dog')" in str(refused.value)


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1"], None])
def test_a_file_that_numbers_its_classes_takes_the_collections_names(names, tmp_path):
    _, folder = save_turned(tmp_path, names or ["0", "1"])
    if names is None:
        (folder / "config.json").unlink()
    assert open_as(folder / "model.safetensors", ["cat", "dog"]).task.class_names == ["cat", "dog"]
    # The numbers do not become names by a conversion either.
    opened = open_other(source_of(folder / "model.safetensors"))
    export_folder(TARGETS["safetensors"], opened.whole, opened.metadata, tmp_path / "converted", 1e-3)
    assert open_as(tmp_path / "converted/model.safetensors", ["cat", "dog"]).task.class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{broken", "config.json is ignored"), ("[1]", "is ignored (no JSON"), ('{"id2label": {"5": "cat"}}', "KeyError")],
)
def test_a_damaged_config_beside_the_weights_is_said(text, message, tmp_path, log):
    _, folder = save_turned(tmp_path, ["a", "b"])
    (folder / "config.json").write_text(text)
    assert open_as(folder / "model.safetensors", ["cat", "dog"]).task.class_names == ["cat", "dog"]
    assert message in log.text


def test_names_that_are_not_as_many_as_the_classes_are_refused(tmp_path):
    own, _ = save_turned(tmp_path, ["a", "b"])
    tensors, metadata = read_weights(own, "weights")
    write_weights(own, tensors, {**metadata, "class_names": ["a", "b", "c"]})
    with pytest.raises(UserError, match=r"^weights: .* has a head of 2 classes"):
        open_as(own, ["a", "b"])
