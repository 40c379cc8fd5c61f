"""metrics.jsonl and training_log.txt: no gap and no repeat over resumes, a torn line dropped, NaN as null, the CSV's
columns those of all epochs.
"""

import json

import pytest

from tests.support import rows
from utils.record.metrics_log import MetricsLog, keep_rows


@pytest.fixture
def folder(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.add(step, "train", {"loss": 1.0 / step})
    log.close()
    return tmp_path


def test_rows_come_one_by_one_and_what_is_no_number_becomes_null(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.add(1, "train", {"loss": float("nan"), "norm": float("inf"), "count": 3, "note": "a", "low": 0.5})
    row = {"step": 1, "kind": "train", "loss": None, "norm": None, "count": 3, "note": "a", "low": 0.5}
    # Before the log is closed: a kill loses no row.
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == row
    log.close()


@pytest.mark.parametrize("torn", ['{"step": 3, "ki', '{"step": 3, "kind": "train", "loss": 1.0}', "\0"])
def test_a_torn_last_line_is_dropped(folder, torn):
    """Also one that is whole but for its end: its number may be cut."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + torn)
    assert [row["step"] for row in keep_rows(path, 99)] == [1, 2]
    assert path.read_text() == "".join(lines[:2])


def test_a_path_may_hold_what_ends_a_line_elsewhere(tmp_path):
    """skipped_steps.jsonl names paths as they are."""
    path, odd = tmp_path / "rows.jsonl", "\u2028\u2029\x85\x0c\x1c\r\né"
    made = [{"step": step, "paths": [f"a{odd}b.png"]} for step in (1, 2, 3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    path.write_bytes(text.encode() + '{"step": 4, "paths": ["é'.encode()[:-1])  # torn within a character
    assert keep_rows(path, 2) == made[:2] == keep_rows(path, 2)


def test_the_csv_has_a_row_an_epoch_and_the_columns_of_all(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.add(4, "train", {"loss": 1.0})
    assert not (tmp_path / "training_log.txt").exists()
    log.add(4, "epoch", {"epoch": 1, "loss": 0.5})
    log.add(8, "epoch", {"epoch": 2, "loss": float("nan"), "top1": 0.25})
    log.close()
    table = tmp_path / "training_log.txt"
    assert table.read_text() == "step,epoch,val_loss,top1\n4,1,0.5,\n8,2,,0.25\n"
    MetricsLog(tmp_path, 6).close()  # resumed, and killed again before the epoch's end
    assert table.read_text() == "step,epoch,val_loss\n4,1,0.5\n"
    MetricsLog(tmp_path, 6, {"epoch": 3}).close()  # rows of epochs have a limit of their own
    assert not table.exists() and [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [4]
