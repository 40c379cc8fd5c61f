"""What a probe of features reads: rows evenly spread over classes, in literal cases, and loaders of them."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from data.build import build_probe_loaders, choose_probe_rows
from data.collection import index_collection, open_collection
from data.config import AugmentConfig, ImageFolderConfig
from data.loader import UnreadableLog
from engine.tasks.classification import LabelFields
from tests.support import make_collection
from utils.config.entry_point import CONF

IDS = np.array([2, 0, 1, 0, -1, 2, 0, 1, 2, -1, 0, 3])
TRAIN, VAL = np.arange(0, 8), np.arange(8, 12)


@pytest.mark.parametrize(
    ("most", "train", "val", "why"),
    [
        ((9, 9), [1, 3, 6, 2, 7, 0, 5], [10, 8], "all that have a label, in the order of their classes"),
        ((4, 9), [1, 6, 7, 5], [10, 8], "every second one: two of three, one of two, one of two"),
        ((3, 1), [1, 2, 5], [10], "every third one; of each class one"),
        ((1, 9), [1], [10], "one class, and validation images of it alone"),
    ],
)
def test_probe_rows_are_spread_over_the_classes(most, train, val, why):
    found = choose_probe_rows(IDS, TRAIN, VAL, *most)
    assert [rows.tolist() for rows in found] == [train, val], why


def test_probe_rows_without_labels():
    assert [len(rows) for rows in choose_probe_rows(np.full(12, -1), TRAIN, VAL, 5, 5)] == [0, 0]


def build(root, tmp_path, train_images=100, val_images=100):
    """Return the probe's loaders for a collection, and what was logged."""
    collection = open_collection(str(root), index_collection(str(root), validation_fraction=0.0, cache=tmp_path))
    augment = yaml.safe_load((CONF / "augment" / "light.yaml").read_text()) | {"image_size_hw": [16, 16]}
    messages = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("atelier.data.build")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        loaders = build_probe_loaders(
            collection,
            ImageFolderConfig(name="image_folder", root=str(root), validation_fraction=0.0, max_pixels=10**6),
            AugmentConfig.model_validate(augment),
            LabelFields,
            SimpleNamespace(train_images=train_images, val_images=val_images),
            channels=3,
            seed=0,
            batch_size=4,
            runtime=SimpleNamespace(device=torch.device("cpu"), workers=0),
            unreadable=UnreadableLog(None),
        )
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return loaders, messages


def test_probe_loaders_give_labelled_images(tmp_path):
    root = make_collection(tmp_path / "images", per_class=6, validation=2)
    loaders, messages = build(root, tmp_path, train_images=9)
    assert messages == ["probe: 9 training and 6 validation images of 3 classes"]
    batches = [batch for loader in loaders.values() for batch in loader]
    labels = torch.cat([batch["labels"][batch["weight"] > 0] for batch in batches])
    assert list(loaders) == ["probe_train", "probe_val"] and labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip
    assert batches[0]["images"].shape == (4, 3, 16, 16) and batches[0]["images"].dtype == torch.uint8


def test_a_probe_of_one_class_is_off(tmp_path):
    root = make_collection(tmp_path / "images", per_class=6, classes="A", validation=2)
    loaders, messages = build(root, tmp_path)
    assert loaders == {} and messages == [
        f"probe: off, since {root} gives it 6 labelled training images of 1 classes and 2 validation images of them; "
        "task.probe.every_epochs=null leaves out this line"
    ]
