"""The validation split: stratified by class, by ids, and whole groups."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data.collection.split import assign_validation, count_twins
from data.layouts.table import build_table, replace_column
from tests.data.collection.test_collection import load, put
from tests.support import write_manifest

SIZES = {"a": 1, "b": 2, "c": 5, "d": 10, "e": 25, "f": 34}
SHARES = {  # round(fraction * n), halves up, at least 1 and at most n - 1; none of a single image
    0.01: {"b": 1, "c": 1, "d": 1, "e": 1, "f": 1},
    0.5: {"b": 1, "c": 3, "d": 5, "e": 13, "f": 17},
    0.95: {"b": 1, "c": 4, "d": 9, "e": 24, "f": 32},
}


def labelled(sizes, unlabelled=0):
    paths = {f"{name}/{number}.png": name for name, count in sizes.items() for number in range(count)}
    paths |= {f"{number:04}.png": None for number in range(unlabelled)}
    return build_table({"path": list(paths), "label": list(paths.values()), "split": ["train"] * len(paths)})


def chosen(table, fraction):
    """Return the paths that are split off."""
    table = assign_validation(table, fraction)
    return {path for path, split in zip(table["path"].to_pylist(), table["split"].to_pylist()) if split == "val"}


def lowest(paths):
    return sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest())


def table_of(count, label=None, **columns):
    paths = [f"{number:05}" for number in range(count)]
    return build_table({"path": paths, "label": [label] * count, "split": ["train"] * count, **columns})


def chosen_numbers(table, fraction):
    return {int(path) for path in chosen(table, fraction)}


@pytest.mark.parametrize("fraction", SHARES)
def test_each_class_gives_a_share_of_its_lowest_hashes(fraction, log):
    expected = set()
    for name, count in SHARES[fraction].items():
        expected.update(lowest([f"{name}/{number}.png" for number in range(SIZES[name])])[:count])
    assert chosen(labelled(SIZES), fraction) == expected
    assert f"split off {len(expected)} of 77 images" in log.text and "1 classes have a single image" in log.text


def test_the_choice_is_that_of_the_class_alone_and_an_added_image_moves_at_most_one_other():
    before = chosen(labelled({"x": 30, "y": 7}), 0.25)
    other = chosen(labelled({"x": 30, "z": 300}), 0.25)
    assert {path for path in before if path[0] == "x"} == {path for path in other if path[0] == "x"}
    for count in range(31, 60):
        after = chosen(labelled({"x": count, "y": 7}), 0.25)
        assert len((before ^ after) - {f"x/{count - 1}.png"}) <= 1
        before = after


def test_unlabelled_images_go_by_their_hash_and_do_not_move():
    alone, beside, more = (chosen(labelled(*sizes), 0.25) for sizes in (({}, 200), ({"x": 8}, 200), ({}, 300)))
    assert {path for path in beside if "/" not in path} == alone and 30 < len(alone) < 70
    assert len(beside) == len(alone) + 2 and {path for path in more if path < "0200"} == alone
    assert alone < chosen(labelled({}, 200), 0.5)


@pytest.mark.parametrize("count", range(1, 31))
def test_a_small_collection_has_images_on_both_sides(count):
    """The hashes of few names often have none below the fraction."""
    for fraction in (0.001, 0.1, 0.9):
        found = chosen_numbers(table_of(count), fraction)
        assert 0 < len(found) < count if count > 1 else not found
        assert not chosen_numbers(table_of(count, group=[7] * count), fraction)  # copies of one image
        assert not chosen(labelled(dict.fromkeys("abcdefg"[:count], 1)), fraction)
    assert not chosen_numbers(table_of(count), 0.0)


def test_below_100_images_none_is_taken_unless_asked(log):
    assert not chosen(labelled({"a": 60, "b": 39}), "auto")
    assert "all 99 images are for training" in log.text and "data.validation_fraction=0.1" in log.text
    assert chosen(labelled({"a": 61, "b": 39}), "auto") == chosen(labelled({"a": 61, "b": 39}), 0.1)


def test_validation_images_like_a_training_image_are_counted():
    table = build_table(
        {
            "path": list("abcdef"),
            "split": ["train", "train", "train", "val", "val", "val"],
            "sha256": list("uvwuvw"),
            "weight": [1, 1, 1, 1, 1, 0],
        }
    )
    grouped = table.append_column("group", pa.array([1, 2, 3, 4, 2, 3]))
    assert count_twins(grouped) == {"val": 1, "test": 0}  # e; f has weight 0
    assert count_twins(table)["val"] == 2 and count_twins(table.drop_columns("sha256"))["val"] == 0
    tested = replace_column(table, "split", pa.array(["train", "train", "val", "test", "val", "test"]))
    assert count_twins(tested) == {"val": 1, "test": 1}  # c and f are not of training


def test_a_given_split_stays():
    for split in ("val", "test"):
        given = build_table({"path": ["a", "b"], "label": ["x", "x"], "split": [split, split]})
        assert assign_validation(given, 0.5) is given and chosen(labelled({"x": 2}), 0) == set()


def test_images_that_nothing_reads_are_not_split_off(tmp_path):
    """Else the only validation image of a class may be one of weight 0."""
    root = put(tmp_path / "root", *(f"x/{number}.png" for number in range(5)))
    first, second = lowest([f"x/{number}.png" for number in range(5)])[:2]
    (root / first).write_bytes(b"")
    write_manifest(root, validation_fraction=0.2, verify=True)
    collection = load(Path(root), tmp_path / "cache")
    assert [collection.row(row).path for row in collection.rows("val")] == [second]


@pytest.mark.parametrize("fraction, start", [(0.05, 950), (0.7, 300)])
def test_rows_with_an_id_go_by_its_last_digits(fraction, start):
    ids = np.random.default_rng(0).integers(-(2**40), 2**40, 3000).tolist()
    found = chosen_numbers(table_of(3000, id=ids), fraction)
    expected = {number for number, id in enumerate(ids) if id % 1000 >= start}
    assert found == expected


def test_rows_without_an_id_or_with_a_class_go_by_their_path():
    by_path = chosen_numbers(table_of(200), 0.25)
    mixed = chosen_numbers(table_of(200, id=[*range(0, 1000, 10), *[None] * 100]), 0.25)
    assert mixed == {*range(75, 100)} | {number for number in by_path if number >= 100}
    names = replace_column(table_of(200), "id", pa.array([f"{number}999" for number in range(200)]))
    assert chosen_numbers(names, 0.25) == by_path
    assert chosen_numbers(table_of(40, "x", id=[999] * 40), 0.25) == chosen_numbers(table_of(40, "x"), 0.25)


def test_a_group_goes_where_its_first_image_goes():
    draw = np.random.default_rng(1)
    groups = [None if draw.random() < 0.3 else int(draw.integers(200)) for _ in range(1000)]
    alone, found = chosen_numbers(table_of(1000), 0.3), chosen_numbers(table_of(1000, group=groups), 0.3)
    for number, group in enumerate(groups):
        lead = number if group is None else groups.index(group)
        assert (number in found) == (lead in alone)
    assert 200 < len(found) < 400


def test_a_group_is_one_image_of_its_class():
    table = table_of(6, "x", group=[1, 1, 1, 2, 2, 0])
    (first,) = [int(path) for path in lowest(["00000", "00003", "00005"])[:1]]
    assert chosen_numbers(table, 0.3) == {0: {0, 1, 2}, 3: {3, 4}, 5: {5}}[first]
    assert chosen_numbers(table_of(3, "x", group=[7, 7, 7]), 0.5) == set()


def test_ids_in_a_row_do_not_leave_validation_empty():
    """A collection that was numbered has no id whose last three digits are high."""
    table = table_of(80).append_column("id", pa.array(range(7000, 7080)))
    assert chosen_numbers(table, 0.2) == chosen_numbers(table_of(80), 0.2) and len(chosen_numbers(table, 0.2)) > 8


def test_folds_hold_each_image_once_and_classes_alike_and_groups_whole():
    table = labelled(SIZES, unlabelled=20)
    folds = [chosen(table, [number, 5]) for number in range(1, 6)]
    several = [path for path in table["path"].to_pylist() if path[0] != "a"]  # its single image is for training
    assert sorted(path for fold in folds for path in fold) == several
    counts = [[sum(path.startswith(f"{name}/") for path in fold) for fold in folds] for name in SIZES]
    assert all(max(each) - min(each) <= 1 for each in [*counts, [len(fold) for fold in folds]])
    table = replace_column(labelled({"x": 48, "y": 48}), "split", pa.array(["test", "val"] * 48))
    table = replace_column(table, "group", pa.array([number // 4 for number in range(96)]))
    splits = [assign_validation(table, [number, 3])["split"].to_pylist() for number in (1, 2, 3)]
    assert all(each[::2] == ["test"] * 48 and each[1::4] == each[3::4] for each in splits)
    assert {tuple(sorted(row)) for row in zip(*(each[1::2] for each in splits))} == {("train", "train", "val")}
