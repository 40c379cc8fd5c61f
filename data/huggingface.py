"""Arrow and Parquet files of Hugging Face's `datasets`, with a column of images: a struct of bytes and path.

The bytes of an image lie in an Arrow file as they are, so that a row is a part of it. A Parquet file is compressed: it
is unpacked once into an Arrow file in the cache, as `datasets` itself does.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.table import Scanned
from utils.errors import UserError
from utils.io.files import write_atomically
from utils.io.memo import files_key

_UNPACKED = "unpacked"  # folder in the cache
_BATCH_ROWS = 64
_LABELS, _CAPTIONS = ("label", "labels"), ("caption", "text")  # columns that are read, the first one that is there


def scan_arrow(root: Path, name: str, cache: Path) -> Scanned:
    """Find the images of an Arrow or Parquet file, their labels, tags and captions.

    Raises UserError (`data.root`) where it cannot be read, is compressed as Arrow, or has no column of images.
    """
    file = root / name
    try:
        plain = _unpack(file, cache) if name.endswith(".parquet") else file
        shard = name if plain == file else str(plain.resolve())
        with pa.memory_map(str(plain)) as mapped:
            whole = mapped.read_buffer()
            rows = [row for batch in _read_batches(whole) for row in _rows_of(file, batch, whole)]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data.root: {str(file)!r} cannot be read ({error}); remove it, or save it again") from error
    numbered = [
        {"path": f"{name}/{number:08}{row.pop('suffix')}", "shard": shard, **row}
        for number, row in enumerate(rows)
        if row["length"]
    ]
    absent = len(rows) - len(numbered)
    return Scanned(numbered, [f"{absent:,} rows of {name} without the bytes of an image"] if absent else [])


def _unpack(file: Path, cache: Path) -> Path:
    """Return an uncompressed Arrow file of a Parquet file's rows, which is made where it is missing."""
    target = cache / _UNPACKED / f"{files_key([file])}.arrow"
    if not target.is_file():
        with pq.ParquetFile(file) as parquet:
            write_atomically(target, lambda temporary: _write_stream(temporary, parquet))
    return target


def _write_stream(target: Path, parquet: pq.ParquetFile) -> None:
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, parquet.schema_arrow) as writer:
        for batch in parquet.iter_batches(_BATCH_ROWS):
            writer.write_batch(batch)


def _read_batches(whole: pa.Buffer) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Arrow file or stream, whose buffers are parts of the whole, after a check."""
    if whole.slice(0, min(6, whole.size)).to_pybytes() == b"ARROW1":
        reader = pa.ipc.open_file(whole)
        batches: Iterator[pa.RecordBatch] = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        batches = iter(pa.ipc.open_stream(whole))
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _rows_of(file: Path, batch: pa.RecordBatch, whole: pa.Buffer) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch: place and suffix of the image, length 0 where it is absent, and its columns."""
    images = batch.column(_image_column(file, batch.schema))
    content = images.field("bytes")
    _, ends, data = content.buffers()
    ends = np.frombuffer(ends, np.int64 if pa.types.is_large_binary(content.type) else np.int32)
    ends = ends[content.offset : content.offset + len(content) + 1].astype(np.int64)
    begin = 0 if data is None else data.address - whole.address
    if not 0 <= begin <= whole.size:
        raise UserError(f"data.root: {str(file)!r} is compressed; save it without, as save_to_disk of `datasets` does")
    there = images.is_valid().to_numpy(zero_copy_only=False) & content.is_valid().to_numpy(zero_copy_only=False)
    names = images.field("path").to_pylist() if images.type.get_field_index("path") >= 0 else [None] * len(batch)
    offsets, lengths = (begin + ends[:-1]).tolist(), np.where(there, np.diff(ends), 0).tolist()
    columns = _columns_of(batch)
    for number, (offset, length, name) in enumerate(zip(offsets, lengths, names)):
        suffix = os.path.splitext(name or "")[1].lower()
        found = {key: values[number] for key, values in columns.items()}
        yield {"offset": offset, "length": length, "size": length, "suffix": suffix, **found}


def _image_column(file: Path, schema: pa.Schema) -> str:
    for field in schema:
        if pa.types.is_struct(field.type) and (index := field.type.get_field_index("bytes")) >= 0:
            kind = field.type.field(index).type
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return field.name
    raise UserError(
        f"data.root: {str(file)!r} has no column of images (a struct of bytes and path), only "
        f"{', '.join(schema.names)}; name a data set of images"
    )


def _columns_of(batch: pa.RecordBatch) -> dict[str, list[Any]]:
    """Return label, caption and tags of a batch where it has columns of them; numbers of classes become their names."""
    columns = {}
    for wanted, names in (("label", _LABELS), ("caption", _CAPTIONS), ("tags", ("tags",))):
        if (name := next((name for name in names if name in batch.schema.names), None)) is None:
            continue
        values = batch.column(name).to_pylist()
        if wanted == "label":
            classes = _class_names(batch.schema, name)
            values = [_label_of(value, classes) for value in values]
        kind = list if wanted == "tags" else str
        columns[wanted] = [value if isinstance(value, kind) else None for value in values]
    return columns


def _class_names(schema: pa.Schema, column: str) -> list[str]:
    """Return the names of a column's classes that the schema's metadata state; none where they do not."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _label_of(value: Any, classes: list[str]) -> str | None:
    """Return the name of a class; of a number without a name the number, None below 0."""
    if isinstance(value, int):
        return None if value < 0 else classes[value] if value < len(classes) else str(value)
    return value
