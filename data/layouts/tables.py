"""Read tables: one reader of files, and one map of the names that programs give to our columns."""

import itertools
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from data.layouts.sidecars import Sidecar, is_field, parse_record, read_lines
from data.layouts.table import TAG_LISTS, TYPES
from data.layouts.unused import Unused
from utils.errors import UserError, about
from utils.formats.spelling import split_tags
from utils.io.files import readable

# Other names of a column, in the order in which they are tried.
OTHER_NAMES = {
    **dict.fromkeys(("file_name", "image_file_name", "image_path", "filename"), "path"),
    "labels": "label",
    "captions": "caption",
    "text": "caption",
    "prompt": "caption",
}


def name_columns(table: pa.Table | pa.RecordBatch) -> dict[str, str]:
    """Return our name of each column with values: of several columns for one field, the first has its name."""
    names = table.schema.names
    own = [name for name in names if name not in OTHER_NAMES]
    ours: dict[str, str] = {}
    for name in (*own, *(name for name in OTHER_NAMES if name in names)):
        if table.column(name).null_count < len(table):
            field = OTHER_NAMES.get(name, name)
            ours[name] = name if field in ours.values() else field
    return ours


def read_records(where: str, table: pa.RecordBatch | pa.Table, unused: Unused) -> list[Sidecar]:
    """Return the metadata in each row of a table. Columns that are not read are named."""
    columns: dict[str, list[Any]] = {}
    for name, field in name_columns(table).items():
        if is_field(field):
            columns[field] = _name_numbers(table, name)
        else:
            unused.add("columns of tables of unknown name, or second of their kind", name)
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())] if columns else [{}] * len(table)
    return [parse_record(f"a row of {where!r}", row) for row in rows]


def _name_numbers(table: pa.RecordBatch | pa.Table, name: str) -> list[Any]:
    """Return the values of a column; numbers of classes by the names in the schema that `datasets` writes."""
    values = table.column(name).to_pylist()
    with suppress(KeyError, TypeError, ValueError):
        names = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"][name]["names"]
        known = dict(enumerate(map(str, names)))
        return [known.get(value, value) for value in values]
    return values


def find_one(root: Path, names: Iterable[str]) -> Path | None:
    """Return the file at the root with one of these names, or None. Raises UserError if there are two."""
    files = [root / name for name in names if os.path.isfile(root / name) or os.path.isdir(root / name)]  # no pipe
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise UserError(f"data.root: {str(root)!r} holds both {names}; keep the correct one")
    return files[0] if files else None


def read_columns(file: Path) -> pa.Table:
    """Read a Parquet, JSONL or CSV file with the types it has. Raises UserError (`data.root`)."""
    read = {".parquet": read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv}[file.suffix]
    with about("data.root"), readable(file, file.suffix):
        return read(file)


def read_parquet(file: Path) -> pa.Table:
    """Read a Parquet file. Raises ArrowException or OSError."""
    with pq.ParquetFile(file) as parquet:  # not read_table, which reads folders named a=b as columns
        return parquet.read()


def _read_jsonl(file: Path) -> pa.Table:
    """Read a JSONL file. Arrow's reader would take texts that are dates for timestamps."""
    rows = [row for _, row in read_lines(file)]
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    return pa.table({name: _to_array([row.get(name) for row in rows]) for name in names})


def _to_array(values: list[Any]) -> pa.Array:
    """Return JSON values as an array; values of several types become texts."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([v if isinstance(v, str | None) else json.dumps(v) for v in values], pa.string())


def _read_csv(file: Path) -> pa.Table:
    """Read a CSV file. Empty fields are null; tags are separated by commas, so several tags need quotes."""
    parsing = pa.csv.ParseOptions(newlines_in_values=True)
    with pa.csv.open_csv(file, parse_options=parsing) as reader:
        types = dict.fromkeys(reader.schema.names, pa.string())  # Arrow would take texts that are dates for timestamps
    converting = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])
    table = pa.csv.read_csv(file, convert_options=converting, parse_options=parsing)
    columns = []
    for name, column in zip(table.column_names, table.columns):
        if name in TAG_LISTS:
            column = pa.array([text and split_tags(text) for text in column.to_pylist()], TYPES["tags"])
        elif TYPES.get(name) != pa.string():
            column = _to_numbers(column)
        columns.append(column)
    return pa.table(columns, names=table.column_names)


def _to_numbers(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return numbers if every text is one; not of `007`, and not of more digits than a number has."""
    trimmed = pc.utf8_trim_whitespace(texts)
    for kind, is_text in ((pa.int64(), r"^-?0\d"), (pa.float64(), r"^-?(0\d|\d{16})")):
        with suppress(pa.ArrowException):
            if not pc.any(pc.match_substring_regex(trimmed, is_text)).as_py():
                return trimmed.cast(kind)
    return texts
