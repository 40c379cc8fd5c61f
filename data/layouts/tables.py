"""Read tables: one reader of files, and one map of the names that programs give to our columns."""

import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pyarrow import Table

from data.layouts.readers import Sidecar
from data.layouts.scan import Columns, TableChoice
from data.layouts.sidecars import decode, read_lines
from data.layouts.table import SCHEMA, SPLIT_NAMES, TARGET, TYPES, show_some
from data.layouts.unused import POSSIBLE, Unused
from data.layouts.values import READ, read_column
from utils.errors import UserError, about
from utils.io.files import Json, readable
from utils.record.logging import log

IS_VALID = ("is_valid", "is_val")  # of columns that are true in the validation split, as fastai has them
# The names of a column, in the order in which they are tried; in lower case, with _ between words.
_NAMES = {
    "path": "path file_name image_file_name image_path filename filepath filepaths file_path file image image_name img "
    "img_path img_name image_id datei dateiname bild",
    "label": "label_name label_text class_name category_name label labels class classname classes target category "
    "fine_label coarse_label breed species variety diagnosis klasse kategorie classe clase categoria class_id "
    "class_index label_id label_index category_id species_id breed_id",
    "caption": "caption captions text prompt",
    "tags": "tags tag_string",
    "split": " ".join(("split", *IS_VALID)),
}
_FIELDS = {name: field for field, names in _NAMES.items() for name in names.split()}
_ORDER = {name: number for number, name in enumerate(_FIELDS)}
_SEPARATORS = ",;\t|"
csv.field_size_limit(2**24)  # characters
_STATED = re.compile(r"sep=(.)\n")
_SINGLE = re.compile(f"^'[^'\n]*'[{_SEPARATORS}]", re.M)
_HEAD = 5000  # characters that tell the form of a file
_ASKED = ("path", "split", "weight", TARGET)  # refused if of a wrong type, as are READ
_POINT = b"decimal point"  # in the metadata of a table whose columns are texts


def name_field(name: str) -> str:
    """Return our name of a column, or the name that it has."""
    return _FIELDS.get(_fold(name), name)


def _fold(name: str) -> str:
    return re.sub(r"[\s.-]+", "_", name.strip().lower())


def name_columns(table: Table | pa.RecordBatch, stated: Columns) -> dict[str, str]:
    """Return our name of each column with values: of several columns for one field, the first has its name.

    stated: these names come first. Raises UserError (`data.columns`) for one that the table has not.
    """
    names = table.schema.names
    given = {theirs: ours for ours, theirs in stated.items()}
    if absent := next((name for name in given if name not in names), None):
        raise UserError(f"data.columns: {given[absent]}: {absent!r} is no column; the table has {', '.join(names)}")
    ours = {}
    for name in sorted(names, key=lambda name: (name not in given, _ORDER.get(_fold(name), -1))):
        field = given.get(name) or name_field(name)
        field = name if field in ours.values() else field
        if field not in ours.values() and table.column(name).null_count < len(table):
            ours[name] = field
    return ours


def list_labels(table: Table, names: Mapping[str, str]) -> dict[str, str]:
    """Return which columns may be labels, with their number of values, if none is the label: values that recur.

    names: ours by theirs.
    """
    found = {}
    for name in () if "label" in names.values() else names:
        column = table[name].drop_null()
        is_one = names[name] not in TYPES and re.match("u?int|(large_)?string|dictionary", str(column.type))
        count = pc.count_distinct(column).as_py() if is_one else 0
        if 1 < count <= max(len(column) / 2, 2):
            found[name] = f"{name} ({count:,} values)"
    return found


def read_fields(file: Path, table: Table, stated: Columns, unused: Unused) -> dict[str, pa.ChunkedArray]:
    """Return `path` and what a `Sidecar` has of a table, by our names. Columns that are not read are named."""
    names = name_columns(table, stated)
    known = {name: ours for name, ours in names.items() if ours in ("path", TARGET, *READ)}
    others = names.keys() - known
    unused.add("columns of unknown name, or second of their kind (data.columns={label: NAME} reads one)", *others)
    unused.add(POSSIBLE, *list_labels(table, names).values())
    columns = cast_columns(file, table, known, unused)
    return {name: columns[name] for name in known.values()}


