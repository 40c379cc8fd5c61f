"""The manifest: a Parquet, JSONL or CSV file at the root of a collection that lists its images and what is known of
them.

Columns are those of `table.SCHEMA`; only `path` is required. Further columns of numbers or texts are kept. A
manifest may come from a stranger, so its paths must stay in the root. With the columns `table.PLACES` the paths
are names alone, and the shards are the files.
"""

import functools
import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from data.layouts.table import PLACES, SCHEMA, SPLIT_NAMES, TYPES, build_table, replace_column
from utils.errors import UserError
from utils.io.files import write_atomically
from utils.record.logging import get_logger

log = get_logger(__name__)

PARQUET, JSONL, CSV = "manifest.parquet", "manifest.jsonl", "manifest.csv"
OUTSIDE = r"(^|/)\.{0,2}(/|$)|\x00"  # absolute, or with an empty part, `.` or `..`
# The Parquet metadata name what wrote a manifest, so that a user's own file is never overwritten.
_MAKER, _OURS = b"atelier.made_by", "write_manifest"
_AT_ONCE, _PART = 16, 512  # folders or files that are asked for at once


def find_manifest(root: Path) -> Path | None:
    """Return the root's manifest, None for none. Raises UserError if it has two."""
    return find_one(root, (PARQUET, JSONL, CSV))


def find_one(root: Path, names: Iterable[str]) -> Path | None:
    """Return which of some files is at the root, None for none. Raises UserError if two are."""
    found = [root / name for name in names if (root / name).exists()]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise UserError(f"data.root: {str(root)!r} holds both {names}; keep the one that is right")
    return found[0] if found else None


def read_manifest(root: Path | None, file: Path) -> pa.Table:
    """Read a manifest into a table, sorted by path, with every file's size filled in.

    root: None for the manifest of remote shards, which are not looked for.

    Raises UserError (`data.root`) naming the file, and the column, the row (counted from 0, without the header of CSV)
    or the path: broken file; missing or mistyped column; path that is absent, repeated, or leads out of the root;
    unknown split; weight that is negative or not finite; shard that is absent, or does not hold what a row says.
    """
    table = read_table(file)
    if len(table) == 0:
        raise UserError(f"data.root: {str(file)!r} has no row; name at least one image, or remove the file")
    if further := [name for name in table.column_names if name not in TYPES]:
        log.info("data.root: %s has the further columns %s, beside ours: %s", file.name, further, list(TYPES))
    weights = table["weight"].fill_null(1.0).to_numpy()
    for row in np.flatnonzero(~((weights >= 0) & np.isfinite(weights))).tolist():
        raise UserError(f"data.root: {str(file)!r}, row {row}: weight is {weights[row]}; write a number from 0 up")
    table = build_table({**dict(zip(table.column_names, table.columns)), "split": _read_splits(file, table["split"])})
    paths, where = table["path"], f"{str(file)!r}, column path"
    again = paths.slice(1).filter(pc.equal(paths.slice(1), paths.slice(0, len(paths) - 1)))
    if len(again):
        raise UserError(f"data.root: {where}: {again[0].as_py()!r} is there twice; keep one of the rows")
    _check_spelling(paths, where)
    if PLACES.keys() <= set(table.column_names):
        _check_places(root, file, table)
        sizes = table["length"]
    elif root is None:
        raise UserError(f"data.root: {file.name} names files, and from a URL shards are read; pack them (job=pack)")
    else:
        sizes = pa.array(find_sizes(root, paths.to_pylist(), where))
    return replace_column(table, "size", pc.coalesce(table["size"], sizes))


