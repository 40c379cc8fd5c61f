"""Count a collection: classes, tags and their co-occurrence, sizes, aspects, formats, brightness, in one HTML page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.care.tool import ReportingTool, Tool
from data.collection import Collection
from data.config import DataConfig
from data.facts import Facts, measure_files
from data.open import describe_collection, load_collection
from data.table import SPLITS, count_values
from utils.errors import UserError
from utils.record.logging import get_logger
from utils.record.report_files import TableRow

log = get_logger(__name__)

_SHOWN = 30  # classes and tags in a plot
_TOGETHER = 24  # tags of the co-occurrence
_BINS = 60


class Count(Tool):
    """Log how many images each split, class and rating has; of the tags the most frequent."""

    name: Literal["count"]

    def run(self, data: DataConfig) -> str:
        """Count. Raises UserError (`data.root`)."""
        table = load_collection(data).table
        for name in ("split", "label", "rating", "tags"):
            counts = list(count_values(table[name]).items())
            more = f", and {len(counts) - _SHOWN:,} more" if len(counts) > _SHOWN else ""
            if counts:
                log.info("%s: %s%s", name, ", ".join(f"{value} {count:,}" for value, count in counts[:_SHOWN]), more)
        return f"{table.num_rows:,} images"


class Statistics(ReportingTool):
    """Write the statistics of a collection as a page and as JSON.

    pixels: decode the images, for brightness and format; without it the manifest's width and height are taken.
    """

    name: Literal["statistics"]
    pixels: bool

    def run(self, data: DataConfig) -> str:
        """Write them. Raises UserError (`data.root`, `job`)."""
        collection = load_collection(data)
        table = collection.table
        if self.pixels:
            facts = measure_files(Path(data.root), table["path"].to_pylist(), data.max_pixels)
        else:
            facts = _facts_of_manifest(table)
        tables = _count_tables(collection, facts)
        names, together = count_together(table["tags"])
        tables["tags_together"] = _list_pairs(names, together)
        read = [fact for fact in facts if fact.width]
        lengths = pc.list_value_length(table["tags"]).to_numpy()
        figures = {
            "images": table.num_rows,
            **{f"images of {split}": len(collection.rows(split)) for split in SPLITS},
            "unreadable": sum(fact.kind is not None for fact in facts),
            "classes": len(tables["classes"]),
            "tags": len(tables["tags"]),
            "images without a tag": int((lengths == 0).sum()),
            "tags per image": round(float(lengths.mean()), 2),
            "GiB": round(pc.sum(table["size"]).as_py() / 2**30, 3),
            **_quantiles("width", [fact.width for fact in read]),
            **_quantiles("height", [fact.height for fact in read]),
        }
        page = self.save_report(data.root, figures, tables, _draw(tables, read, names, together))
        return f"{describe_collection(collection)}; {page}"


def count_together(tags: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """Return the most frequent tags, and how many images have each two of them, int64 [T, T]."""
    names = list(count_values(tags))[:_TOGETHER]
    total = np.zeros((len(names), len(names)), np.int64)
    for chunk in tags.chunks:
        ids = pc.index_in(chunk.flatten(), value_set=pa.array(names, pa.string())).fill_null(-1).to_numpy()
        rows = pc.list_parent_indices(chunk).to_numpy()
        has = np.zeros((len(chunk), len(names)), np.float32)
        has[rows[ids >= 0], ids[ids >= 0]] = 1
        total += (has.T @ has).astype(np.int64)
    return names, total


def _facts_of_manifest(table: pa.Table) -> list[Facts]:
    if not {"width", "height"} <= set(table.column_names):
        raise UserError(
            "job.pixels: false, and the collection has no columns width and height; set it to true, or run "
            "prepare.py job=manifest first"
        )
    sizes = zip(table["width"].to_pylist(), table["height"].to_pylist())
    return [Facts(width=width, height=height) for width, height in sizes]


def _count_tables(collection: Collection, facts: list[Facts]) -> dict[str, list[TableRow]]:
    """Return the counts by name, the most frequent first."""
    table = collection.table
    splits = [count_values(table["label"].filter(pc.equal(table["split"], split))) for split in SPLITS]
    classes = [
        {"class": name, **{split: of.get(name, 0) for split, of in zip(SPLITS, splits)}}
        for name in count_values(table["label"])
    ]
    formats, faults = (
        pa.chunked_array([[getattr(fact, name) for fact in facts]], pa.string()) for name in ("format", "kind")
    )
    return {
        "classes": classes,
        "tags": _rows("tag", count_values(table["tags"])),
        "ratings": _rows("rating", count_values(table["rating"])),
        "formats": _rows("format", count_values(formats)),
        "unreadable": _rows("fault", count_values(faults)),
    }


def _rows(name: str, counts: Mapping[str, int]) -> list[TableRow]:
    return [{name: value, "images": count} for value, count in counts.items()]


def _list_pairs(names: list[str], together: np.ndarray) -> list[TableRow]:
    """Return every two tags that share an image, and the share of the rarer one's images that have both."""
    pairs = [(int(together[i, j]), i, j) for i in range(len(names)) for j in range(i) if together[i, j]]
    return [
        {
            "tag": names[i],
            "and": names[j],
            "images": count,
            "share": round(count / min(together[i, i], together[j, j]), 4),
        }
        for count, i, j in sorted(pairs, key=lambda pair: -pair[0])
    ]


def _quantiles(name: str, values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    return {
        f"{name}, {word}": float(np.quantile(values, at))
        for word, at in (("5 %", 0.05), ("median", 0.5), ("95 %", 0.95))
    }


def _draw(
    tables: Mapping[str, list[TableRow]], read: list[Facts], names: list[str], together: np.ndarray
) -> dict[str, np.ndarray]:
    """Draw what there is of each figure, [H, W, 3] uint8."""
    from data.care import drawing  # matplotlib takes 0.3 s

    found: dict[str, np.ndarray] = {}
    for name, column in (("classes", "class"), ("tags", "tag"), ("formats", "format")):
        totals = {row[column]: sum(v for v in row.values() if isinstance(v, int)) for row in tables[name][:_SHOWN]}
        if totals:
            found[f"{column}_counts"] = drawing.draw_bars(totals, name)
    if read:
        widths, heights = (np.array([getattr(fact, side) for fact in read]) for side in ("width", "height"))
        found["sizes"] = drawing.draw_histogram(np.maximum(widths, heights), "longest side", "pixels", _BINS)
        found["aspect"] = drawing.draw_histogram(widths / heights, "width / height", "width / height", _BINS)
    if levels := [fact.brightness for fact in read if fact.brightness is not None]:
        found["brightness"] = drawing.draw_histogram(np.array(levels), "brightness", "mean grey level", _BINS)
        sharp = np.array([fact.sharpness for fact in read])
        found["sharpness"] = drawing.draw_histogram(np.log10(sharp + 1), "sharpness", "log10 (variance + 1)", _BINS)
    if len(names) > 1:
        found["tag_pairs"] = drawing.draw_matrix(
            together, names, "share of the row's images that have the column's tag"
        )
    return found
