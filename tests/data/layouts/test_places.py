"""Splits and classes by folders: a literal table of what people and `datasets` name them."""

import pytest

from data.layouts.places import lacks_labels, place_images, read_split


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("train_images/a test_images/b", "train: test:"),
        ("images/train/cat/a images/val/dog/b", "train:cat val:dog"),
        ("chest_xray/train/N/a chest_xray/test/P/b", "train:N test:P"),
        ("seg_train/seg_train/sea/1 seg_test/seg_test/ice/2 seg_pred/seg_pred/3", "train:sea test:ice test:"),
        ("Training/a/1 Test/a/1 valid/a/1 dev/b/1", "train:a test:a val:a val:b"),
        ("train-jpg/a test-jpg/b", "train: test:"),
        ("trainset/a evalSet/b", "train: test:"),
        ("train/images/a train/images/b", "train: train:"),
        ("images/a images/b", ": :"),
        ("train/car/1 train/train/2 test/train/3", "train:car train:train test:train"),
        ("train_station/1 harbour/2", ":train_station :harbour"),
        ("cat/train/1 dog/train/2 dog/test/3", "train:cat train:dog test:dog"),
        ("cat/test/1 dog/2", ":cat :dog"),
    ],
)
def test_splits_and_classes_by_folders(text, places):
    splits, labels = place_images(text.split())
    assert " ".join(f"{split or ''}:{label or ''}" for split, label in zip(splits, labels)) == places
    assert not any(lacks_labels(splits, labels))


def test_the_test_split_alone_may_lack_labels():
    for text, lacking in (
        ("train/c/1 test/2", []),
        ("train/c/1 val/2", ["val/2"]),
        ("train/1 test/c/2 test/3", []),
    ):
        paths = text.split()
        assert [path for path, no in zip(paths, lacks_labels(*place_images(paths))) if no] == lacking


def test_a_name_with_two_splits_says_none():
    assert [read_split(name) for name in ("trainval", "train_val", "labels_train.csv", "constraint")] == [
        None,
        None,
        "train",
        None,
    ]
