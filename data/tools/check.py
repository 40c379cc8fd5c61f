"""Jobs that only read a collection: count, statistics (an HTML page) and verify (all kinds of faults)."""

from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.config import DataConfig
from data.layouts.folders import check_root, read_folder, scan_folder
from data.layouts.manifest import find_manifest, read_table
from data.layouts.sidecars import FAULT
from data.layouts.table import SPLITS, count_values
from data.layouts.unused import ORPHANS, Unused
from data.open import describe_collection, load_collection
from data.tools.measure import FileFacts, measure_files
from data.tools.tool import Tool, list_files, refuse_shards, save_report
from utils.config.schema import PathText
from utils.record.logging import get_logger
from utils.record.report import TableRow

log = get_logger(__name__)

_SHOWN = 30  # classes and tags in the log


class Count(Tool):
    """Log how many images have each value of split, label, rating, tags, and the columns measured by job=manifest."""

    name: Literal["count"]

    def run(self, data: DataConfig) -> str:
        """Count. Raises UserError (`data.root`)."""
        table = load_collection(data).table
        for name in ("split", "label", "rating", "mode", "orientation", "transparent", "tags"):
            counts = list(count_values(table[name]).items()) if name in table.column_names else []
            if counts:
                more = f", and {len(counts) - _SHOWN:,} more" if len(counts) > _SHOWN else ""
                log.info("%s: %s%s", name, ", ".join(f"{value} {count:,}" for value, count in counts[:_SHOWN]), more)
        return f"{table.num_rows:,} images"


class Statistics(Tool):
    """Write statistics of a collection as an HTML page and JSON into the folder `report`.

    Files are decoded for size, brightness, sharpness and format; shards only have width and height from the manifest.
    """

    name: Literal["statistics"]
    report: PathText

    def run(self, data: DataConfig) -> str:
        """Write the statistics. Raises UserError (`data.root`, `job`)."""
        collection = load_collection(data)
        sizes = collection.stated_sizes() if collection.is_packed else None
        facts = [] if sizes is None else [FileFacts(width=w or None, height=h or None) for h, w in sizes.tolist()]
        if not collection.is_packed:
            facts = measure_files(Path(data.root), collection.table["path"].to_pylist(), data.max_pixels)
        tables = _count_tables(collection.table, facts)
        lengths = pc.list_value_length(collection.table["tags"]).to_numpy()
        figures = {
            "images": len(collection),
            **{f"images of {split}": len(collection.rows(split)) for split in SPLITS},
            "unreadable": sum(fact.kind is not None for fact in facts),
            "classes": len(tables["classes"]),
            "tags": len(tables["tags"]),
            "images without a tag": int((lengths == 0).sum()),
            "tags per image": round(float(lengths.mean()), 2),
            "GiB": round(pc.sum(collection.table["size"]).as_py() / 2**30, 3),
        }
        names = ("width", "height", "brightness", "sharpness")
        columns = {name: np.array([getattr(fact, name) for fact in facts], float) for name in names}
        columns["aspect"], pictures = columns["width"] / columns["height"], {}
        for name, column in columns.items():
            if len(values := column[np.isfinite(column)]):  # NaN if not measured
                quantiles = zip(("5 %", "median", "95 %"), np.quantile(values, [0.05, 0.5, 0.95]).tolist())
                figures |= {f"{name}, {word}": round(value, 4) for word, value in quantiles}
                pictures[name] = _draw_histogram(name, values)
        page = save_report(Path(self.report) / self.name, data.root, figures, tables, pictures)
        return f"{describe_collection(collection)}; {page}"


def _count_tables(table: pa.Table, facts: list[FileFacts]) -> dict[str, list[TableRow]]:
    """Return tables of counts by name, the most frequent first."""
    splits = {split: count_values(table["label"].filter(pc.equal(table["split"], split))) for split in SPLITS}
    formats, faults = (
        pa.chunked_array([[getattr(fact, name) for fact in facts]], pa.string()) for name in ("format", "kind")
    )
    columns = {
        ("tags", "tag"): table["tags"], ("ratings", "rating"): table["rating"],
        ("formats", "format"): formats, ("unreadable", "fault"): faults,
    }  # fmt: skip
    classes = [
        {"class": name, **{split: counts.get(name, 0) for split, counts in splits.items()}}
        for name in count_values(table["label"])
    ]
    return {"classes": classes} | {
        name: [{what: value, "images": count} for value, count in count_values(column).items()]
        for (name, what), column in columns.items()
    }


def _draw_histogram(title: str, values: np.ndarray) -> np.ndarray:
    """Draw a histogram without the highest 1 % of values, uint8 [H, W, 3]."""
    from matplotlib.figure import Figure  # takes 0.3 s

    from utils.record.plots import figure_to_image, style

    with style():
        figure = Figure(figsize=(7.2, 3.6))
        axis = figure.add_subplot(title=title, ylabel="images")
        axis.hist(values, bins=60, range=(values.min(), np.quantile(values, 0.99)))
        return figure_to_image(figure)


class Verify(Tool):
    """Decode every image, compare files, sidecars and manifest, and list faults in the folder `report`."""

    name: Literal["verify"]
    report: PathText

    def run(self, data: DataConfig) -> str:
        """List the faults. Raises UserError (`data.root`, `job.report`)."""
        root = check_root(data.root)
        sizes, sidecars, _ = scan_folder(root, unused := Unused())
        images = sorted(sizes)
        facts = measure_files(root, images, data.max_pixels)
        found = [(path, fact.kind, fact.reason) for path, fact in zip(images, facts) if fact.kind is not None]
        found += _find_faults(root, images, sidecars, unused.get(ORPHANS, []))
        kinds, faults = Counter(kind for _, kind, *_ in found), {}
        for path, *_, fault in found:  # the reason, or the kind
            faults[path] = f"{faults[path]}; {fault}" if path in faults else fault
        listing = list_files(self.report, self.name, faults)
        counts = ", ".join(f"{kind}: {count:,}" for kind, count in kinds.most_common())
        return f"{len(images):,} images; {f'{counts} ({listing})' if found else 'no fault'}"


def _find_faults(
    root: Path, images: list[str], sidecars: Container[str], orphans: list[str]
) -> Iterator[tuple[str, ...]]:
    """Yield the path, the kind and, if it says more, the reason of faults of the manifest and the sidecars.

    sidecars: the images with one. orphans: sidecars without an image. If any image has a sidecar, images without one
    are named. A manifest replaces sidecars, so bad ones do not matter.
    """
    if (manifest := find_manifest(root)) is not None:
        refuse_shards(root, table := read_table(manifest, Unused()))
        rows = set(table["path"].to_pylist())
        yield from ((path, "an image without a row in the manifest") for path in images if path not in rows)
        gone = (path for path in sorted(rows.difference(images)) if not (root / path).is_file())
        yield from ((path, "a row of the manifest without a file") for path in gone)
    elif FAULT in (table := read_folder(root, Unused())).column_names:
        bad = table.filter(pc.is_valid(table[FAULT]))
        yield from ((path, "a bad sidecar", why) for path, why in zip(bad["path"].to_pylist(), bad[FAULT].to_pylist()))
    yield from ((path, "a sidecar without an image") for path in orphans)
    bare = [path for path in images if path not in sidecars]
    if len(bare) < len(images):
        yield from ((path, "an image without a sidecar") for path in bare)
