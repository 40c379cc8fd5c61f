"""metrics.jsonl and training_log.txt. Properties: no gap and no repeat over resumes, a torn line dropped, NaN as null,
the CSV's columns those of all epochs.
"""

import csv
import json

import pytest

from utils.record.metrics_log import MetricsLog, keep_rows


@pytest.fixture
def folder(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.add(step, "train", {"loss": 1.0 / step})
    log.close()
    return tmp_path


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_have_step_and_kind_and_come_one_by_one(tmp_path):
    log = MetricsLog(tmp_path, 0)
    assert log.add(1, "train", {"loss": 0.5, "note": "a"}) == {"step": 1, "kind": "train", "loss": 0.5, "note": "a"}
    # Before the log is closed: a kill loses no row.
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "kind": "train", "loss": 0.5, "note": "a"}\n'
    log.sync()
    log.close()


def test_a_resumed_run_drops_the_rows_beyond_its_checkpoint(folder):
    log = MetricsLog(folder, 2)
    assert [row["step"] for row in log.rows] == [1, 2] == steps_of(folder)
    log.add(3, "train", {"loss": 9.0})
    log.close()
    assert steps_of(folder) == [1, 2, 3]
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_a_file_without_rows_to_drop_is_not_written_again(folder, monkeypatch):
    """A full disk may have no room for a copy."""
    monkeypatch.setattr("utils.record.metrics_log.write_text", lambda *_: pytest.fail("it was written"))
    assert [row["step"] for row in keep_rows(folder / "metrics.jsonl", 3)] == [1, 2, 3]


@pytest.mark.parametrize("torn", ['{"step": 3, "ki', '{"step": 3, "kind": "train", "loss": 1.0}', '"', "\0"])
def test_a_torn_last_line_is_dropped(folder, torn):
    """Also one that is whole but for its end: its number may be cut."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + torn)
    assert [row["step"] for row in keep_rows(path, 99)] == [1, 2] == steps_of(folder)
    assert path.read_text() == "".join(lines[:2])


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c", "\r", "\n", "é"])
def test_a_path_may_hold_what_ends_a_line_elsewhere(character, tmp_path):
    """skipped_steps.jsonl names paths as they are."""
    path, made = tmp_path / "rows.jsonl", [{"step": step, "paths": [f"a{character}b.png"]} for step in (1, 2, 3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    path.write_bytes(text.encode() + '{"step": 4, "paths": ["é'.encode()[:-1])  # torn within a character
    assert keep_rows(path, 2) == made[:2]
    assert keep_rows(path, 2) == made[:2]


def test_without_a_file_there_is_nothing_to_keep(tmp_path):
    assert keep_rows(tmp_path / "metrics.jsonl", 5) == [] and not list(tmp_path.iterdir())


def test_what_is_no_number_becomes_null(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.add(1, "train", {"loss": float("nan"), "norm": float("inf"), "count": 3, "low": float("-inf")})
    log.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"step": 1, "kind": "train", "loss": None, "norm": None, "count": 3, "low": None}


def test_series_and_names_are_of_one_kind(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.add(1, "train", {"loss": 1.0, "norm": 2.0})
    log.add(2, "train", {"loss": float("nan"), "lr": 0.1})
    log.add(2, "evaluate", {"top1": 0.5, "samples": 4})
    log.close()
    assert log.series("loss", "train") == ([1], [1.0]) and log.series("loss", "evaluate") == ([], [])
    assert log.names("train") == ["loss", "norm", "lr"] and log.names("evaluate") == ["top1"]


def read_csv(folder):
    with open(folder / "training_log.txt", newline="") as stream:
        return list(csv.reader(stream))


def test_the_csv_has_a_row_an_epoch_and_the_columns_of_all(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.add(4, "train", {"loss": 1.0})
    assert not (tmp_path / "training_log.txt").exists()
    log.add(4, "epoch", {"epoch": 1, "loss": 0.5})
    log.add(8, "epoch", {"epoch": 2, "loss": float("nan"), "top1": 0.25})
    log.close()
    assert read_csv(tmp_path) == [
        ["step", "epoch", "val_loss", "top1"],
        ["4", "1", "0.5", ""],
        ["8", "2", "", "0.25"],
    ]


def test_the_csv_of_a_resumed_run_has_no_repeat(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for epoch in (1, 2):
        log.add(4 * epoch, "epoch", {"epoch": epoch, "loss": 1.0 / epoch})
    log.close()
    log = MetricsLog(tmp_path, 6)
    log.add(8, "epoch", {"epoch": 2, "loss": 0.1})
    log.close()
    assert read_csv(tmp_path) == [["step", "epoch", "val_loss"], ["4", "1", "1"], ["8", "2", "0.1"]]


def test_the_csv_loses_the_rows_beyond_a_checkpoint_at_once(tmp_path):
    """A run that is resumed and killed again before the epoch's end has none of them."""
    log = MetricsLog(tmp_path, 0)
    for epoch in (1, 2):
        log.add(4 * epoch, "epoch", {"epoch": epoch, "loss": 1.0 / epoch})
    log.close()
    MetricsLog(tmp_path, 6).close()
    assert read_csv(tmp_path) == [["step", "epoch", "val_loss"], ["4", "1", "1"]]
    MetricsLog(tmp_path, 2).close()
    assert not (tmp_path / "training_log.txt").exists()


def test_rows_of_epochs_have_a_limit_of_their_own(folder):
    log = MetricsLog(folder, 3)
    log.add(2, "epoch", {"epoch": 1})
    log.add(3, "epoch", {"epoch": 2})
    log.close()
    log = MetricsLog(folder, 3, 2)
    log.close()
    assert steps_of(folder) == [1, 2, 3, 2] and read_csv(folder) == [["step", "epoch"], ["2", "1"]]
