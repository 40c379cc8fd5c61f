"""The figures of a run as columns, read while the run writes them.

curves = Curves(run / METRICS_FILE)
curves.read()                                 what is new since the last call
steps, values = curves.series("train", "loss")
steps, values = thin(steps, values, 2_000)    for a plot
"""

import io
import json
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

Series = tuple[np.ndarray, np.ndarray]  # steps int64 [N], values float64 [N], which may be NaN
_FIXED = ("step", "kind")
_BLOCK = 16 * 2**20  # bytes that pyarrow parses at once, more than the longest row


class Curves:
    """The numbers in metrics.jsonl. Damaged rows, and an unfinished last one, are left out. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._end, self._first, self._parts = 0, b"", dict[tuple[str, str], list[Series]]()

    def read(self) -> bool:
        """Read rows that are new since the last call; from the beginning if a resume has written the file anew.

        Return whether there are any. A folder that is being deleted has none.
        """
        with self._lock:
            return self._read()

    def _read(self) -> bool:
        try:
            with self._path.open("rb") as file:
                head, size = file.read(len(self._first)), file.seek(0, io.SEEK_END)
                if size < self._end or head != self._first:
                    self._forget()
                file.seek(self._end)
                text = file.read()
        except OSError:
            return False
        text = text[: text.rfind(b"\n") + 1]
        if not text:
            return False
        self._first = self._first or text[:4096]
        self._end += len(text)
        for table in _parse(text):
            self._add(table)
        return True

    def _add(self, table: pa.Table) -> None:
        if not {*_FIXED} <= {*table.column_names}:
            return
        kinds = table["kind"].combine_chunks().dictionary_encode()
        steps = pc.cast(table["step"], pa.float64(), safe=False).to_numpy()
        names = [name for name in table.column_names if name not in _FIXED and _is_number(table[name].type)]
        codes = kinds.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        columns = {name: pc.cast(table[name], pa.float64(), safe=False).to_numpy() for name in names}
        for number, kind in enumerate(kinds.dictionary.to_pylist()):
            rows = np.flatnonzero((codes == number) & np.isfinite(steps))
            for name, column in columns.items():
                values = column[rows]
                if not np.isnan(values).all():
                    self._parts.setdefault((kind, name), []).append((steps[rows].astype(np.int64), values))

    @property
    def size(self) -> int:
        """The bytes that have been read; another number tells that the figures have changed."""
        return self._end

    def names(self, kind: str) -> list[str]:
        """Return the figures of one kind of rows, sorted."""
        with self._lock:
            return sorted(name for its_kind, name in self._parts if its_kind == kind)

    def series(self, kind: str, name: str) -> Series:
        """Return the steps and values of a figure. A null, which was not finite, is NaN."""
        with self._lock:
            parts = self._parts.get((kind, name), [])
            if len(parts) > 1:
                parts[:] = [tuple(map(np.concatenate, zip(*parts)))]
            return parts[0] if parts else (np.zeros(0, np.int64), np.zeros(0))

    def minutes(self, steps: np.ndarray) -> np.ndarray:
        """Return the minutes of training at each step, float64 [N]; NaN if no row has them."""
        known, seconds = max(
            (self.series(kind, "seconds") for kind in ("train", "epoch")), key=lambda both: len(both[0])
        )
        return np.interp(steps, [0, *known], [0, *seconds]) / 60 if len(known) else np.full(len(steps), np.nan)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _parse(text: bytes) -> list[pa.Table]:
    """Return the rows of whole lines. pyarrow reads a million in a second, but refuses NaN and damaged lines."""
    options = pyarrow.json.ReadOptions(block_size=_BLOCK)
    with suppress(pa.ArrowInvalid):
        table = pyarrow.json.read_json(pa.BufferReader(text), options)
        if "kind" in table.column_names and table["kind"].type == pa.string() and _is_number(table["step"].type):
            return [table]
    rows = []
    for line in text.split(b"\n"):
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("kind"), str):
                rows.append({name: value for name, value in row.items() if name == "kind" or _is_figure(value)})
    names = dict.fromkeys(name for row in rows for name in row if name != "kind")
    numbers = {name: pa.array((_to_float(row.get(name)) for row in rows), pa.float64()) for name in names}
    return [pa.table({"kind": pa.array([row["kind"] for row in rows], pa.string()), **numbers})]


def _is_figure(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _to_float(value: float | None) -> float | None:
    with suppress(OverflowError):
        return None if value is None else float(value)
    return None


def thin(steps: np.ndarray, values: np.ndarray, most: int) -> Series:
    """Return at most about `most` points that show the same curve: the extremes of equal shares of the points."""
    count = len(steps) // (most // 2)
    if count < 2:
        return steps, values
    whole = len(steps) // count * count
    grouped = values[:whole].reshape(-1, count)
    is_empty = np.isnan(grouped).all(axis=1)
    starts = np.arange(0, whole, count)
    low = starts + np.where(np.isnan(grouped), np.inf, grouped).argmin(axis=1)
    high = starts + np.where(np.isnan(grouped), -np.inf, grouped).argmax(axis=1)
    kept = np.unique(np.concatenate([[0], low[~is_empty], high[~is_empty], starts[is_empty], [len(steps) - 1]]))
    return steps[kept], values[kept]


def smooth(values: np.ndarray, weight: float) -> np.ndarray:
    """Return the exponential moving average [N] without its bias at the start; weight 0: the values. NaN is skipped."""
    if weight == 0:
        return values
    from scipy.signal import lfilter

    is_known = np.isfinite(values)
    top = lfilter([1 - weight], [1, -weight], np.where(is_known, values, 0.0))
    bottom = lfilter([1 - weight], [1, -weight], is_known.astype(float))
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
