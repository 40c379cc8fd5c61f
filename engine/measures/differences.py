"""Where network and label differ most, from tables/images.parquet of evaluate.py per_image=true."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from utils.io.files import readable


class Difference(NamedTuple):
    """An image. by: how far network and label are apart, 0 to 1. label: what the network sees, or None for tags.

    tags: those that the network would add (True) or remove, and how far each is from its threshold, the farthest first.
    """

    path: str
    by: float
    label: str | None = None
    tags: tuple[tuple[str, bool, float], ...] = ()


def read_differences(file: Path) -> list[Difference]:
    """Return the images where network and label differ, those that differ most first; none without the table.

    Classes are ranked by the probability of the image's label (cleanlab's self-confidence), tags by their distance
    from the threshold. Raises UserError for a damaged table.
    """
    if not file.is_file():
        return []
    with readable(file, "Parquet", "write it again with evaluate.py per_image=true"):
        with pq.ParquetFile(file) as parquet:
            table = parquet.read()
        rows = _read_tags(table) if "wrong_by" in table.column_names else _read_classes(table)
        return sorted(rows, key=lambda row: -row.by)


def _read_classes(table: pa.Table) -> Iterator[Difference]:
    if not {"label", "prediction"} <= set(table.column_names):  # of another task
        return
    table = table.filter(table["wrong"])
    by = 1 - np.exp(-table["loss"].to_numpy())
    yield from map(Difference, table["path"].to_pylist(), by.tolist(), table["prediction"].to_pylist())


def _read_tags(table: pa.Table) -> Iterator[Difference]:
    differs = pc.add(*(pc.list_value_length(table[name]) for name in ("wrong", "missed")))
    for row in table.filter(pc.greater(differs, 0)).to_pylist():
        added = zip(row["wrong"], [True] * len(row["wrong"]), row["wrong_by"])
        removed = zip(row["missed"], [False] * len(row["missed"]), row["missed_by"])
        tags = sorted([*added, *removed], key=lambda tag: -tag[2])
        yield Difference(row["path"], tags[0][2], tags=tuple(tags))
