"""metrics.jsonl and training_log.txt: a run's figures, without gaps or repeats over any number of resumes.

A row is a JSON object with `step`, `kind` ("train", "evaluate" or "epoch") and figures. A resumed run first drops the
rows after its checkpoint, which it will write again. training_log.txt has the epoch rows as CSV. It is rewritten, so
that it has a column for every figure: at the start, at the end, and at an epoch a third of a minute.
"""

import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from utils.io.files import AppendFile, Json, ignore_write_errors, write_text
from utils.record.logging import log
from utils.record.report import write_table

METRICS_FILE = "metrics.jsonl"
_CSV_SEC = 20.0  # between two writes of training_log.txt
Row = Json


def parse_rows(lines: Iterable[bytes]) -> Iterator[tuple[bytes, Row]]:
    """Yield the lines that are rows, and the rows. Others are damaged, such as zeros after a power failure."""
    for line in lines:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield line, row


def read_rows(path: Path) -> list[tuple[bytes, Row]]:
    """Return the (line, row) pairs of a JSONL file that a run may be writing; none if there is no file.

    An unfinished last line is ignored. Damaged lines are skipped with a warning.
    """
    if not path.is_file():
        return []
    # splitlines would split at characters that paths may contain. Bytes, because a kill may cut a character.
    *lines, _ = path.read_bytes().split(b"\n")
    rows = list(parse_rows(lines))
    if len(rows) < len(lines):
        log.warning("%s: %d damaged lines are skipped", path, len(lines) - len(rows))
    return rows


def keep_rows(path: Path, last_step: int, limits: Mapping[str, int] | None = None) -> list[Row]:
    """Remove a JSONL file's rows after `last_step`, and incomplete rows. Return the remaining rows.

    limits: the last step of rows of some kinds, if it differs.
    """
    last_step_of = limits or {}
    pairs = [
        (line, row) for line, row in read_rows(path) if row["step"] <= last_step_of.get(row.get("kind"), last_step)
    ]
    text = b"".join(line + b"\n" for line, _ in pairs)
    if path.is_file() and path.stat().st_size != len(text):  # an unchanged file is not copied: the disk may be full
        write_text(path, text.decode())
    return [row for _, row in pairs]


class MetricsLog(AppendFile):
    """The rows of one run, on rank 0."""

    def __init__(self, folder: Path, last_step: int, limits: Mapping[str, int] | None = None) -> None:
        self._csv = folder / "training_log.txt"
        self.rows = keep_rows(folder / METRICS_FILE, last_step, limits)
        super().__init__(folder / METRICS_FILE)
        self._write_csv()

    def add(self, step: int, kind: str, figures: Row) -> None:
        """Write a row. Figures that are not finite become null (JSON has no NaN)."""
        row = {"step": step, "kind": kind}
        for name, value in figures.items():
            row[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        self.rows.append(row)
        self.write(json.dumps(row) + "\n")
        if kind == "epoch" and time.monotonic() - self._csv_at >= _CSV_SEC:
            self._write_csv()

    def close(self) -> None:
        """Write training_log.txt, and close the file."""
        self._write_csv()
        super().close()

    def _write_csv(self) -> None:
        epochs = [row for row in self.rows if row.get("kind") == "epoch"]
        with ignore_write_errors(self._csv):
            write_table(self._csv, list(map(_cells, epochs)))
        self._csv_at = time.monotonic()


def _cells(row: Row) -> Json:
    """Return an epoch's columns in training_log.txt: `train_loss` for train/loss, `val_loss` for loss."""
    cells = {}
    for name, value in row.items():
        column = name.replace("/", "_", 1) if name.startswith("train/") else re.sub(r"\bloss$", "val_loss", name)
        cells[column] = f"{value:.6g}" if isinstance(value, float) else value
    del cells["kind"]
    return cells
