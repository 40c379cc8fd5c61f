"""The figures of a run as columns, read while the run writes them.

curves = Curves(run / METRICS_FILE)
curves.read()                                 what is new since the last call
steps, values = curves.series("train", "loss")
steps, values = thin(steps, values, 2_000)    for a plot
"""

import math
import os
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np

from utils.record.metrics_log import Row, parse_rows

Series = tuple[np.ndarray, np.ndarray]  # steps int64 [N], values float64 [N], which may be NaN


class Curves:
    """The numbers in metrics.jsonl. Damaged rows, and an unfinished last one, are left out. Threads may share it.

    size: the bytes that have been read; another number tells that the figures have changed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._inode = 0
        self._forget()

    def _forget(self) -> None:
        self.size = 0
        self._series = dict[tuple[str, str], tuple[list[int], list[float]]]()

    def read(self) -> bool:
        """Read rows that are new since the last call; from the beginning if a resume has written the file anew.

        Return whether there are any. A folder that is being deleted has none.
        """
        with self._lock, suppress(OSError), self._path.open("rb") as file:
            status = os.stat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self.size:
                self._forget()
                self._inode = status.st_ino
            file.seek(self.size)
            *lines, unfinished = file.read().split(b"\n")
            self.size = file.tell() - len(unfinished)
            for _, row in parse_rows(lines):
                self.add(row)
            return bool(lines)
        return False

    def add(self, row: Row) -> None:
        """Add the numbers of a row."""
        for name, value in row.items():
            number = math.nan if value is None else value
            if name != "step" and isinstance(number, int | float):
                steps, values = self._series.setdefault((str(row.get("kind")), name), ([], []))
                steps.append(row["step"])
                values.append(number)

    def names(self, kind: str) -> list[str]:
        """Return the figures of one kind of rows, sorted."""
        with self._lock:
            return sorted(name for its_kind, name in self._series if its_kind == kind)

    def series(self, kind: str, name: str) -> Series:
        """Return the steps and values of a figure. A null, which was not finite, is NaN."""
        with self._lock:
            steps, values = self._series.get((kind, name), ((), ()))
            return np.array(steps, np.int64), np.array(values, np.float64)

    def minutes(self, steps: np.ndarray) -> np.ndarray:
        """Return the minutes of training at each step, float64 [N]; NaN if no row has them."""
        found = [self.series(kind, "seconds") for kind in ("train", "epoch")]
        known, seconds = max(found, key=lambda pair: len(pair[0]))
        if not len(known):
            return np.full(len(steps), np.nan)
        return np.interp(steps, [0, *known], [0, *seconds]) / 60


def thin(steps: np.ndarray, values: np.ndarray, most: int) -> Series:
    """Return at most about `most` points that show the same curve: the extremes of equal shares of the points."""
    count = len(steps) // (most // 2)
    if count < 2:
        return steps, values
    kept = {0, len(steps) - 1}
    for start in range(0, len(steps), count):
        part = values[start : start + count]
        if np.isnan(part).all():
            kept.add(start)
        else:
            kept |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
    rows = sorted(kept)
    return steps[rows], values[rows]
