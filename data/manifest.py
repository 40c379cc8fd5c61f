"""The manifest: a Parquet, JSONL or CSV file at the root of a collection that lists its images and what is known of
them. Where folders are no classes, a CSV file of any name with the columns path and label is one.

Columns are those of `data.table.SCHEMA`; only `path` is required. Further columns are kept. A manifest may come from a
stranger, so its paths must stay in the root. With the columns `data.table.PLACES` the paths are names alone, and the
shards are the files.
"""

import os
import posixpath
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.manifest_formats import CSV, JSONL, PARQUET, read_header, read_table
from data.scan import list_folder
from data.table import (
    MEASURED,
    PLACES,
    SCHEMA,
    SPLIT_NAMES,
    further_fields,
    is_packed,
    replace_column,
    settle_test_split,
    sort_rows,
)
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

Locate = Callable[[int], str]
Describe = Callable[[str], str]

# Paths that are looked at closely: absolute, of Windows, or with an empty part, `.` or `..`.
_SUSPECT = r"(^|/)\.{0,2}(/|$)|\\|^[A-Za-z]:|\x00"


def find_manifest(root: Path) -> Path | None:
    """Return the root's manifest, None where it has none. Raises UserError where it has two."""
    return find_one(root, (PARQUET, JSONL, CSV))


def find_one(root: Path, names: Iterable[str]) -> Path | None:
    """Return the one of some files that is at the root, None without any. Raises UserError where two are."""
    found = [root / name for name in names if (root / name).exists()]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise UserError(f"data.root: {str(root)!r} holds both {names}; keep the one that is right")
    return found[0] if found else None


def find_labels(root: Path, scanned: pa.Table) -> Path | None:
    """Return the CSV file at the root that has the columns path and label; None without one, or with class folders.

    scanned: what `scan_folder` found. Raises UserError (`data.root`) where there are several such files.
    """
    if pc.count_distinct(scanned["label"]).as_py() > 1:
        return None
    names = sorted(entry.name for entry in list_folder(root) if entry.name.lower().endswith(".csv") and entry.is_file())
    found = [root / name for name in names if {"path", "label"} <= set(read_header(root / name))]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise UserError(
            f"data.root: {str(root)!r} holds {names}, each with the columns path and label; join them in one {CSV} "
            "with a column split (train, val), or keep the one that is right"
        )
    return found[0] if found else None


def read_manifest(root: Path | None, file: Path) -> pa.Table:
    """Read a manifest into a table, sorted by path, with every file's size filled in.

    root: None for the manifest of remote shards, which are not looked for.

    Raises UserError (`data.root`) naming the file, the column or the row (counted from 0, without the header of CSV):
    broken file; missing, mistyped or misspelt column; path that is absent, repeated, or leads out of the root; unknown
    split; weight that is negative or not finite; shard that is absent; offset or length that is no number of bytes.
    """
    table = read_table(file)

    def locate(index: int) -> str:
        """Return the position of a row in the file, for messages."""
        return f"row {index}"

    if further := [field.name for field in further_fields(table.schema) if field.name not in {**MEASURED, **PLACES}]:
        known = ", ".join((*SCHEMA.names, *MEASURED, *PLACES))
        log.info("data.root: %s has the further columns %s, beside ours: %s", file.name, ", ".join(further), known)
    if table.num_rows == 0:
        raise UserError(f"data.root: {str(file)!r} has no row; name at least one image, or remove the file")
    _check_weights(file, table, locate)
    table = replace_column(table, "split", _read_splits(file, table, locate))
    given, table = table["path"], sort_rows(table)

    def describe(path: str) -> str:
        """Return where a path was read, for messages."""
        return f"{str(file)!r}, {locate(pc.index(given, path).as_py())}"

    if pc.count_distinct(table["path"]).as_py() < len(table):
        _refuse_repeats(file, given.to_pylist(), locate)
    if is_packed(table.schema):
        _check_places(root, file, table, describe)
        return settle_test_split(replace_column(table, "size", pc.coalesce(table["size"], table["length"])))
    if root is None:
        raise UserError(f"data.root: {file.name} names files, and from a URL shards are read; pack them (job=pack)")
    entries = find_files(root, table["path"], describe)
    if table["size"].null_count:
        known = table["size"].to_pylist()
        sizes = [entry.stat().st_size if size is None else size for entry, size in zip(entries, known)]
        table = replace_column(table, "size", pa.array(sizes, pa.int64()))
    else:
        deque(entries, maxlen=0)
    return settle_test_split(table)


def find_files(root: Path, paths: pa.ChunkedArray, describe: Describe) -> Iterator[os.DirEntry[str]]:
    """Yield the directory entry of each relative path; of sorted ones, each folder is listed once.

    Raises UserError (`data.root`) where a path is absolute or not in normal form, does not exist, is no file, or leads
    out of the root, by `..` or by a link. `describe(path)` says where the path was read.
    """
    real, listings, current = os.path.realpath(root), {}, None
    for chunk in paths.chunks:
        suspects = pc.match_substring_regex(chunk, _SUSPECT).to_pylist()
        for path, suspect in zip(chunk.to_pylist(), suspects):
            parent = path.rpartition("/")[0]
            if parent != current:  # of the folders before, those that it lies in may come again
                listings = {folder: found for folder, found in listings.items() if f"{parent}/".startswith(folder)}
                current = parent
            entry = (suspect and fault_of_path(path)) or _look_up(root, real, path, listings)
            if isinstance(entry, str):
                _refuse_path(root, describe(path), path, entry)
            yield entry