def list_rows(columns: Mapping[str, pa.ChunkedArray]) -> Iterator[Sidecar]:
    """Yield the metadata in each row of columns with our names; those that a `Sidecar` has not are its `more`."""
    for row in pa.table(columns).to_pylist():
        known = {name: row.pop(name) for name in Sidecar._fields if name in row}
        yield Sidecar(**known, more=row)


def cast_columns(
    file: Path, table: pa.Table, names: Mapping[str, str], unused: Unused, rows: Sequence[int] | None = None
) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Return columns by our names (`names`: ours by theirs), of our types; the columns of SCHEMA first, null if absent.

    rows: their numbers in the file, if not all are in the table.
    Raises UserError (`data.root`) for one of _ASKED that cannot be read; others are added to `unused`.
    """
    columns = {field.name: pa.nulls(len(table), field.type) for field in SCHEMA}
    unused.add(POSSIBLE, *list_labels(table, names).values())
    numbers = range(len(table)) if rows is None else rows
    for name, field in names.items():
        try:
            columns[field] = read_column(field, table, name, numbers) if field in READ else _cast(field, table[name])
            if field == "split" and name in IS_VALID:
                is_true = pc.match_substring_regex(columns[field], r"(?i)^\s*(true|1|1\.0)\s*$")
                columns[field] = pc.if_else(is_true.fill_null(False), "val", "train")
        except (ValueError, pa.ArrowException) as error:
            where = f"column {name!r} of {str(file)!r}"
            if field in READ:
                raise UserError(f"data.root: {where}: {error}") from error
            where = f"{where} is {table[name].type} ({error})"
            if field in _ASKED:
                raise UserError(f"data.root: {where}; write {TYPES[field]}") from error
            unused.add("columns of the manifest that are no numbers or texts, or not of their type", where)
    return columns


def _cast(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast a column to its type, an extra one to int64, float64 or text. Raises ArrowException for other values."""
    source = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    other = pa.string()
    if pa.types.is_boolean(source) or pa.types.is_integer(source):
        other = pa.int64()
    elif pa.types.is_floating(source):
        other = pa.float64()
    if name == "group" and other == pa.string():  # the names of groups: equal ones get one number
        column = pc.index_in(column, value_set=pc.unique(column).drop_null())
    return column.cast(TYPES.get(name, other))


def read_splits(
    file: Path, column: pa.ChunkedArray | pa.Array, default: str, choice: TableChoice, unused: Unused
) -> list[str]:
    """Return the splits of a column as train, val and test; of nothing, and of a column without any split, `default`.

    Raises UserError (`data.root`) for other values beside splits.
    """
    known = {"": default, **SPLIT_NAMES}
    if not isinstance(choice.splits, bool):
        known |= {name.lower(): split for name, split in choice.splits.items()}
    names = [(name or "").strip().lower() for name in column.to_pylist()]
    odd = sorted({*names}.difference(known))
    advice = f"data.splits={{{odd[0]}: train}}" if odd else ""
    if odd and known.keys() & names <= {""}:
        unused.add(f"columns split whose values are no splits ({advice} reads one)", f"{file.name}: {show_some(odd)}")
        return [default] * len(names)
    if odd:
        raise UserError(
            f"data.root: {str(file)!r}, row {names.index(odd[0])}: split is {odd[0]!r}; allowed are "
            f"{', '.join(SPLIT_NAMES)}, or say with {advice} what it is"
        )
    return [known[name] for name in names]


def read_columns(file: Path, key: str = "data.root", *, is_typed: bool = True) -> Table:
    """Read a Parquet, JSONL or CSV file with the types it has. Raises UserError (`key`).

    A CSV file in neither UTF-8 nor UTF-16 is read as Windows-1252, which spreadsheets write. A line states what is
    assumed of it. is_typed: false leaves its columns texts, for `type_columns`.
    """
    kind = file.suffix.lower()
    with about(key), readable(file, kind):
        if kind == ".parquet":
            return read_parquet(file)
        if kind == ".jsonl":
            return _read_rows(row for _, row in read_lines(file))
        content = file.read_bytes()
        notes = []
        try:
            text = decode(content)
        except UnicodeDecodeError:
            notes.append("it is not UTF-8 and is read as Windows-1252")
            text = content.decode("cp1252", "replace").replace("\r\n", "\n").replace("\r", "\n")
        table = _read_csv(text, notes)
    if notes:
        log.info("%s: %s: %s", key, file.name, "; ".join(notes))
    return type_columns(table) if is_typed else table


