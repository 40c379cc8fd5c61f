"""The table that every collection becomes: its columns, splits, order and hash."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from utils.errors import UserError

SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # POSIX, relative to the root
        ("size", pa.int64()),  # bytes
        ("sha256", pa.string()),  # null unless prepare.py filled it in
        ("split", pa.string()),
        ("label", pa.string()),
        ("tags", pa.list_(pa.field("item", pa.string()))),
        ("rating", pa.string()),
        ("caption", pa.string()),
        ("weight", pa.float32()),  # of the loss; 0 = not to be trained on
    ]
)
_LARGE = {pa.string(): pa.large_string(), SCHEMA.field("tags").type: pa.large_list(pa.large_string())}
_WIDE = pa.schema([(field.name, _LARGE.get(field.type, field.type)) for field in SCHEMA])
_CHUNK_ROWS = 131_072
SPLITS = ("train", "val")
# A test split is validation data here: nothing in this house trains on it, and nothing needs a third kind.
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}


def build_table(columns: dict[str, list[Any]]) -> pa.Table:
    """Build a table of SCHEMA, sorted by path, from its columns; one that is absent is null, a weight 1."""
    count = len(columns["path"])
    defaults = {"weight": [1.0] * count, "tags": [()] * count}
    arrays = [
        pa.array(columns.get(field.name, defaults.get(field.name, [None] * count)), field.type) for field in SCHEMA
    ]
    return sort_rows(pa.Table.from_arrays(arrays, schema=SCHEMA))


def sort_rows(table: pa.Table) -> pa.Table:
    """Return a table of SCHEMA sorted by path, in chunks of a fixed number of rows.

    By way of 64-bit offsets: Arrow cannot reorder a column whose texts together pass 2 GiB otherwise.
    """
    wide = table.cast(_WIDE).combine_chunks()
    order = pc.sort_indices(wide, [("path", "ascending")])
    starts = range(0, max(table.num_rows, 1), _CHUNK_ROWS)
    return pa.concat_tables([wide.take(order[start : start + _CHUNK_ROWS]).cast(SCHEMA) for start in starts])


def assign_validation(table: pa.Table, fraction: float) -> pa.Table:
    """Move a share of the rows to "val", where no row is there yet, by a hash of each path.

    Which rows go does not depend on the others, so adding files moves none.
    Raises UserError (`data.validation_fraction`) unless 0 <= fraction < 1.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"data.validation_fraction: {fraction} is not allowed; set a number from 0 to below 1")
    if fraction == 0 or "val" in table["split"].unique().to_pylist():
        return table
    limit = int(fraction * 2**64)
    paths = table["path"].to_pylist()
    chosen = [int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") < limit for path in paths]
    split = pa.array(np.where(chosen, "val", "train"), pa.string())
    return table.set_column(table.column_names.index("split"), "split", split)


def hash_table(table: pa.Table) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of every column, the same however the table is cut into chunks."""
    digest = hashlib.sha256()
    for field in SCHEMA:
        digest.update(f"{field.name} {field.type} {table.num_rows}\n".encode())
        _hash_column(digest.update, table[field.name])
    return digest.hexdigest()[:16]


def _hash_column(update: Callable[[bytes], None], column: pa.ChunkedArray) -> None:
    """Feed a column's nulls, lengths and values, each in one run over all chunks, to a hash."""
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


def count_values(column: pa.ChunkedArray) -> dict[str, int]:
    """Count the values of a column of texts, or of lists of texts: the most frequent first, then by name."""
    flat = pc.list_flatten(column) if pa.types.is_list(column.type) else column.drop_null()
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(flat).to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def replace_column(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return the table with one column exchanged."""
    return table.set_column(table.column_names.index(name), SCHEMA.field(name), column)
