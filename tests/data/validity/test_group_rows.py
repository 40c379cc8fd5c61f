"""Images that belong together stay on one side of a split, and copies in a test split leave training."""

import numpy as np
import pytest

from data.collection.collection import Collection
from data.collection.index import index_collection
from tests.validity.makers import make
from utils.errors import UserError


def load(root, tmp_path, **choice):
    index = index_collection(str(root), validation_fraction=0.1, cache=tmp_path / "cache", **choice)
    return Collection(str(root), index)


# The images in groups, and the key of the most serious line.
@pytest.mark.parametrize(
    "name, grouped, keys",
    [
        ("eyes", 160, ["data.group"]),
        ("bursts", 180, ["data.group"]),
        ("albums", 50, ["data.root", "data.group"]),
        ("drawings", 0, []),
    ],
)
def test_groups_that_pictures_confirm_stay_on_one_side(name, grouped, keys, tmp_path):
    make(name, tmp_path / "images")
    collection = load(tmp_path / "images", tmp_path, group="auto")
    assert [finding.key for finding in collection.findings] == keys
    groups = collection.table["group"].to_numpy() if grouped else np.array([])
    groups, split = groups[groups >= 0], collection.table["split"].to_numpy()[: len(groups)]
    assert len(groups) == grouped
    if grouped == len(collection):
        assert not set(groups[split == "val"]) & set(groups[split == "train"])
    assert "group" not in load(tmp_path / "images", tmp_path, group="none").table.column_names


def test_copies_in_the_test_split_are_counted_and_leave_training(tmp_path):
    make("test_copies", tmp_path / "images")
    collection = load(tmp_path / "images", tmp_path, group="copies")
    assert "data.exclude_copies" in [finding.key for finding in collection.findings]
    without = load(tmp_path / "images", tmp_path, group="copies", exclude_copies=True)
    assert len(without.rows("train")) == len(collection.rows("train")) - 27 and len(without.rows("test")) == 60
    assert "data.exclude_copies" not in [finding.key for finding in without.findings]
    with pytest.raises(UserError, match=r"data\.group"):
        load(tmp_path / "images", tmp_path, group="times")