def read_table(file: Path) -> pa.Table:
    """Read a manifest as it is, but for the types of its columns, which are ours.

    Raises UserError (`data.root`) for a broken file, and for a column that is missing or of another type.
    """
    read = {".parquet": read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv}[file.suffix]
    try:
        table = read(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data.root: {str(file)!r} cannot be read ({error}); repair it or make it again") from error
    if len(set(table.column_names)) < table.num_columns or "path" not in table.column_names:
        raise UserError(
            f"data.root: {str(file)!r} has the columns {', '.join(table.column_names)}; path must be there, and any of "
            f"{', '.join(SCHEMA.names)}, each once"
        )
    nested = [name for name in table.column_names if name not in TYPES and pa.types.is_nested(table[name].type)]
    if nested:
        log.info("data.root: %s: columns of lists or records are ignored: %s", file.name, ", ".join(nested))
    columns = {name: _cast(file, name, table[name]) for name in table.column_names if name not in nested}
    for row in np.flatnonzero(columns["path"].is_null().to_numpy()).tolist():
        raise UserError(f"data.root: {str(file)!r}, row {row}: path is null; name the image or drop the row")
    return pa.table({**{field.name: pa.nulls(len(table), field.type) for field in SCHEMA}, **columns})


def read_parquet(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file as it is, or only some of its columns.

    Raises ArrowException or OSError where it is not one.
    """
    with pq.ParquetFile(file) as parquet:  # not read_table, which takes folders named a=b for columns
        return parquet.read(columns)


def _read_jsonl(file: Path) -> pa.Table:
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")  # which some programs write before UTF-8
    options = pa.json.ReadOptions(block_size=len(content) + 1)  # so that a column has one type
    return pa.json.read_json(pa.BufferReader(content), read_options=options)


def _read_csv(file: Path) -> pa.Table:
    """Read a CSV file. Empty fields are absent; tags are separated by commas, so several need quotes."""
    types = {**TYPES, "tags": pa.string()}
    table = pa.csv.read_csv(
        file,
        convert_options=pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""]),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
    )
    if "tags" not in table.column_names:
        return table
    texts = table["tags"].to_pylist()
    lists = [text and [tag for part in text.split(",") if (tag := part.strip())] for text in texts]
    return table.set_column(table.column_names.index("tags"), "tags", pa.array(lists, TYPES["tags"]))


def _cast(file: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast a column to its type; a further one to int64, float64 or text.

    Raises UserError where that would change its meaning.
    """
    found = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_whole = pa.types.is_boolean(found) or pa.types.is_integer(found)
    other = pa.int64() if is_whole else pa.float64() if pa.types.is_floating(found) else pa.string()
    wanted = TYPES.get(name, other)
    try:
        column = column.cast(wanted)
    except pa.ArrowException as error:
        raise UserError(
            f"data.root: column {name!r} of {str(file)!r} is {column.type} ({error}); write {wanted}"
        ) from error
    if name == "tags" and pc.list_flatten(column).null_count:
        raise UserError(f"data.root: column 'tags' of {str(file)!r} holds lists with a null; drop it from the list")
    return column


def _read_splits(file: Path, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Bring the split column to train, val and test; null is train."""
    names = pc.unique(column)
    splits = [SPLIT_NAMES.get((name or "train").lower()) for name in names.to_pylist()]
    if None in splits:
        name = names[splits.index(None)]
        raise UserError(
            f"data.root: {str(file)!r}, row {pc.index(column, name)}: split is {name.as_py()!r}; allowed are "
            f"{', '.join(SPLIT_NAMES)}"
        )
    return pc.take(pa.array(splits, pa.string()), pc.index_in(column, value_set=names))


def _check_spelling(paths: pa.ChunkedArray, where: str) -> None:
    """Raise UserError for a path that is not one inside the collection by its spelling."""
    outside = paths.filter(pc.match_substring_regex(paths, OUTSIDE))
    if len(outside):
        raise UserError(
            f"data.root: {where}: {outside[0].as_py()!r} is absolute or leads out, or has an empty part or '.'; write "
            "paths inside the collection, with / between folders"
        )


def _check_places(root: Path | None, file: Path, table: pa.Table) -> None:
    """Raise UserError where a packed row is not a part of a shard in the collection."""
    shards, where = pa.chunked_array([pc.unique(table["shard"]).drop_null()]), f"{str(file)!r}, column shard"
    _check_spelling(shards, where)
    ends = np.full(len(table), np.inf)
    if root is not None:
        sizes = np.array([*find_sizes(root, shards.to_pylist(), where), -1])
        ends = sizes[pc.index_in(table["shard"], value_set=shards.chunk(0)).fill_null(-1).to_numpy()]
    offsets, lengths = (table[name].fill_null(-1).to_numpy() for name in ("offset", "length"))
    inside = (offsets >= 0) & (lengths >= 0) & (offsets + lengths <= ends) & table["shard"].is_valid().to_numpy()
    for row in np.flatnonzero(~inside).tolist():
        found = {name: table[name][row].as_py() for name in ("path", *PLACES)}
        raise UserError(f"data.root: {str(file)!r}: {found} is no place in a shard; pack the collection again")


def find_sizes(root: Path, paths: Sequence[str], where: str) -> list[int]:
    """Return the bytes of files of a collection, which threads look up.

    Raises UserError (`data.root`) where one is no file, or leads out of the root by a link. where: of the paths, for
    messages.
    """
    real = os.path.join(os.path.realpath(root), "")
    find_folder = functools.lru_cache(_PART)(lambda folder: os.path.realpath(os.path.join(root, folder)))

    def look_up(path: str) -> int:
        folder, _, name = path.rpartition("/")
        try:
            file = os.path.join(find_folder(folder), name)
            status = os.lstat(file)
            if stat.S_ISLNK(status.st_mode):
                file = os.path.realpath(file)
                status = os.stat(file)
        except OSError as error:
            raise UserError(
                f"data.root: {where}: {path!r} does not exist in {str(root)!r} ({error.strerror})"
            ) from error
        if not stat.S_ISREG(status.st_mode) or not file.startswith(real):
            fault = f"is a link out of the collection, to {file!r}" if not file.startswith(real) else "is no file"
            raise UserError(f"data.root: {where}: {path!r} {fault}; name files inside {str(root)!r}")
        return status.st_size

    parts = [paths[start : start + _PART] for start in range(0, len(paths), _PART)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [size for sizes in pool.map(lambda part: list(map(look_up, part)), parts) for size in sizes]


def save_manifest(root: Path, table: pa.Table, maker: str = _OURS) -> None:
    """Write a table as the root's `manifest.parquet`, atomically.

    maker: only a manifest of the default maker is ever overwritten. Raises UserError (`data.root`) if the folder is not
    writable.
    """
    table = table.replace_schema_metadata({_MAKER: maker.encode()})
    try:
        write_atomically(root / PARQUET, lambda file: pq.write_table(table, file, compression="zstd"))
    except PermissionError as error:
        raise UserError(f"data.root: {str(root)!r} is not writable, so {PARQUET} cannot be made there") from error


def refuse_foreign(file: Path) -> None:
    """Raise UserError for a manifest that job=manifest did not write."""
    made_by = (read_parquet(file).schema.metadata or {}).get(_MAKER) if file.name == PARQUET else None
    if made_by != _OURS.encode():
        raise UserError(
            f"data.root: {str(file)!r} was not made from this folder and is not overwritten; it is read as it is. To "
            "have one made from the folder, move it away"
        )
