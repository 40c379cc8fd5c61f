"""Read the tables that evaluations leave in a run folder: tables/NAME.csv, and tables/images.parquet."""

import csv
import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from utils.io.files import Json, readable
from utils.io.safe_text import escape_controls
from utils.record.run_index import is_inside

DECISIONS = ("threshold", "predicted", "correct", "precision", "recall", "f1")
LABELS = "tables/labels.parquet"  # of prepare.py job=labels
_TABLE_ROWS = 20_000
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?(e[-+]?[0-9]+)?")  # 007 is a name


def find_tables(run: Path) -> dict[str, Path]:
    """Return the CSV files of training or evaluate.py, the newest of each name; rows of tags or classes come first."""
    files = [file for folder in ("tables", "weights") for file in (run / folder).glob("*.csv") if is_inside(file, run)]
    files.sort(key=lambda file: file.stat().st_mtime)
    newest = {file.stem.removeprefix("evaluate_"): file for file in files}
    return {name: newest[name] for name in sorted(newest, key=lambda name: (name not in ("tags", "classes"), name))}


def read_newest(run: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of the newest table of a name; none without it."""
    if (file := find_tables(run).get(name)) is None:
        return []
    columns, rows = read_csv(file)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the names of a CSV file's columns, and its first _TABLE_ROWS rows."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        names, *rows = list(islice(csv.reader(file), _TABLE_ROWS + 1)) or [[]]
    return names, rows


def to_cell(text: str) -> int | float | str | None:
    """Return a cell for a table that is sorted: a number of four digits if it is one, None if it is empty."""
    if not _NUMBER.fullmatch(text):
        return escape_controls(text) or None
    return int(text) if text.lstrip("-").isdecimal() else float(f"{float(text):.4g}")


def read_decisions(run: Path) -> dict[str, np.ndarray]:
    """Return the columns DECISIONS of each group, [6, N], at rising thresholds. Raises ValueError."""
    rows = read_newest(run, "decisions")
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append([row.get(name, "") for name in DECISIONS])
    return {name: np.array(columns, float).T for name, columns in groups.items()}


def reliability(decisions: np.ndarray) -> np.ndarray:
    """Return the middle of tenths of probability that have decisions, and the share of correct ones, [2, N]."""
    threshold, *counts = decisions[:3, ::10]
    predicted, correct = -np.diff(counts, append=0)
    return np.stack([threshold + 0.05, correct / np.maximum(predicted, 1)])[:, predicted > 0]


def worst_images(run: Path, most: int, pair: Sequence[str] = (), of: Callable[[Json], Any] = dict) -> list | None:
    """Return rows of images.parquet, the highest loss first, of a classifier mistakes alone; None without the file.

    pair: only those of this label and prediction. of: what is made of a row. Raises UserError, also for odd columns.
    """
    if (path := find_image_table(run)) is None:
        return None
    with readable(path, "Parquet", "evaluate.py per_image=true writes it"):
        wanted = [("rank", "<=", most)]
        if "label" in pq.read_schema(path).names:
            wanted = [*zip(("label", "prediction"), ("==", "=="), pair)] or [("wrong", "==", True)]
        return [of(row) for row in pq.read_table(path, filters=wanted).sort_by("rank").slice(0, most).to_pylist()]


def find_image_table(run: Path) -> Path | None:
    """Return the newest table of images, of any split; None without one, or for links out of the run."""
    files = [file for name in ("tables/images*.parquet", LABELS) for file in run.glob(name) if is_inside(file, run)]
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=None)


def images_about(run: Path, key: str) -> str:
    """Return what the table of images states: `root`, its collection, or `says`, whose features tell; else nothing."""
    path = find_image_table(run)
    metadata = (path and pq.read_schema(path).metadata) or {}
    return metadata.get(key.encode(), b"").decode(errors="replace")
