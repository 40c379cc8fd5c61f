"""Read the tables that evaluations leave in a run folder: tables/NAME.csv, and tables/images.parquet."""

import csv
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from utils.io.safe_text import escape_controls
from utils.record.run_index import is_inside

DECISIONS = ("threshold", "predicted", "correct", "precision", "recall", "f1")
IMAGES = Path("tables/images.parquet")
_TABLE_ROWS, _ALL_ROWS = 20_000, 2**62
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?(e[-+]?[0-9]+)?")  # 007 is a name


def find_tables(run: Path) -> dict[str, Path]:
    """Return the CSV files of training or evaluate.py, the newest of each name; rows of tags or classes come first."""
    files = [file for folder in ("tables", "weights") for file in (run / folder).glob("*.csv") if is_inside(file, run)]
    files.sort(key=lambda file: file.stat().st_mtime)
    newest = {file.stem.removeprefix("evaluate_"): file for file in files}
    return {name: newest[name] for name in sorted(newest, key=lambda name: (name not in ("tags", "classes"), name))}


def read_rows(run: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of the newest table of a name; none without it."""
    file = find_tables(run).get(name)
    columns, rows = read_table(file) if file else ([], [])
    return [dict(zip(columns, row, strict=True)) for row in rows]


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the names of a CSV file's columns, and its first _TABLE_ROWS rows."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        names, *rows = list(itertools.islice(csv.reader(file), _TABLE_ROWS + 1)) or [[]]
    return names, rows


def to_cell(text: str) -> int | float | str | None:
    """Return a cell for a table that is sorted: a number of four digits if it is one, None if it is empty."""
    if not _NUMBER.fullmatch(text):
        return escape_controls(text) or None
    return int(text) if text.lstrip("-").isdecimal() else float(f"{float(text):.4g}")


def read_decisions(run: Path) -> dict[str, np.ndarray]:
    """Return the columns DECISIONS of each group, [6, N], at rising thresholds. Raises ValueError."""
    rows = read_rows(run, "decisions")
    groups = {row["group"]: [] for row in rows}
    for row in rows:
        groups[row["group"]].append([row.get(name, "") for name in DECISIONS])
    return {name: np.array(columns, float).T for name, columns in groups.items()}


def reliability(decisions: np.ndarray) -> np.ndarray:
    """Return the middle of tenths of probability that have decisions, and the share of correct ones, [2, N]."""
    threshold, *counts = decisions[:3, ::10]
    predicted, correct = -np.diff(counts, append=0)
    return np.stack([threshold + 0.05, correct / np.maximum(predicted, 1)])[:, predicted > 0]


def worst_images(run: Path, most: int, pair: Sequence[str] = ()) -> list[dict[str, Any]] | None:
    """Return rows of images.parquet, the highest loss first, of a classifier mistakes alone; None without the file.

    pair: only those of this label and prediction. Raises OSError, ValueError.
    """
    path, wanted = run / IMAGES, [("rank", "<=", most)]
    if not path.is_file() or not is_inside(path, run):
        return None
    if "label" in pq.read_schema(path).names:
        wanted = [(name, "==", value) for name, value in zip(("label", "prediction"), pair)] or [("wrong", "==", True)]
    return pq.read_table(path, filters=wanted).sort_by("rank").slice(0, most).to_pylist()


def images_root(run: Path) -> str:
    """Return the root of the collection that images.parquet is about; empty if an older release wrote it."""
    return (pq.read_schema(run / IMAGES).metadata or {}).get(b"root", b"").decode(errors="replace")


class Difference(NamedTuple):
    """An image. by: how far network and label are apart, 0 to 1. label: what the network sees, or None for tags.

    tags: those that the network would add (True) or remove, and how far each is from its threshold, the farthest first.
    """

    path: str
    by: float
    label: str | None = None
    tags: tuple[tuple[str, bool, float], ...] = ()


def find_differences(run: Path) -> tuple[str, list[Difference]]:
    """Return the root of the collection that images.parquet is about, and where network and label differ most, first.

    Classes are ranked by the probability of the label (cleanlab's self-confidence), tags by their distance from the
    threshold. Both are empty without the file. Raises OSError, ValueError.
    """
    found = []
    for row in worst_images(run, _ALL_ROWS) or ():
        if "wrong_by" in row:
            added = zip(row["wrong"], itertools.repeat(True), row["wrong_by"])
            removed = zip(row["missed"], itertools.repeat(False), row["missed_by"])
            if tags := sorted([*added, *removed], key=lambda tag: -tag[2]):
                found.append(Difference(row["path"], tags[0][2], tags=tuple(tags)))
        elif "label" in row:
            found.append(Difference(row["path"], 1 - math.exp(-row["loss"]), row["prediction"]))
    return images_root(run) if found else "", sorted(found, key=lambda each: -each.by)
