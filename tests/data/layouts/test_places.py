"""Splits and classes by folders: a literal table of what people and `datasets` name them."""

import pytest

from data.layouts.places import find_splits, place_images


@pytest.mark.parametrize(
    "text, places",
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
        ("freight-train/1 steam-train/2", ":freight-train :steam-train"),
        ("crash_test/1 steam_train/2 car/3", ":crash_test :steam_train :car"),
        ("bus/1 car/2 train/3", ":bus :car :train"),
        ("valid/1 invalid/2", ":valid :invalid"),
        ("train/cat/1 train2/dog/2 val2017/cat/3", "train:cat train:dog val:cat"),
        ("trainval/a/1 test/a/2", "train:a test:a"),
    ],
)
def test_splits_and_classes_by_folders(text, places):
    splits, labels, _ = place_images(text.split(), True)
    assert " ".join(f"{split or ''}:{label or ''}" for split, label in zip(splits, labels)) == places


@pytest.mark.parametrize(
    "names, splits",
    [
        ("train valid extra", "train val"),
        ("train-00000-of-00002-0123456789abcdef test-00000-of-00001", "train test"),
        ("x-train-0001 x-val-0001", "train val"),
        ("train_labels test breeds", "train test"),
        ("crash_train crash_test", "train test"),
        ("test", "test"),
        *((names, "") for names in ("steam-train crash-test", "blood_test_labels", "evaluation", "valid-photos")),
    ],
)
def test_splits_by_the_names_of_tables_and_shards(names, splits):
    assert " ".join(find_splits(names.split()).values()) == splits


def test_the_user_says_what_is_a_split():
    splits = {"train": "train", "holdout": "test"}
    assert place_images(["train/1", "holdout/2", "bus/3"], splits)[0] == ["train", "test", None]
    assert place_images(["train/1", "val/2"], False)[:2] == ([None, None], ["train", "val"])