def _refuse_path(root: Path | None, where: str, path: str, fault: str) -> NoReturn:
    raise UserError(
        f"data.root: {where}: path {path!r} {fault}; allowed are files inside the collection, named from "
        f"{str(root or 'data.root')!r} with / between folders"
    )


def _check_places(root: Path | None, file: Path, table: pa.Table, describe: Describe) -> None:
    """Check the spelling of the paths of packed rows, that their shards are there, and their offsets and lengths."""
    suspects = table["path"].filter(pc.match_substring_regex(table["path"], _SUSPECT)).to_pylist()
    if faults := [(path, fault) for path in suspects if (fault := fault_of_path(path))]:
        _refuse_path(root, describe(faults[0][0]), *faults[0])
    places = [table[name].fill_null(-1).to_numpy() for name in ("offset", "length")]
    bad = np.flatnonzero((np.stack(places) < 0).any(axis=0) | table["shard"].is_null().to_numpy())
    if len(bad):
        found = {name: table[name][int(bad[0])].as_py() for name in PLACES}
        raise UserError(
            f"data.root: {describe(table['path'][int(bad[0])].as_py())}: {found} is no place of an image; pack the "
            "collection again"
        )
    shards, where = pc.unique(table["shard"]).sort(), f"{str(file)!r}, column shard"
    if root is not None:
        deque(find_files(root, pa.chunked_array([shards]), lambda path: where), maxlen=0)
    elif faults := [(shard, fault) for shard in shards.to_pylist() if (fault := fault_of_path(shard))]:
        _refuse_path(root, where, *faults[0])


def _check_weights(file: Path, table: pa.Table, locate: Locate) -> None:
    """Raise UserError for a weight that is negative, infinite or no number."""
    weights = table["weight"].to_numpy()
    bad = np.flatnonzero(~((weights >= 0) & np.isfinite(weights)))
    if len(bad):
        raise UserError(
            f"data.root: {str(file)!r}, {locate(bad[0])}: weight is {weights[bad[0]]}; write a number from 0 up"
        )


def _read_splits(file: Path, table: pa.Table, locate: Locate) -> pa.ChunkedArray:
    """Bring the split column to train, val and test; null is train."""
    names = pc.unique(table["split"])
    splits = [SPLIT_NAMES.get((name or "train").lower()) for name in names.to_pylist()]
    if None in splits:
        name, allowed = names[splits.index(None)], ", ".join(SPLIT_NAMES)
        row = locate(pc.index(table["split"], name).as_py())
        raise UserError(f"data.root: {str(file)!r}, {row}: split is {name.as_py()!r}; allowed are {allowed}")
    return pc.take(pa.array(splits, pa.string()), pc.index_in(table["split"], value_set=names))


def _refuse_repeats(file: Path, paths: list[str], locate: Locate) -> None:
    """Raise UserError where two rows name one path."""
    first: dict[str, int] = {}
    for index, path in enumerate(paths):
        if first.setdefault(path, index) != index:
            raise UserError(
                f"data.root: {str(file)!r}, {locate(index)}: path {path!r} is at {locate(first[path])} already; "
                "keep one of them"
            )


def fault_of_path(path: str) -> str | None:
    """Return the first error in the spelling of a path, None without an error."""
    if path.startswith("/") or PureWindowsPath(path).is_absolute():
        return "is absolute"
    if ".." in path.split("/"):
        return "leads out of the collection, by '..'"
    if not path or "\0" in path or posixpath.normpath(path) != path:
        return f"is not in normal form (that is {posixpath.normpath(path)!r})"
    return None


def _look_up(
    root: Path, real: str, path: str, listings: dict[str, dict[str, os.DirEntry[str]] | str]
) -> os.DirEntry[str] | str:
    """Return a path's directory entry, or the error. `listings` caches each folder."""
    parent, _, name = path.rpartition("/")
    if parent not in listings:
        listings[parent] = _list_inside(root / parent, real)
    listing = listings[parent]
    entry = listing if isinstance(listing, str) else listing.get(name, "does not exist")
    if isinstance(entry, str):
        return entry
    if entry.is_symlink() and not _is_inside(target := os.path.realpath(entry.path), real):
        return f"is a link out of the collection, to {target!r}"
    try:
        return entry if entry.is_file() else "is no file, or a link to nothing"
    except OSError as error:
        return f"cannot be followed ({error.strerror})"


def _list_inside(folder: Path, real: str) -> dict[str, os.DirEntry[str]] | str:
    """Return a folder's entries by name, or why it is not one inside the collection."""
    target = os.path.realpath(folder)
    if not _is_inside(target, real):
        return f"lies in a link out of the collection, to {target!r}"
    if not os.path.isdir(target):
        return "does not exist"
    return {entry.name: entry for entry in list_folder(folder)}


def _is_inside(target: str, real: str) -> bool:
    """Tell whether a real path is the real root or below it."""
    return target == real or target.startswith(real.rstrip("/") + "/")
