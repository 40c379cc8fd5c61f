"""metrics.jsonl and training_log.txt: a run's figures, without gaps or repeats over any number of resumes.

A row is a JSON object with `step`, `kind` ("train", "evaluate" or "epoch") and figures. A resumed run first drops the
rows beyond its checkpoint, which it will write again. training_log.txt has the epoch rows as CSV; it is rewritten at
each start and epoch, so that its columns are those of all rows.
"""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.io.files import AppendFile, ignore_write_errors, write_text
from utils.record.logging import get_logger

log = get_logger(__name__)


def keep_rows(path: Path, last_step: int, last_epoch_step: int | None = None) -> list[dict[str, Any]]:
    """Drop a JSONL file's rows beyond `last_step`, and an incomplete last line; returns the rest.

    last_epoch_step: the same for rows of kind `epoch`, where it is given. Lines that are no rows, such as the zeros
    that a power failure leaves, are dropped with a warning.
    """
    limits = {} if last_epoch_step is None else {"epoch": last_epoch_step}
    if not path.exists():
        return []
    # Not splitlines, which splits at characters that a path may hold. As bytes: a kill may cut a character.
    content = path.read_bytes()
    *lines, _ = content.split(b"\n")
    rows = [(line, row) for line in lines if (row := _parse_row(line)) is not None]
    if len(rows) < len(lines):
        log.warning("%s: %d damaged lines are dropped", path, len(lines) - len(rows))
    kept = [(line, row) for line, row in rows if row["step"] <= limits.get(row.get("kind"), last_step)]
    text = b"".join(line + b"\n" for line, _ in kept)
    if text != content:  # a full disk may have no room for a copy
        write_text(path, text.decode("utf-8"))
    return [row for _, row in kept]


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """Return a line's row, None where it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _column(name: str) -> str:
    """Return the column of an epoch's figure in training_log.txt: `train_loss` for train/loss, `val_loss` for loss."""
    return re.sub(r"\bloss$", "val_loss", name) if not name.startswith("train/") else name.replace("/", "_", 1)


class Rows:
    """Rows of metrics, in their order."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def series(self, name: str, kind: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of one figure."""
        found = [(row["step"], row[name]) for row in self.rows if row.get("kind") == kind and row.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]

    def names(self, kind: str) -> list[str]:
        """Return the names of the numeric figures of a kind of row, in order of appearance."""
        rows = [row for row in self.rows if row.get("kind") == kind]
        return list(dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, float)))


def read_rows(path: Path) -> Rows:
    """Return the complete rows of a file that a run may be writing; none where there is no file.

    Raises UserError (`run_dir`) for a line that is not JSON.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = [_parse_row(line) for line in lines]
    if None in rows:
        raise UserError(f"run_dir: line {rows.index(None) + 1} of {path} is damaged; remove that line")
    return Rows(rows)


class MetricsLog(Rows):
    """Append rows to a run folder's metrics.jsonl; only rank 0 holds one."""

    def __init__(self, folder: Path, last_step: int, last_epoch_step: int | None = None) -> None:
        """Open the file, without rows beyond `last_step`, or rows of epochs beyond `last_epoch_step`."""
        self._path = folder / "metrics.jsonl"
        self._csv = folder / "training_log.txt"
        super().__init__(keep_rows(self._path, last_step, last_epoch_step))
        self._stream = AppendFile(self._path)
        if self._csv.exists():
            with ignore_write_errors(self._csv):
                self._write_csv()

    def add(self, step: int, kind: str, figures: dict[str, Any]) -> dict[str, Any]:
        """Write a row; a figure that is not finite becomes null (JSON has no NaN)."""
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in figures.items()
        }
        row = {"step": step, "kind": kind, **clean}
        self.rows.append(row)
        self._stream.write(json.dumps(row) + "\n")
        if kind == "epoch":
            with ignore_write_errors(self._csv):
                self._write_csv()
        return row

    def sync(self) -> None:
        """Bring the rows to the disk; called before a checkpoint beyond them is published."""
        self._stream.sync()

    def _write_csv(self) -> None:
        rows = [
            {_column(name): f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            for row in self.rows
            if row.get("kind") == "epoch"
        ]
        for row in rows:
            del row["kind"]
        if not rows:
            self._csv.unlink(missing_ok=True)
            return
        # The newest row first: earlier ones may lack the figures of an evaluation, whose place is not the end.
        columns = list(dict.fromkeys(name for row in reversed(rows) for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._csv, text.getvalue())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