def read_parquet(file: Path) -> Table:
    """Read a Parquet file. Raises ArrowException or OSError."""
    with pq.ParquetFile(file) as parquet:  # not read_table, which reads folders named a=b as columns
        return parquet.read()


def _read_rows(rows: Iterable[Json]) -> Table:
    """Return the table of JSON objects. Arrow's reader would take texts that are dates for timestamps."""
    rows = list(rows)
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    return pa.table({name: _to_array([row.get(name) for row in rows]) for name in names})


def _to_array(values: list[Any]) -> pa.Array:
    """Return JSON values as an array; values of several types become texts."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def _read_csv(text: str, notes: list[str]) -> Table:
    """Return the columns of a CSV file as texts, nothing as null. Add what is assumed to the notes. Raises ValueError.

    The header is the first line with two values that is no comment. Values above the number of columns are in the last
    one. Of columns with one name, the first counts.
    """
    stated = _STATED.match(text)  # by Excel
    quote = "'" if _SINGLE.search(text, 0, _HEAD) else '"'
    plain = re.sub(f"^(#.*|sep=.)\n|{quote}[^{quote}]*{quote}", "", text[:_HEAD], flags=re.M)
    head = next(filter(re.compile(f"[{_SEPARATORS}]").search, plain.split("\n")), "")
    separator = stated[1] if stated else max(_SEPARATORS, key=head.count)
    columns = {}
    for name, *values in itertools.zip_longest(*_fit_rows(text, separator, quote, notes)):
        values = pa.array(values, pa.string())
        values = pc.if_else(pc.equal(values, ""), None, values)
        if name and columns.setdefault(name.strip(), values) is not values:
            notes.append(f"the first column {name} counts")
    return pa.table(columns, metadata={_POINT: "." if separator == "," else ","})


def _fit_rows(text: str, separator: str, quote: str, notes: list[str]) -> Iterator[list[str]]:
    """Yield the header and the rows below it, each with as many values as it has, or less."""
    reader = csv.reader(io.StringIO(text.rstrip()), delimiter=separator, quotechar=quote, skipinitialspace=True)
    rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    if not rows:
        raise ValueError("it has no row")
    last, row = rows[-1]
    if (breaks := "".join(row).count("\n")) and text.count(quote) % 2:
        raise ValueError(f"a quotation mark in line {last - breaks} has no end")
    first = next((place for place, (_, row) in enumerate(rows) if any(row[1:]) and row[0][:1] != "#"), 0)
    if first:
        notes.append(f"{first} lines before its header are left out")
    width = len(rows[first][1])
    if odd := [str(line) for line, row in rows[first:] if len(row) != width]:
        notes.append(f"{len(odd):,} lines have fewer values than columns, or more in the last one: {show_some(odd)}")
    for _, row in rows[first:]:
        yield [*row[: width - 1], separator.join(filter(None, row[width - 1 :]))]


def unhead(table: Table) -> Table:
    """Return a table of texts whose header is a row. The names of its columns are numbers."""
    columns = zip(table.column_names, map(pa.ChunkedArray.to_pylist, table.columns))
    rows = {str(number): [name, *values] for number, (name, values) in enumerate(columns, start=1)}
    return pa.table(rows, metadata=table.schema.metadata)


def type_columns(table: Table) -> Table:
    """Return a table of `read_columns` with numbers for texts that are numbers, but not in columns of our texts."""
    point = (table.schema.metadata or {}).get(_POINT)
    if point is None:
        return table
    columns = []
    for name, column in zip(table.column_names, table.columns):
        is_text = TYPES.get(name_field(name)) in (pa.string(), TYPES["tags"])
        columns.append(column if is_text else _to_numbers(column, point.decode()))
    return pa.table(columns, names=table.column_names)


def _to_numbers(texts: pa.ChunkedArray, point: str) -> pa.ChunkedArray:
    """Return numbers if every text is one; not of `007`, and not of more digits than a number has.

    point: the decimal point, a comma in tables with another separator.
    """
    trimmed = pc.replace_substring(pc.utf8_trim_whitespace(texts), point, ".")
    is_number = not pc.any(pc.match_substring_regex(trimmed, r"^-?(0\d|\d{16})")).as_py()
    for kind in (pa.int64(), pa.float64()) if is_number else ():
        with suppress(pa.ArrowException):
            return trimmed.cast(kind)
    return texts
