"""The manifest: a Parquet, JSONL or CSV file at the root of a collection that lists its images and what is known of
them.

Columns are those of `data.table.SCHEMA`; only `path` is required. `write_manifest` (prepare.py job=manifest) makes
`manifest.parquet` from a scanned folder. A manifest may come from a stranger, so its paths must stay in the root.
"""

import csv
import functools
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.decode import DEFAULT_MAX_PIXELS
from data.inspection import (
    UNREADABLE,
    Inspected,
    ManifestReport,
    count_kinds,
    count_traits,
    fatal_file,
    inspect_file,
    list_unreadable,
)
from data.scan import check_root, list_folder, parse_json, scan_folder
from data.table import SCHEMA, SPLIT_NAMES, assign_validation, count_values, sort_rows
from utils.errors import UserError, close_names
from utils.io.files import write_atomically
from utils.io.untrusted.parquet import refuse_parquet_bomb
from utils.ranks.processes import map_in_processes

PARQUET, JSONL, CSV = "manifest.parquet", "manifest.jsonl", "manifest.csv"
# The Parquet metadata name the function that made a manifest, so that a user's own file is never overwritten.
_MAKER = b"atelier.made_by"
_COLUMNS = ", ".join(SCHEMA.names)
_PARALLEL_FROM = 512  # images; below, starting processes takes longer than decoding

Locate = Callable[[int], str]


def find_manifest(root: Path) -> Path | None:
    """Return the root's manifest, None where it has none. Raises UserError where it has two."""
    found = [root / name for name in (PARQUET, JSONL, CSV) if (root / name).exists()]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise UserError(f"data.root: {str(root)!r} holds both {names}; keep the one that is right")
    return found[0] if found else None


def read_manifest(root: Path, file: Path) -> pa.Table:
    """Read a manifest into a table of SCHEMA, sorted by path, with every file's size filled in.

    Raises UserError (`data.root`) naming the file, the column or the row (counted from 0; in JSONL and CSV the line,
    from 1): broken file; unknown, missing or mistyped column; path that is absent, repeated, or leads out of the root;
    unknown split; weight that is negative or not finite.
    """
    if file.name == PARQUET:
        table = _conform(file, _read_parquet(file))
        unit, numbers = "row", range(table.num_rows)
    else:
        columns, numbers = _read_jsonl(file) if file.name == JSONL else _read_csv(file)
        table, unit = _table_of(columns), "line"

    def locate(index: int) -> str:
        """Return the position of a row in the file, for messages."""
        return f"{unit} {numbers[index]}"

    if table.num_rows == 0:
        raise UserError(f"data.root: {str(file)!r} has no row; name at least one image, or remove the file")
    _check_weights(file, table, locate)
    table = _replace(table, "split", _read_splits(file, table, locate))
    paths = table["path"].to_pylist()
    _refuse_repeats(file, paths, locate)
    entries = find_files(root, paths, lambda index: f"{str(file)!r}, {locate(index)}")
    if table["size"].null_count:
        known = table["size"].to_pylist()
        sizes = [entry.stat().st_size if size is None else size for entry, size in zip(entries, known)]
        table = _replace(table, "size", pa.array(sizes, pa.int64()))
    return sort_rows(table)


def find_files(root: Path, paths: Iterable[str], describe: Locate) -> list[os.DirEntry[str]]:
    """Return the directory entry of each relative path, listing each folder once.

    Raises UserError (`data.root`) where a path is absolute or not in normal form, does not exist, is no file, or leads
    out of the root, by `..` or by a link. `describe(index)` says where the path was read.
    """
    real, listings, entries = os.path.realpath(root), {}, []
    for index, path in enumerate(paths):
        entry = _fault_of_path(path) or _look_up(root, real, path, listings)
        if isinstance(entry, str):
            raise UserError(
                f"data.root: {describe(index)}: path {path!r} {entry}; allowed are files inside the collection, "
                f"named from {str(root)!r} with / between folders"
            )
        entries.append(entry)
    return entries


