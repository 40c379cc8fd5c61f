"""Arrow and Parquet files of Hugging Face `datasets`, with an image column: a struct of bytes and path.

An Arrow file stores image bytes uncompressed, so a row is a byte range of it. A Parquet file is compressed: it is
unpacked once into an Arrow file in the cache, as `datasets` does. The tables of its imagefolder (metadata.csv) have the
same columns, and `file_name` in place of the image.
"""

import json
import os
import re
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.layouts.manifest import find_one, read_columns
from data.layouts.names import TABLES
from data.layouts.records import Sidecar, is_field, parse_record
from data.layouts.sidecars import refuse_link_out
from data.layouts.unused import Unused
from utils.errors import UserError, about
from utils.io.files import readable, write_atomically
from utils.io.memo import files_key

_BATCH_ROWS = 64
# Other names of a field, in the order in which they are tried.
_FIELDS = {"labels": "label", "captions": "caption", "text": "caption", "prompt": "caption"}


def unpack_parquet(file: Path, cache: Path) -> Path:
    """Return an uncompressed Arrow copy of a Parquet file, written if it is missing. Raises UserError."""

    def write(temporary: Path) -> None:
        with pq.ParquetFile(file) as parquet, pa.ipc.new_stream(str(temporary), parquet.schema_arrow) as writer:
            for batch in parquet.iter_batches(_BATCH_ROWS):
                writer.write_batch(batch)

    target = cache / "unpacked" / f"{files_key([file])}.arrow"
    if not target.is_file():
        try:
            write_atomically(target, write)
        except pa.ArrowException as error:
            raise UserError(
                f"data.root: {str(file)!r} cannot be read ({error}); remove it, or save it again"
            ) from error
    return target


def read_arrow(file: Path, name: str, unused: Unused) -> list[dict[str, Any]]:
    """Return the images of an Arrow file as rows.

    Raises UserError (`data.root`) if it cannot be read, is compressed, or has no image column.
    """
    with about("data.root"), readable(Path(name), file.suffix), pa.memory_map(str(file)) as mapped:
        whole, rows = mapped.read_buffer(), []
        for batch in pa.ipc.open_stream(whole):  # its buffers are slices of `whole`
            batch.validate(full=True)
            rows += _rows_of(name, batch, whole, len(rows), unused)
    unused.add("rows without image bytes", *(row["path"] for row in rows if not row["length"]))
    return [row for row in rows if row["length"]]


def _rows_of(
    name: str, batch: pa.RecordBatch, whole: pa.Buffer, first: int, unused: Unused
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch, numbered from `first`: path, byte range (length 0 without an image) and columns."""
    structs = [field for field in batch.schema if pa.types.is_struct(field.type)]
    image = next((field.name for field in structs if field.type.get_field_index("bytes") >= 0), None)
    if image is None:
        raise UserError(f"data.root: {name!r} has no image column (bytes and path), only {batch.schema.names}")
    images = batch.column(image)
    content = images.field("bytes")
    _, ends, data = content.buffers()
    ends = np.frombuffer(ends, np.int64 if pa.types.is_large_binary(content.type) else np.int32)
    ends = ends[content.offset : content.offset + len(content) + 1].astype(np.int64)
    begin = 0 if data is None else data.address - whole.address
    if not 0 <= begin <= whole.size:
        raise UserError(f"data.root: {name!r} is compressed; save it uncompressed, as save_to_disk of `datasets` does")
    lengths = pc.binary_length(pc.struct_field(images, "bytes")).fill_null(0).to_pylist()
    files = images.field("path").to_pylist() if images.type.get_field_index("path") >= 0 else [None] * len(batch)
    records = read_records(name, batch.drop_columns([image]), unused)
    for number, (file, offset, length, sidecar) in enumerate(zip(files, (begin + ends).tolist(), lengths, records)):
        path = f"{name}/{first + number:08}{os.path.splitext(file or '')[1].lower()}"
        yield {"path": path, "offset": offset, "length": length, "size": length, **sidecar._asdict()}


def read_tables(root: Path, files: Iterable[str], images: Container[str], unused: Unused) -> dict[str, Sidecar]:
    """Return metadata of images by path, from tables of imagefolder: TABLES in any folder.

    Raises UserError (`data.root`) if one cannot be read, or if a folder has two.
    """
    found = {}
    for name in files:
        file = find_one((root / name).parent, TABLES)
        refuse_link_out(root, file)
        table = read_columns(file)
        key = next((column for column in table.column_names if re.fullmatch("(.+_)?file_name", column)), None)
        if key is None:
            unused.add("tables without a column file_name", name)
            continue
        for image, record in zip(table[key].to_pylist(), read_records(name, table.drop_columns([key]), unused)):
            path = os.path.normpath(os.path.join(os.path.dirname(name), str(image).replace("\\", "/")))
            if path in images:
                found[path] = record
            else:
                unused.add("rows of tables without an image", f"{image} in {name}")
    return found


def read_records(where: str, table: pa.RecordBatch | pa.Table, unused: Unused) -> list[Sidecar]:
    """Return the metadata in each row of a table. Columns that are not read are named."""
    columns: dict[str, list[Any]] = {}
    names = table.schema.names
    for name in (*(name for name in names if name not in _FIELDS), *(name for name in _FIELDS if name in names)):
        field, column = _FIELDS.get(name, name), table.column(name)
        if column.null_count == len(column):
            continue
        if field in columns or not is_field(field):
            unused.add("columns of tables of unknown name, or second of their kind", name)
            continue
        columns[field] = column.to_pylist()
        with suppress(KeyError, TypeError, ValueError):  # the names of class numbers
            names_of = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"][name]["names"]
            known = dict(enumerate(map(str, names_of)))
            columns[field] = [known.get(value, value) for value in columns[field]]
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())] if columns else [{}] * len(table)
    return [parse_record(f"a row of {where!r}", row) for row in rows]
