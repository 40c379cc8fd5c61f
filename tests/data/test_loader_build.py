"""What a probe of features reads: rows evenly spread over classes, in literal cases, and loaders of them."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.open import Data, load_collection
from data.rows import choose_probe_rows
from engine.tasks.kinds import KINDS
from tests.in_process import TINY, configure, working_in
from tests.support import make_collection

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


def build(root, folder, train_images=100, val_images=100, **machine):
    """Return the probe's loaders for a collection, and what was logged."""
    config, _ = configure(
        "pretrain_fcmae",
        [
            *TINY,
            f"data.root={root}",
            "loop.batch_size=4",
            "augment.image_size_hw=[16,16]",
            "task.probe.every_epochs=1.0",
        ]
        + [f"task.probe.train_images={train_images}", f"task.probe.val_images={val_images}"],
    )
    kind = KINDS["fcmae"]
    messages = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("atelier.engine.tasks.fcmae")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with working_in(folder):
            usual = {"device": torch.device("cpu"), "channels_last": False, "workers": 0, "prefetch_batches": 2}
            chosen = SimpleNamespace(**usual | machine)
            collection = load_collection(config.data)
            setup = kind.set_up(config, collection)
            source = kind.source(collection, config.data, setup, repeats=False)
            data = Data(collection, source, chosen, seed=0, batch_size=4, run_path=None)
            loaders = kind.evaluation(data, setup, training=True)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return {name: loader for name, loader in loaders.items() if name != "val"}, messages


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
    assert loaders == {} and len(messages) == 1 and messages[0].startswith("probe: off, with 6 training and 2 ")