def write_manifest(
    root: str,
    *,
    validation_fraction: float,
    verify: bool,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> ManifestReport:
    """Scan a folder and write `manifest.parquet` into it, with the SHA-256 of every file.

    verify: decode every image too; one that is unreadable stays in the manifest with weight 0 and is reported, by name
    in `manifest.unreadable.jsonl`. A file that cannot even be opened is treated so in any case. progress: called with
    the images done and their number.

    Raises UserError (`data.root`) as `scan_folder` does, for a link out of the root, for a folder that cannot be
    written, and for a manifest already there that this function did not write.
    """
    folder = check_root(root)
    _refuse_foreign(folder)
    table = assign_validation(scan_folder(folder), validation_fraction)
    paths = table["path"].to_pylist()
    find_files(folder, paths, lambda index: "a manifest cannot name this image")
    found = _inspect_all([str(folder / path) for path in paths], verify, max_pixels, progress)
    reasons = [inspection.reason for _, inspection in found]
    table = _replace(table, "sha256", pa.array([digest for digest, _ in found], pa.string()))
    table = _replace(table, "weight", pa.array([1.0 if reason is None else 0.0 for reason in reasons], pa.float32()))
    unreadable = [(path, reason) for path, reason in zip(paths, reasons) if reason is not None]
    counts = [count_values(table[name]) for name in ("split", "label", "tags")]
    return ManifestReport(
        save_manifest(folder, table, "write_manifest"),
        table.num_rows,
        *counts,
        unreadable,
        count_kinds(found),
        count_traits(paths, found),
        list_unreadable(folder / UNREADABLE, unreadable),
    )


def save_manifest(root: Path, table: pa.Table, maker: str) -> Path:
    """Write a table of SCHEMA as the root's `manifest.parquet`, atomically, and return its path.

    Only what the maker "write_manifest" wrote is ever overwritten by it. Raises UserError (`data.root`) where the
    folder is not writable.
    """
    assert table.schema.equals(SCHEMA), table.schema
    table = table.replace_schema_metadata({_MAKER: maker.encode()})
    try:
        write_atomically(root / PARQUET, lambda file: pq.write_table(table, file, compression="zstd"))
    except PermissionError as error:
        raise UserError(f"data.root: {str(root)!r} is not writable, so {PARQUET} cannot be made there") from error
    return root / PARQUET


def _refuse_foreign(root: Path) -> None:
    """Raise UserError where the root has a manifest that `write_manifest` did not make."""
    file = find_manifest(root)
    if file is None:
        return
    made_by = (_read_parquet(file).schema.metadata or {}).get(_MAKER) if file.name == PARQUET else None
    if made_by != b"write_manifest":
        raise UserError(
            f"data.root: {str(file)!r} was not made from this folder and is not overwritten; it is read as it is. To "
            "have one made from the folder, move it away"
        )


def _inspect_all(
    files: list[str], verify: bool, max_pixels: int, progress: Callable[[int, int], None] | None
) -> list[Inspected]:
    """Return SHA-256 and findings of each file; with many files, in one process per core."""
    inspect = functools.partial(inspect_file, verify=verify, max_pixels=max_pixels)
    if len(files) < _PARALLEL_FROM or (os.cpu_count() or 1) == 1:
        return _count_off(map(inspect, files), len(files), progress)
    return _count_off(map_in_processes(inspect, files, fatal_file), len(files), progress)


def _count_off(results: Iterable[Any], total: int, progress: Callable[[int, int], None] | None) -> list[Any]:
    """Collect results, reporting after each."""
    found = []
    for result in results:
        found.append(result)
        if progress is not None:
            progress(len(found), total)
    return found


def _read_parquet(file: Path) -> pa.Table:
    """Read a Parquet file. Raises UserError where it is not one."""
    try:
        with pq.ParquetFile(file) as parquet:  # not read_table, which takes folders named a=b for columns
            refuse_parquet_bomb(file, parquet.metadata, "data.root")
            return parquet.read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data.root: {str(file)!r} cannot be read as Parquet ({error}); make it again") from error


def _conform(file: Path, table: pa.Table) -> pa.Table:
    """Cast a table to SCHEMA, filling in absent columns. Raises UserError for a column that does not fit."""
    unknown = sorted(set(table.column_names) - set(SCHEMA.names))
    if unknown or "path" not in table.column_names or len(set(table.column_names)) < len(table.column_names):
        raise UserError(
            f"data.root: {str(file)!r} has the columns {', '.join(table.column_names)}; path must be there, allowed "
            f"are {_COLUMNS}, each once" + (f"; remove or rename {', '.join(unknown)}" if unknown else "")
        )
    columns = {name: _cast(file, name, table[name]) for name in table.column_names}
    return _table_of(columns, table.num_rows)


def _cast(file: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast a column to its type in SCHEMA. Raises UserError where that would change its meaning."""
    wanted, found = SCHEMA.field(name).type, column.type
    if not (pa.types.is_null(found) or _kind(found) == _kind(wanted) or (name, _kind(found)) == ("weight", "integer")):
        raise UserError(f"data.root: column {name!r} of {str(file)!r} is {found}; write it as {wanted}")
    if name == "path" and column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise UserError(f"data.root: {str(file)!r}, row {row}: path is null; name the image or drop the row")
    if name == "tags" and _kind(found) == "list of text" and pc.list_flatten(column).null_count:
        raise UserError(f"data.root: column 'tags' of {str(file)!r} holds lists with a null; drop it from the list")
    try:
        return column.cast(wanted)
    except pa.ArrowInvalid as error:
        raise UserError(f"data.root: column {name!r} of {str(file)!r} does not fit {wanted} ({error})") from error


def _kind(kind: pa.DataType) -> str:
    """Name the kind of values of a type, whatever its storage."""
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return "list of text" if pa.types.is_null(kind.value_type) else f"list of {_kind(kind.value_type)}"
    return "integer" if pa.types.is_integer(kind) else "number" if pa.types.is_floating(kind) else str(kind)


def _table_of(columns: dict[str, Any], rows: int | None = None) -> pa.Table:
    """Build a table of SCHEMA in the given order of rows; null tags become none, null weights 1."""
    rows = len(columns["path"]) if rows is None else rows
    arrays = []
    for field in SCHEMA:
        column = columns.get(field.name)
        column = pa.nulls(rows, field.type) if column is None else column
        column = pa.array(column, field.type) if isinstance(column, list) else column
        if field.name == "tags":
            column = pc.if_else(pc.is_valid(column), column, pa.scalar([], field.type))
        arrays.append(column.fill_null(1.0) if field.name == "weight" else column)
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _read_jsonl(file: Path) -> tuple[dict[str, list[Any]], list[int]]:
    """Read a JSONL manifest into columns, and the line of each row. Raises UserError naming the first line at fault."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    lines = []
    try:
        stream = open(file, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"data.root: {str(file)!r} cannot be read ({error.strerror})") from error
    with stream:
        for number, raw in enumerate(stream, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                record = parse_json(text) if text else None
            except ValueError as error:
                raise UserError(f"data.root: {str(file)!r}, line {number}: broken JSON ({error}); fix it") from error
            if text:
                if fault := _fault_of_record(record):
                    raise UserError(f"data.root: {str(file)!r}, line {number}: {fault}")
                for name in SCHEMA.names:
                    columns[name].append(record.get(name))
                lines.append(number)
    return columns, lines


def _read_csv(file: Path) -> tuple[dict[str, list[Any]], list[int]]:
    """Read a CSV manifest into columns, and the line of each row. Raises UserError naming the first line at fault.

    The first row names the columns. Empty fields are absent. Tags are separated by commas, so a list of several needs
    quotes.
    """
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    lines = []
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            _check_csv_header(file, reader.fieldnames or [])
            for row in reader:
                record = _record_of_csv(file, reader.line_num, row)
                if fault := _fault_of_record(record):
                    raise UserError(f"data.root: {str(file)!r}, line {reader.line_num}: {fault}")
                for name in SCHEMA.names:
                    columns[name].append(record.get(name))
                lines.append(reader.line_num)
    except OSError as error:
        raise UserError(f"data.root: {str(file)!r} cannot be read ({error.strerror})") from error
    except (csv.Error, UnicodeDecodeError) as error:
        where = f"line {len(lines) + 2}"
        raise UserError(f"data.root: {str(file)!r}, {where}: broken CSV ({error}); save it as UTF-8 CSV") from error
    return columns, lines


def _check_csv_header(file: Path, names: Sequence[str]) -> None:
    """Raise UserError where the first row of a CSV manifest does not name its columns."""
    advice = f"name the columns in the first row, path and any of {_COLUMNS}, each once"
    if "path" not in names or len(set(names)) < len(names):
        raise UserError(f"data.root: {str(file)!r}, line 1: the columns are {', '.join(names)}; {advice}")
    for name in names:
        if name not in SCHEMA.names:
            close = close_names(name, SCHEMA.names)
            raise UserError(f"data.root: {str(file)!r}, line 1: unknown column {name!r}; {close}")


def _record_of_csv(file: Path, line: int, row: dict[str | None, Any]) -> dict[str, Any]:
    """Return a CSV row as a JSONL record: numbers and lists parsed, empty fields None."""
    if None in row or None in row.values():
        raise UserError(f"data.root: {str(file)!r}, line {line}: it has another number of fields than the first row")
    record: dict[str, Any] = {name: text or None for name, text in row.items()}
    for name, parse in (("size", int), ("weight", float)):
        if record.get(name) is not None:
            try:
                record[name] = parse(record[name])
            except ValueError:
                raise UserError(
                    f"data.root: {str(file)!r}, line {line}: {name} is {record[name]!r}; write a number"
                ) from None
    if record.get("tags") is not None:
        record["tags"] = [tag for part in record["tags"].split(",") if (tag := part.strip())]
    return record


def _fault_of_record(record: Any) -> str | None:
    """Return the first error in the type or keys of one record, None without an error."""
    if not isinstance(record, dict):
        return f"{json.dumps(record)[:60]} is not an object; write one as in {{'path': 'a.png', 'label': 'cat'}}"
    if "path" not in record or record["path"] is None:
        return "path is missing; name the image, relative to the manifest's folder"
    for name, value in record.items():
        if name not in SCHEMA.names:
            return f"unknown key {name!r}; allowed are {_COLUMNS}"
        if value is None:
            continue
        kind = _kind(SCHEMA.field(name).type)
        fits = {
            "text": isinstance(value, str),
            "list of text": isinstance(value, list) and all(isinstance(tag, str) for tag in value),
            "integer": type(value) is int and 0 <= value < 2**63,
            "number": type(value) in (int, float) and abs(value) < 3e38,
        }
        if not fits[kind]:
            article = "an" if kind == "integer" else "a"
            return f"{name} is {json.dumps(value)[:60]}; write {article} {kind}"
    return None


def _replace(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return the table with one column exchanged."""
    return table.set_column(table.column_names.index(name), SCHEMA.field(name), column)


def _check_weights(file: Path, table: pa.Table, locate: Locate) -> None:
    """Raise UserError for a weight that is negative, infinite or no number."""
    weights = table["weight"].to_numpy()
    bad = np.flatnonzero(~((weights >= 0) & np.isfinite(weights)))
    if len(bad):
        raise UserError(
            f"data.root: {str(file)!r}, {locate(bad[0])}: weight is {weights[bad[0]]}; write a number from 0 up"
        )


def _read_splits(file: Path, table: pa.Table, locate: Locate) -> pa.Array:
    """Bring the split column to train and val; null is train."""
    names = table["split"].to_pylist()
    splits = [SPLIT_NAMES.get((name or "train").lower()) for name in names]
    if None in splits:
        index = splits.index(None)
        allowed = ", ".join(SPLIT_NAMES)
        raise UserError(f"data.root: {str(file)!r}, {locate(index)}: split is {names[index]!r}; allowed are {allowed}")
    return pa.array(splits, pa.string())


def _refuse_repeats(file: Path, paths: list[str], locate: Locate) -> None:
    """Raise UserError where two rows name one path."""
    first: dict[str, int] = {}
    for index, path in enumerate(paths):
        if first.setdefault(path, index) != index:
            raise UserError(
                f"data.root: {str(file)!r}, {locate(index)}: path {path!r} is at {locate(first[path])} already; "
                "keep one of them"
            )


def _fault_of_path(path: str) -> str | None:
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
    return entry if entry.is_file() else "is no file, or a link to nothing"


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
