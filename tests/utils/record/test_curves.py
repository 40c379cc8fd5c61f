"""Figures of a run as columns, while the run writes them, and as few points as a plot needs."""

import json

import numpy as np
import pytest

from utils.record.curves import Curves, thin


def line(step, kind="train", **figures):
    return json.dumps({"step": step, "kind": kind, **figures}) + "\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def values_of(curves, kind="train", name="loss"):
    return [each.tolist() for each in curves.series(kind, name)]


def test_rows_are_read_as_they_are_written_and_a_half_one_waits(path):
    curves = Curves(path)
    assert not curves.read() and values_of(curves) == [[], []]
    half = line(2, "evaluate", loss=0.25, top1=0.5)
    path.write_text(line(1, loss=1.5, lr=0.1) + half[:20])
    assert curves.read() and values_of(curves) == [[1], [1.5]]
    with path.open("a") as file:
        file.write(half[20:] + line(3, loss=1.0))
    assert curves.read() and not curves.read()
    assert values_of(curves) == [[1, 3], [1.5, 1.0]] and values_of(curves, "evaluate", "top1") == [[2], [0.5]]
    assert curves.names("train") == ["loss", "lr"]


@pytest.mark.parametrize("damage", ["\0\0", '{"step": 7', "[1]", '{"step": "x", "kind": "train"}', '{"kind": 3}'])
def test_damaged_rows_are_left_out_and_nan_is_a_gap(path, damage):
    path.write_text(
        line(1, loss=1.5) + damage + "\n" + line(2, loss=float("nan")) + line(3, loss=1.0, note="<b>", list=[1])
    )
    curves = Curves(path)
    curves.read()
    np.testing.assert_array_equal(curves.series("train", "loss"), [[1, 2, 3], [1.5, np.nan, 1.0]])
    assert curves.names("train") == ["loss"]


def test_a_file_that_a_resume_has_cut_is_read_anew(path):
    curves = Curves(path)
    path.write_text(line(1, loss=1.5) + line(2, loss=9.0))
    curves.read()
    path.write_text(line(1, loss=1.5) + line(2, loss=7.0)[:-1])  # the same size, less the line feed
    curves.read()
    assert values_of(curves) == [[1], [1.5]]


def test_few_points_keep_the_extremes_and_the_ends():
    values = np.sin(np.arange(10_007) / 50)
    values[5_003], values[7_000:7_100] = 40.0, np.nan
    steps, kept = thin(np.arange(10_007), values, 200)
    assert len(steps) <= 220 and steps[[0, -1]].tolist() == [0, 10_006] and np.nanmax(kept) == 40.0
    assert np.isnan(kept).any() and np.nanmin(kept) == np.nanmin(values)
