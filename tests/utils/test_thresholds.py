"""Thresholds: what is written is read; those of other weights, a part of a file and no such file are refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import read_table, refuses
from utils.formats.thresholds import (
    CATEGORY_PROFILES,
    OVERALL,
    PER_TAG,
    Threshold,
    ThresholdTable,
    find_thresholds,
    write_thresholds,
)
from utils.formats.vocabulary import Vocabulary

VOCABULARY = Vocabulary(("general", "1girl", 'odd,"name"', "miku"), (9, 0, 0, 4), (9, 8, 7, 6), (1, 2, 3, 4))
CATEGORY_ROWS = tuple(
    Threshold(
        number, name, 0.1 * place + 0.05 * number / 9, 0.5, 0.25, 1 / 3, 7, profile, "too few" if number else None
    )
    for place, profile in enumerate(CATEGORY_PROFILES, start=3)
    for number, name in ((0, "general"), (9, "rating"), (OVERALL, "all"))
)
TAG_ROWS = tuple(
    Threshold(category, name, place / 10, None, None, None, 0, PER_TAG)
    for place, (category, name) in enumerate(zip(VOCABULARY.categories, VOCABULARY.names), start=1)
)
TABLE = ThresholdTable(VOCABULARY.hash, CATEGORY_ROWS + TAG_ROWS)


WEIGHTS = Path("run/weights/last_weights.safetensors")


@pytest.fixture
def path(tmp_path):
    write_thresholds(tmp_path / "thresholds.csv", TABLE, "0123")
    return tmp_path / "thresholds.csv"


def test_a_table_is_read_as_it_was_written(path):
    assert find_thresholds(str(path), WEIGHTS, "0123") == TABLE
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets write it
    assert find_thresholds(str(path), WEIGHTS, "0123") == TABLE


def test_tags_that_are_not_labelled_keep_their_rows_with_their_categories(path):
    rows = [replace(row, threshold=0.9) for row in TABLE.rows]
    rows[:9] = [replace(row, category=4 if row.category == 9 else row.category) for row in rows[:9]]
    new, tags = ThresholdTable(TABLE.vocabulary, tuple(rows)), {(9, "general"), (0, "1girl")}
    kept, default = ([0.1, 0.2, 0.9, 0.9], [0.35, 0.3, 0.3, 0.9]), ([0.35, 0.35, 0.9, 0.9], [0.35, 0.35, 0.35, 0.9])
    for earlier, (per_tag, balanced) in ((TABLE, kept), (None, default)):
        write_thresholds(path, new.keep(tags, earlier), "0123")
        found = find_thresholds(str(path), WEIGHTS, "0123")
        assert found.of_tags(VOCABULARY, PER_TAG) == pytest.approx(per_tag)
        assert found.of_tags(VOCABULARY, "balanced") == pytest.approx(balanced)


def test_tools_that_take_the_first_row_of_a_category_get_balanced(path):
    first = {}
    for row in read_table(path):
        first.setdefault(int(row["category"]), float(row["threshold"]))
    assert {number: first[number] for number in (0, 9)} == pytest.approx({0: 0.3, 9: 0.35})


def test_a_table_for_weights_without_a_checksum_is_refused_with_the_command(path):
    with refuses(r"^thresholds: .*thresholds.csv .*evaluate.py calibrate=true"):
        find_thresholds(str(path), WEIGHTS, None)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda lines: lines[:-1], "not complete"),
        (lambda lines: [line for line in lines if ",high_recall," not in line], "not complete"),
        (lambda lines: [lines[0], lines[1].replace("0.3", "1.5")], "0.threshold: .*less than"),
        (lambda lines: [], "not a readable thresholds .* evaluate.py calibrate=true writes one"),
    ],
)
def test_a_file_that_is_no_whole_table_is_refused(path, change, complaint):
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with refuses(rf"(?s)thresholds.csv .*{complaint}"):
        find_thresholds(str(path), WEIGHTS, "0123")
