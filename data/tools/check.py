"""job=check: what a collection has, what is wrong with it, and one HTML page that shows both."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from data.collection.collection import Collection
from data.collection.index import CACHE
from data.config import DataConfig
from data.images.bytes import open_contents
from data.images.measure import FileFacts, measure_files, measure_shards
from data.layouts.manifest import read_table
from data.layouts.names import is_remote
from data.layouts.recognise import open_folder
from data.layouts.scan import scan_folder
from data.layouts.table import SPLITS, count_values, is_packed
from data.layouts.unused import BESIDE, FAULT, ORPHANS, ROWS, UNNAMED, UNREAD, UNREADABLE, WITH, Unused
from data.layouts.walk import FAULTS, check_root, find_manifest
from data.load import describe_collection, load_collection
from data.tools.config import Check
from data.tools.duplicates import find_groups
from data.tools.tool import list_files, save_report
from utils.errors import UserError
from utils.io.memo import own_cache
from utils.io.names import Names
from utils.record.logging import log
from utils.record.report import TableRow

_SHOWN = 30  # the most frequent values of a column, in the log; the page has all
_COLUMNS = ("split", "label", "rating", "mode", "orientation", "transparent", "tags")
_FAULTS = (*FAULTS, ORPHANS, ROWS, UNNAMED, BESIDE, UNREAD, UNREADABLE, WITH, "an image", "a row")
_Fault = tuple[str, str, str]  # path, kind and reason
_DRAWN = ("width", "height", "brightness", "sharpness")


def check(job: Check, data: DataConfig) -> str:
    """Check the collection. Raises UserError (`data.root`, `job.report`)."""
    faults = [] if is_remote(data.root) else list(_find_faults(job, check_root(data.root), data))
    try:
        collection = load_collection(data)
    except UserError:
        _save_faults(job, faults)
        raise
    paths = collection.table["path"].to_pylist() if job.verify else []
    if collection.is_packed:
        facts = measure_shards(open_contents(collection), len(paths), data.max_pixels)
        faults += _list_unreadable(paths, facts)
    else:
        facts = measure_files(Path(data.root), paths, data.max_pixels)
    groups = find_groups(dict(zip(paths, facts)), "near")
    copies = sum(len(group) - 1 for group in groups)
    labels = dict(zip(paths, collection.table["label"].to_pylist()))
    kinds = _save_faults(job, [*faults, *_list_contrary(groups, labels)])
    if copies:
        line = "%s images show the same picture as another image: prepare.py job=duplicates data.root=%s lists them"
        log.warning(line, f"{copies:,}", data.root)
    tables = _count_values(collection, facts)
    tables["faults"] = [{"faults": kind, "images": count} for kind, count in kinds.items()]
    for name, rows in tables.items():
        if rows:
            log.info("%s: %s", name, ", ".join(f"{row[name]} {row['images']:,}" for row in rows[:_SHOWN]))
    tables["findings"] = [finding._asdict() for finding in sorted(collection.findings, reverse=True)]
    for finding in tables["findings"]:
        log.warning("%s (%s)", finding["line"], finding["key"])
    readable = [fact for fact in facts if fact.kind is None]
    values = {name: np.array([getattr(fact, name) for fact in readable], float) for name in _DRAWN}
    values["aspect"] = values["width"] / values["height"]
    pictures = {name: _draw_histogram(name, each) for name, each in values.items() if readable}
    summary = ", ".join(f"{kind}: {count:,}" for kind, count in kinds.items())
    summary += f" ({Path(job.report, job.name)}.jsonl)" if kinds else "no fault"
    page = save_report(Path(job.report) / job.name, data.root, _summarise(collection), tables, pictures)
    return f"{describe_collection(collection)}; {summary}; {copies:,} copies; {page}"


def _save_faults(job: Check, faults: Iterable[_Fault]) -> dict[str, int]:
    """List the reasons of each path in a file. Return the faults of each kind, the most frequent first."""
    reasons = {}
    for path, _, reason in sorted(faults, key=lambda fault: not fault[1]):
        reasons.setdefault(path, []).append(reason)
    kinds = Counter(kind for _, kind, _ in faults if kind)
    if reasons:
        list_files(job.report, job.name, {path: "; ".join(each) for path, each in reasons.items()}, kinds.total())
    return dict(kinds.most_common())


def _find_faults(job: Check, root: Path, data: DataConfig) -> Iterator[_Fault]:
    """Yield path, kind and reason of each fault of the images, the manifest and the sidecars of a folder.

    What is not used and no fault has no kind.
    If any image has a sidecar, images without a sidecar are faults. A manifest replaces sidecars, so bad sidecars are
    not.
    """
    unused = Unused()
    manifest = find_manifest(root)
    folder = scan_folder(root, unused, data.choice())
    if manifest is None:
        table = open_folder(folder, own_cache(CACHE)).read()
    else:
        table = read_table(manifest, unused, data.choice())
    images = sorted(folder.images)
    yield from _list_unreadable(images, measure_files(root, images, data.max_pixels) if job.verify else ())
    found = dict(unused)
    if manifest is None:
        bad = table.filter(pc.is_valid(table[FAULT])).to_pylist() if FAULT in table.column_names else ()
        yield from ((row["path"], "a bad sidecar", row[FAULT]) for row in bad)
    elif not is_packed(table):
        known = Names(folder.images)
        rows = {known.find(path) or path for path in table["path"].to_pylist()}
        gone = sorted(rows.difference(images))
        found["an image without a row in the manifest"] = [path for path in images if path not in rows]
        found["a row of the manifest without a file"] = [path for path in gone if not (root / path).is_file()]
    if folder.sidecars:
        found["an image without a sidecar"] = [path for path in images if path not in folder.sidecars]
    for reason, paths in found.items():
        kind = reason if reason.startswith(_FAULTS) else ""
        yield from ((path, kind, reason) for path in paths)


def _list_contrary(groups: Iterable[list[str]], labels: dict[str, str | None]) -> Iterator[_Fault]:
    """Yield the images of near-duplicates that have several labels; labels: by path."""
    for group in groups:
        if len({labels[path] for path in group} - {None}) > 1:
            first = f"{group[0]}, whose label is {labels[group[0]]}"
            yield from ((path, "", f"{labels[path]}, with the picture of {first}") for path in group[1:])


def _list_unreadable(paths: Iterable[str], facts: Iterable[FileFacts]) -> Iterator[_Fault]:
    for path, fact in zip(paths, facts):
        if fault := fact.reason or fact.remark:
            yield path, fact.kind or fault.partition(" (")[0], fault


def _count_values(collection: Collection, facts: list[FileFacts]) -> dict[str, list[TableRow]]:
    """Return a table for each column: its values and their images, the most frequent first."""
    columns = {name: collection.table[name] for name in _COLUMNS if name in collection.table.column_names}
    columns["format"] = pa.chunked_array([[fact.format for fact in facts]], pa.string())
    return {
        name: [{name: value, "images": count} for value, count in count_values(column).items()]
        for name, column in columns.items()
    }


def _summarise(collection: Collection) -> dict[str, float]:
    """Return the figures of a collection by their names."""
    lengths = pc.list_value_length(collection.table["tags"]).to_numpy()
    figures = {"images": len(collection)}
    for split in SPLITS:
        figures[f"images of {split}"] = len(collection.rows(split))
    figures["images without a tag"] = int((lengths == 0).sum())
    figures["tags per image"] = round(float(lengths.mean()), 2)
    figures["GiB"] = round(pc.sum(collection.table["size"]).as_py() / 2**30, 3)
    return figures


def _draw_histogram(title: str, values: ndarray) -> ndarray:
    """Draw a histogram without the highest 1 % of values, uint8 [H, W, 3]."""
    from matplotlib.figure import Figure  # takes 0.3 s

    from utils.record.plots import figure_to_image, style

    with style():
        figure = Figure(figsize=(7.2, 3.6))
        axis = figure.add_subplot(title=title, ylabel="images")
        axis.hist(values, bins=60, range=(values.min(), np.quantile(values, 0.99)))
        return figure_to_image(figure)
