"""The common table of all layouts: its columns, their order and their hash.

It has the columns of SCHEMA first, then optional ones: ids, byte ranges in shards, and extra columns of a manifest
(numbers or texts).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import Table

_COLUMNS = {
    "path": pa.string(),  # POSIX, relative to the root
    "size": pa.int64(),  # bytes
    "sha256": pa.string(),  # null unless prepare.py has filled it in
    "split": pa.string(),
    "label": pa.string(),
    "tags": pa.list_(pa.field("item", pa.string())),
    "rating": pa.string(),
    "caption": pa.string(),
    "weight": pa.float32(),  # weight in the loss; 0 excludes the image from training
}
SCHEMA = pa.schema([*_COLUMNS.items()])
TARGET = "target_number"  # a column: what task=regression learns
SIDECARS = "sidecars"  # a column: name, size and time of change of each
# Columns that prepare.py fills from the files. They are not in the fingerprint, because they only depend on the files'
# content and times: runs can be resumed after the manifest is written again. phash: only earlier versions had it.
MEASURED = {
    **{name: pa.int64() for name in ("width", "height", "orientation", "transparent", "phash", "group")},
    "mode": pa.string(),
    SIDECARS: pa.string(),
    "sharpness": pa.float64(),
}
# The byte range of a packed row: a file of the collection, and bytes. Not in the fingerprint either.
PLACES = {"shard": pa.string(), "offset": pa.int64(), "length": pa.int64()}
TAG_LISTS = ("tags", "unknown_tags")
TYPES = dict(zip(SCHEMA.names, SCHEMA.types))
TYPES |= {
    **dict.fromkeys(TAG_LISTS, TYPES["tags"]),
    TARGET: pa.float64(),
    **MEASURED,
    **PLACES,
}  # all columns with a meaning
_LARGE = {pa.string(): pa.large_string(), TYPES["tags"]: pa.large_list(pa.large_string())}
_CHUNK_ROWS = 131_072
SHOWN = 5  # names in a message
TEST = "test"  # never trained on, never used to choose anything
SPLITS = ("train", "val", TEST)
SPLIT_NAMES = {  # spellings of users, as `datasets` has them
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
}


def is_packed(table: Table) -> bool:
    """Return whether the rows are byte ranges of shards."""
    return PLACES.keys() <= set(table.column_names)


def build_table(columns: Mapping[str, Any] | Table, **changed: Any) -> Table:
    """Build a table of SCHEMA and extra columns, sorted by path, from lists or Arrow columns, or from another table.

    Missing columns of SCHEMA become null; null weights become 1 and null tags empty. Extra columns with only nulls are
    dropped.
    """
    if isinstance(columns, Table):
        columns = dict(zip(columns.column_names, columns.columns))
    columns = {**columns, **changed}
    complete = {}
    for name in dict.fromkeys((*SCHEMA.names, *columns)):
        column = columns.get(name)
        if column is None:
            column = pa.nulls(len(columns["path"]), TYPES[name])
        elif not isinstance(column, pa.Array | pa.ChunkedArray):
            column = pa.array(column, TYPES.get(name))
        if name not in SCHEMA.names and column.null_count == len(column):
            continue
        if name in ("weight", "tags"):
            column = pc.coalesce(column, pa.scalar(1.0 if name == "weight" else [], TYPES[name]))
        complete[name] = column
    table = pa.table(complete)
    paths = table["path"]
    if pc.all(pc.less_equal(paths[:-1], paths[1:])).as_py() is not False:  # a million rows are sorted in a second
        return table
    return take_rows(table, pc.sort_indices(table, [("path", "ascending")]))


def take_rows(table: Table, order: pa.Array) -> Table:
    """Return rows in a given order, in chunks of a fixed size.

    Uses 64-bit offsets, because otherwise Arrow cannot reorder a column with more than 2 GiB of text.
    """
    wide = table.cast(pa.schema([(field.name, _LARGE.get(field.type, field.type)) for field in table.schema]))
    wide = wide.combine_chunks()
    starts = range(0, max(len(order), 1), _CHUNK_ROWS)
    return pa.concat_tables([wide.take(order[start : start + _CHUNK_ROWS]).cast(table.schema) for start in starts])


def hash_table(table: Table) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the columns, independent of chunks.

    The columns of MEASURED and PLACES are not hashed.
    """
    digest = hashlib.sha256()
    for field in table.schema:
        if field.name not in (*MEASURED, *PLACES):
            digest.update(f"{field.name} {field.type} {table.num_rows}\n".encode())
            _hash_column(digest.update, table[field.name])
    return digest.hexdigest()[:16]


def _hash_column(update: Callable[[bytes], None], column: pa.ChunkedArray) -> None:
    """Update a hash with the nulls, lengths and values of a column, each over all chunks."""
    update(pc.is_null(column).to_numpy().tobytes())
    column = column.drop_null()
    if pa.types.is_list(column.type):
        update(pc.list_value_length(column).to_numpy().astype("<i8").tobytes())
        _hash_column(update, pc.list_flatten(column))
    elif pa.types.is_string(column.type):
        update(pc.binary_length(column).to_numpy().astype("<i8").tobytes())
        for chunk in column.chunks:
            _, offsets, data = chunk.buffers()
            ends = np.frombuffer(offsets, np.int32)[[chunk.offset, chunk.offset + len(chunk)]] if len(chunk) else (0, 0)
            update(memoryview(data)[ends[0] : ends[1]] if data is not None else b"")
    else:
        update(column.to_numpy().tobytes())


def has_value(column: pa.ChunkedArray) -> np.ndarray:
    """Return which rows of a column of texts or lists have something in it, bool [N]."""
    if pa.types.is_list(column.type):
        return pc.greater(pc.list_value_length(column), 0).to_numpy()
    return pc.not_equal(pc.utf8_trim_whitespace(column), "").fill_null(False).to_numpy()


def count_values(column: pa.ChunkedArray) -> dict[str, int]:
    """Count the values of a column of texts or lists of texts, the most frequent first, then by name."""
    flat = pc.list_flatten(column) if pa.types.is_list(column.type) else column.drop_null()
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(flat).to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def replace_column(table: Table, name: str, column: pa.Array | pa.ChunkedArray) -> Table:
    """Return the table with one column replaced, or appended if it is new."""
    return pa.table({**dict(zip(table.column_names, table.columns)), name: column})


def show_some(texts: Sequence[str]) -> str:
    """Join the first few texts, for messages."""
    return ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")
