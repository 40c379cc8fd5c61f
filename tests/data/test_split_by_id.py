"""The validation split of a table with the columns `id` and `group`."""

import numpy as np
import pyarrow as pa
import pytest

from data.table import assign_validation, build_table, replace_column
from tests.data.test_collection import chosen, labelled, lowest
from utils.errors import UserError


def table_of(count, label=None, **columns):
    paths = [f"{number:05}" for number in range(count)]
    return build_table({"path": paths, "label": [label] * count, "split": ["train"] * count, **columns})


def chosen_numbers(table, fraction):
    return {int(path) for path in chosen(assign_validation(table, fraction))}


@pytest.mark.parametrize("fraction, start", [(0.05, 950), (0.1, 900), (0.7, 300), (0.001, 999), (0.0004, 1000)])
def test_rows_with_an_id_go_by_its_last_digits(fraction, start, log):
    ids = np.random.default_rng(0).integers(-(2**40), 2**40, 3000).tolist()
    table = table_of(3000, id=ids)
    expected = {number for number, id in enumerate(ids) if id % 1000 >= start}
    assert chosen_numbers(table, fraction) == expected
    assert log.messages[-1].endswith("those without a label by id % 1000")
    assert chosen_numbers(table.slice(0, 100), fraction) == {number for number in expected if number < 100}


def test_rows_without_an_id_go_by_their_path():
    by_path = chosen_numbers(table_of(200), 0.25)
    assert chosen_numbers(table_of(200, id=[None] * 200), 0.25) == by_path
    mixed = chosen_numbers(table_of(200, id=[0] * 100 + [None] * 100), 0.25)
    assert mixed == {number for number in by_path if number >= 100}
    names = replace_column(table_of(200), "id", pa.array([f"{number}999" for number in range(200)]))
    assert chosen_numbers(names, 0.25) == by_path


def test_classes_stay_stratified_by_their_paths():
    table = labelled({"a": 10, "b": 20})
    assert chosen(assign_validation(replace_column(table, "id", pa.array([999] * 30)), 0.1)) == chosen(
        assign_validation(table, 0.1)
    )


@pytest.mark.parametrize("has_ids", [False, True])
def test_a_group_stays_on_the_side_of_its_lowest_id_or_path(has_ids):
    draw = np.random.default_rng(1)
    groups = [None if draw.random() < 0.2 else int(draw.integers(0, 300)) for _ in range(1000)]
    ids = draw.permutation(10**6)[:1000].tolist()
    columns = {"id": ids} if has_ids else {}
    alone = chosen_numbers(table_of(1000, **columns), 0.3)
    found = chosen_numbers(table_of(1000, group=groups, **columns), 0.3)
    for number, group in enumerate(groups):
        members = [number] if group is None else [other for other in range(1000) if groups[other] == group]
        lead = min(members, key=lambda member: ids[member] if has_ids else member)
        assert (number in found) == (lead in alone)
    assert 200 < len(found) < 400


def test_a_group_is_one_image_of_its_class():
    table = table_of(6, "x", group=[1, 1, 1, 2, 2, 0])
    (first,) = [int(path) for path in lowest(["00000", "00003", "00005"])[:1]]
    assert chosen_numbers(table, 0.3) == {0: {0, 1, 2}, 3: {3, 4}, 5: {5}}[first]
    assert chosen_numbers(table_of(3, "x", group=[7, 7, 7]), 0.5) == set()


def test_images_that_nothing_reads_decide_for_no_group():
    table = table_of(3, id=[999, 5, 999], group=[1, 1, 1], weight=[0.0, 1.0, 1.0])
    assert chosen_numbers(table, 0.1) == set()
    table = table_of(3, id=[5, 999, 1001], group=[1, 1, 1], weight=[0.0, 1.0, 1.0])
    assert chosen_numbers(table, 0.1) == {1, 2}


def test_a_given_split_stays():
    table = replace_column(table_of(2, id=[999, 1]), "split", pa.array(["train", "val"]))
    assert assign_validation(table, 0.5) is table
    with pytest.raises(UserError, match=r"^data\.validation_fraction: 1 is not allowed"):
        assign_validation(table, 1)
