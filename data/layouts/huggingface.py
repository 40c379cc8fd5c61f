"""Arrow and Parquet files of Hugging Face's `datasets`, with a column of images: a struct of bytes and path.

The bytes of an image lie in an Arrow file as they are, so that a row is a part of it. A Parquet file is compressed: it
is unpacked once into an Arrow file in the cache, as `datasets` itself does.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from utils.errors import UserError
from utils.io.files import write_atomically
from utils.io.memo import files_key

_BATCH_ROWS = 64
# What is read: the first column that exists, if its values are of the type.
_COLUMNS = {"label": (("label", "labels"), str), "caption": (("caption", "text"), str), "tags": (("tags",), list)}


def unpack_parquet(file: Path, cache: Path) -> Path:
    """Return an uncompressed Arrow file of a Parquet file's rows, written if it is missing. Raises UserError."""

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


def read_arrow(file: Path, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the images of an Arrow file as rows, and what is skipped.

    Raises UserError (`data.root`) where it cannot be read, is compressed, or has no column of images.
    """
    try:
        with pa.memory_map(str(file)) as mapped:
            whole, rows = mapped.read_buffer(), []
            for batch in pa.ipc.open_stream(whole):  # whose buffers are parts of the whole
                batch.validate(full=True)
                rows += _rows_of(name, batch, whole)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data.root: {name!r} cannot be read ({error}); remove it, or save it again") from error
    for number, row in enumerate(rows):
        row["path"] = f"{name}/{number:08}{row.pop('suffix')}"
    found = [row for row in rows if row["length"]]
    absent = len(rows) - len(found)
    return found, [f"{absent:,} rows of {name} without the bytes of an image"] if absent else []


def _rows_of(name: str, batch: pa.RecordBatch, whole: pa.Buffer) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch: place and suffix of the image, length 0 where it is absent, and its columns."""
    images = next((column for column in batch.columns if _holds_images(column.type)), None)
    if images is None:
        raise UserError(f"data.root: {name!r} has no column of images (bytes and path), only {batch.schema.names}")
    content = images.field("bytes")
    _, ends, data = content.buffers()
    ends = np.frombuffer(ends, np.int64 if pa.types.is_large_binary(content.type) else np.int32)
    ends = ends[content.offset : content.offset + len(content) + 1].astype(np.int64)
    begin = 0 if data is None else data.address - whole.address
    if not 0 <= begin <= whole.size:
        raise UserError(f"data.root: {name!r} is compressed; save it without, as save_to_disk of `datasets` does")
    is_valid = images.is_valid().to_numpy(zero_copy_only=False) & content.is_valid().to_numpy(zero_copy_only=False)
    offsets, lengths = (begin + ends[:-1]).tolist(), np.where(is_valid, np.diff(ends), 0).tolist()
    files = images.field("path").to_pylist() if images.type.get_field_index("path") >= 0 else [None] * len(batch)
    texts = (_read_column(batch, names, kind) for names, kind in _COLUMNS.values())
    for file, offset, length, *values in zip(files, offsets, lengths, *texts):
        place = {"offset": offset, "length": length, "size": length}
        yield {"suffix": os.path.splitext(file or "")[1].lower(), **place, **dict(zip(_COLUMNS, values))}


def _holds_images(kind: pa.DataType) -> bool:
    """Return whether a type is a struct with bytes."""
    if not pa.types.is_struct(kind) or (index := kind.get_field_index("bytes")) < 0:
        return False
    return pa.types.is_binary(kind.field(index).type) or pa.types.is_large_binary(kind.field(index).type)


def _read_column(batch: pa.RecordBatch, names: tuple[str, ...], kind: type) -> list[Any]:
    """Return the values of the first column of these names, None for a value of another type or without a column.

    The number of a class becomes its name, if the schema's metadata have it; a negative number becomes None.
    """
    name = next((name for name in names if name in batch.schema.names), None)
    values = [None] * len(batch) if name is None else batch.column(name).to_pylist()
    classes: list[Any] = []
    with suppress(KeyError, TypeError, ValueError):
        classes = json.loads((batch.schema.metadata or {})[b"huggingface"])["info"]["features"][name]["names"]
    if kind is str:
        names = {number: str(text) for number, text in enumerate(classes)}
        values = [names.get(v, str(v) if v >= 0 else None) if type(v) is int else v for v in values]
    return [value if isinstance(value, kind) else None for value in values]
