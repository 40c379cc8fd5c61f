"""The file formats of a manifest: Parquet, JSONL and CSV, read by pyarrow into the columns of a collection's table."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from data.table import SCHEMA, column_type
from utils.errors import UserError

PARQUET, JSONL, CSV = "manifest.parquet", "manifest.jsonl", "manifest.csv"
_COLUMNS = ", ".join(SCHEMA.names)
_MAX_HEADER = 2**16  # characters
BOM = b"\xef\xbb\xbf"  # which some programs write before UTF-8


def read_table(file: Path) -> pa.Table:
    """Read a manifest into a table of SCHEMA and its further columns, in the file's order, absent values filled in.

    Raises UserError (`data.root`) for a broken file, and for a column that is missing or of another type.
    """
    read = {".parquet": read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv}[file.suffix.lower()]
    try:
        return _conform(file, read(file))
    except (pa.ArrowException, csv.Error, UnicodeDecodeError, OSError) as error:
        raise UserError(f"data.root: {str(file)!r} cannot be read ({error}); repair it or make it again") from error


def read_parquet(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file as it is, or those of some columns that it has.

    Raises ArrowException or OSError where it is not one.
    """
    with pq.ParquetFile(file) as parquet:  # not read_table, which takes folders named a=b for columns
        return parquet.read(columns)


def _read_jsonl(file: Path) -> pa.Table:
    content = file.read_bytes().removeprefix(BOM)
    options = pa.json.ReadOptions(block_size=len(content) + 1)  # so that a column has one type
    return pa.json.read_json(pa.BufferReader(content), read_options=options)


def read_header(file: Path) -> list[str]:
    """Return the names in a CSV file's first line; none where it cannot be read."""
    try:
        with open(file, encoding="utf-8-sig", errors="replace", newline="") as stream:
            return next(csv.reader([stream.readline(_MAX_HEADER)]), [])
    except (OSError, csv.Error):
        return []


def _read_csv(file: Path) -> pa.Table:
    """Read a CSV file. Empty fields are absent; tags are separated by commas, so several need quotes."""
    with open(file, encoding="utf-8-sig", newline="") as stream:
        names = next(csv.reader(stream), [])
    types = {name: pa.string() for name in names} | {"size": pa.int64(), "weight": pa.float32()}
    table = pa.csv.read_csv(
        file,
        convert_options=pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""]),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
    )
    for place, name in enumerate(table.column_names):
        if name == "tags":
            texts = table[name].to_pylist()
            lists = [text and [tag for part in text.split(",") if (tag := part.strip())] for text in texts]
            table = table.set_column(place, name, pa.array(lists, SCHEMA.field("tags").type))
        elif name not in SCHEMA.names:
            table = table.set_column(place, name, _parse_numbers(table[name]))
    return table


def _parse_numbers(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of texts as numbers where all of them are, else as it is."""
    for kind in (pa.int64(), pa.float64()):
        try:
            return texts.cast(kind)
        except pa.ArrowInvalid:
            continue
    return texts


def _conform(file: Path, table: pa.Table) -> pa.Table:
    """Cast a table to SCHEMA and its further columns to theirs, filling in absent ones.

    Raises UserError for a column that does not fit.
    """
    if "path" not in table.column_names or len(set(table.column_names)) < len(table.column_names):
        raise UserError(
            f"data.root: {str(file)!r} has the columns {', '.join(table.column_names)}; path must be there, and any of "
            f"{_COLUMNS}, each once"
        )
    columns = {name: _cast(file, name, table[name]) for name in table.column_names}
    return fill_columns(columns, table.num_rows)


def _cast(file: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast a column to its type in SCHEMA. Raises UserError where that would change its meaning."""
    if name not in SCHEMA.names:
        column = _as_vectors(column)
    found = column.type
    if name not in SCHEMA.names:
        wanted = column_type(found)
        if wanted is None:
            raise UserError(
                f"data.root: column {name!r} of {str(file)!r} is {found}; write numbers, text or lists of fixed length"
            )
        return column.cast(wanted)
    wanted = SCHEMA.field(name).type
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


def _as_vectors(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of lists of numbers of one length as vectors, any other as it is."""
    if not pa.types.is_list(column.type) or _kind(column.type.value_type) not in ("integer", "number"):
        return column
    lengths = pc.unique(pc.drop_null(pc.list_value_length(column))).to_pylist()
    return column.cast(pa.list_(pa.float32(), lengths[0])) if len(lengths) == 1 else column


def _kind(kind: pa.DataType) -> str:
    """Name the kind of values of a type, for any storage."""
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return "list of text" if pa.types.is_null(kind.value_type) else f"list of {_kind(kind.value_type)}"
    return "integer" if pa.types.is_integer(kind) else "number" if pa.types.is_floating(kind) else str(kind)


def fill_columns(columns: dict[str, Any], rows: int) -> pa.Table:
    """Build a table of SCHEMA in the given order of rows; null tags become none, null weights 1."""
    arrays = []
    for field in SCHEMA:
        column = columns.get(field.name)
        column = pa.nulls(rows, field.type) if column is None else column
        if field.name == "tags":
            column = pc.if_else(pc.is_valid(column), column, pa.scalar([], field.type))
        arrays.append(column.fill_null(1.0) if field.name == "weight" else column)
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    for name, column in columns.items():
        if name not in SCHEMA.names:
            table = table.append_column(name, column)
    return table
