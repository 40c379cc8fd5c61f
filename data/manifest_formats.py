"""The file formats of a manifest: Parquet, JSONL and CSV, read into the columns of a collection's table."""

import csv
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.scan import parse_json
from data.table import MEASURED, SCHEMA, column_type
from utils.errors import UserError
from utils.io.untrusted.parquet import refuse_parquet_bomb

PARQUET, JSONL, CSV = "manifest.parquet", "manifest.jsonl", "manifest.csv"
_COLUMNS = ", ".join(SCHEMA.names)
_ALIKE = 0.75  # a name as similar as this to one of ours is a misspelling of it


def read_parquet(file: Path) -> pa.Table:
    """Read a Parquet file. Raises UserError where it is not one."""
    try:
        with pq.ParquetFile(file) as parquet:  # not read_table, which takes folders named a=b for columns
            refuse_parquet_bomb(file, parquet.metadata, "data.root")
            return parquet.read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data.root: {str(file)!r} cannot be read as Parquet ({error}); make it again") from error


def conform(file: Path, table: pa.Table) -> pa.Table:
    """Cast a table to SCHEMA and its further columns to theirs, filling in absent ones.

    Raises UserError for a column that does not fit.
    """
    if "path" not in table.column_names or len(set(table.column_names)) < len(table.column_names):
        raise UserError(
            f"data.root: {str(file)!r} has the columns {', '.join(table.column_names)}; path must be there, and any of "
            f"{_COLUMNS}, each once"
        )
    for name in table.column_names:
        if fault := _fault_of_name(name):
            raise UserError(f"data.root: {str(file)!r} has the {fault}")
    columns = {name: _cast(file, name, table[name]) for name in table.column_names}
    return build_columns(columns, table.num_rows)


def _cast(file: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast a column to its type in SCHEMA. Raises UserError where that would change its meaning."""
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


def _kind(kind: pa.DataType) -> str:
    """Name the kind of values of a type, for any storage."""
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return "list of text" if pa.types.is_null(kind.value_type) else f"list of {_kind(kind.value_type)}"
    return "integer" if pa.types.is_integer(kind) else "number" if pa.types.is_floating(kind) else str(kind)


def build_columns(columns: dict[str, Any], rows: int | None = None) -> pa.Table:
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
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    for name, column in columns.items():
        if name not in SCHEMA.names:
            table = table.append_column(name, column)
    return table


def _fault_of_name(name: str) -> str | None:
    """Return the error where a column's name is a misspelling of one of ours, None for any other name."""
    close = difflib.get_close_matches(name, SCHEMA.names, n=1, cutoff=_ALIKE)
    if name in (*SCHEMA.names, *MEASURED) or not close:
        return None
    return f"unknown column {name!r}; close: {close[0]}. Rename it, or give a further column another name"


def _further_columns(file: Path, columns: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the columns, the further ones as arrays of one type. Raises UserError where values are of several."""
    found: dict[str, Any] = {}
    for name, values in columns.items():
        if name in SCHEMA.names:
            found[name] = values
            continue
        lengths = {len(value) for value in values if isinstance(value, list)}
        try:
            array = pa.array(values, pa.list_(pa.float32(), lengths.pop()) if len(lengths) == 1 else None)
        except (pa.ArrowException, TypeError) as error:
            raise UserError(f"data.root: column {name!r} of {str(file)!r} mixes types ({error}); use one") from error
        if (kind := column_type(array.type)) is None:
            raise UserError(
                f"data.root: column {name!r} of {str(file)!r} is {array.type}; write numbers, text or lists of numbers "
                "of one length"
            )
        found[name] = array.cast(kind)
    return found


def read_jsonl(file: Path) -> tuple[dict[str, list[Any]], list[int]]:
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
                for name in record.keys() - columns.keys():
                    columns[name] = [None] * len(lines)
                for name, values in columns.items():
                    values.append(record.get(name))
                lines.append(number)
    return _further_columns(file, columns), lines


def read_csv(file: Path) -> tuple[dict[str, list[Any]], list[int]]:
    """Read a CSV manifest into columns, and the line of each row. Raises UserError naming the first line at fault.

    The first row names the columns. Empty fields are absent. Tags are separated by commas, so a list of several needs
    quotes.
    """
    columns: dict[str, list[Any]] = {}
    lines = []
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            _check_csv_header(file, reader.fieldnames or [])
            for row in reader:
                record = _record_of_csv(file, reader.line_num, row)
                if fault := _fault_of_record(record):
                    raise UserError(f"data.root: {str(file)!r}, line {reader.line_num}: {fault}")
                for name in reader.fieldnames:
                    columns.setdefault(name, []).append(record.get(name))
                lines.append(reader.line_num)
    except OSError as error:
        raise UserError(f"data.root: {str(file)!r} cannot be read ({error.strerror})") from error
    except (csv.Error, UnicodeDecodeError) as error:
        where = f"line {len(lines) + 2}"
        raise UserError(f"data.root: {str(file)!r}, {where}: broken CSV ({error}); save it as UTF-8 CSV") from error
    numbers = {name: _parse_numbers(values) for name, values in columns.items() if name not in SCHEMA.names}
    return _further_columns(file, {"path": [], **columns, **numbers}), lines


def _parse_numbers(texts: list[str | None]) -> list[Any]:
    """Return the texts of a column as numbers where all of them are, else as they are."""
    for parse in (int, float):
        try:
            return [None if text is None else parse(text) for text in texts]
        except ValueError:
            continue
    return texts


def _check_csv_header(file: Path, names: Sequence[str]) -> None:
    """Raise UserError where the first row of a CSV manifest does not name its columns."""
    advice = f"name the columns in the first row, path and any of {_COLUMNS}, each once"
    if "path" not in names or len(set(names)) < len(names):
        raise UserError(f"data.root: {str(file)!r}, line 1: the columns are {', '.join(names)}; {advice}")
    for name in names:
        if fault := _fault_of_name(name):
            raise UserError(f"data.root: {str(file)!r}, line 1: {fault}")


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
        if fault := _fault_of_name(name):
            return fault
        if value is None or name not in SCHEMA.names:
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
