"""An evaluation's tables and pictures as files of a run folder: tables/<name>.csv and plots/<name>.png."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.io.files import write_atomically, write_text

TableRow = Mapping[str, Any]


def write_table(path: Path, rows: Sequence[TableRow]) -> None:
    """Write rows as CSV, atomically; the first row's keys are the columns, None is an empty cell.

    A table without rows has no file, and the file of an earlier evaluation is removed.
    """
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def save_image(path: Path, image: np.ndarray) -> None:
    """Write [H, W, 3] uint8 as PNG, atomically."""
    write_atomically(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG"))


def write_report(
    folder: Path, tables: Mapping[str, Sequence[TableRow]], images: Mapping[str, np.ndarray], prefix: str = ""
) -> None:
    """Write the tables and images of a report; images are [H, W, 3] uint8. On rank 0 only. Raises OSError."""
    for name, rows in tables.items():
        write_table(folder / "tables" / f"{prefix}{name}.csv", rows)
    for name, image in images.items():
        save_image(folder / "plots" / f"{prefix}{name}.png", image)
