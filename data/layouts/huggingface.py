"""Arrow and Parquet files of Hugging Face `datasets`, with an image column: a struct of bytes and path.

An Arrow file stores image bytes uncompressed, so a row is a byte range of it. A Parquet file is compressed: it is
unpacked once into an Arrow file in the cache, as `datasets` does.
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

from data.layouts.unused import Unused
from utils.errors import UserError
from utils.io.files import write_atomically
from utils.io.memo import files_key

_BATCH_ROWS = 64
# Names to try for each column, and the type of its values.
_COLUMNS = {"label": (("label", "labels"), str), "caption": (("caption", "text"), str), "tags": (("tags",), list)}


def holds_images(file: Path) -> bool:
    """Return whether an Arrow or Parquet file can be read and has an image column."""
    try:
        schema = (
            pq.read_schema(file) if file.suffix == ".parquet" else pa.ipc.open_stream(pa.memory_map(str(file))).schema
        )
    except (pa.ArrowException, OSError):
        return False
    return any(map(_holds_images, schema.types))


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
    try:
        with pa.memory_map(str(file)) as mapped:
            whole, rows = mapped.read_buffer(), []
            for batch in pa.ipc.open_stream(whole):  # its buffers are slices of `whole`
                batch.validate(full=True)
                rows += _rows_of(name, batch, whole)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data.root: {name!r} cannot be read ({error}); remove it, or save it again") from error
    for number, row in enumerate(rows):
        row["path"] = f"{name}/{number:08}{row.pop('suffix')}"
    unused.add("rows without image bytes", *(row["path"] for row in rows if not row["length"]))
    return [row for row in rows if row["length"]]


def _rows_of(name: str, batch: pa.RecordBatch, whole: pa.Buffer) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch: byte range and suffix of the image (length 0 if it is missing), and columns."""
    images = next((column for column in batch.columns if _holds_images(column.type)), None)
    if images is None:
        raise UserError(f"data.root: {name!r} has no image column (bytes and path), only {batch.schema.names}")
    content = images.field("bytes")
    _, ends, data = content.buffers()
    ends = np.frombuffer(ends, np.int64 if pa.types.is_large_binary(content.type) else np.int32)
    ends = ends[content.offset : content.offset + len(content) + 1].astype(np.int64)
    begin = 0 if data is None else data.address - whole.address
    if not 0 <= begin <= whole.size:
        raise UserError(f"data.root: {name!r} is compressed; save it uncompressed, as save_to_disk of `datasets` does")
    is_valid = images.is_valid().to_numpy(zero_copy_only=False) & content.is_valid().to_numpy(zero_copy_only=False)
    offsets, lengths = (begin + ends[:-1]).tolist(), np.where(is_valid, np.diff(ends), 0).tolist()
    files = images.field("path").to_pylist() if images.type.get_field_index("path") >= 0 else [None] * len(batch)
    texts = (_read_column(batch, names, kind) for names, kind in _COLUMNS.values())
    for file, offset, length, *values in zip(files, offsets, lengths, *texts):
        byte_range = {"offset": offset, "length": length, "size": length}
        yield {"suffix": os.path.splitext(file or "")[1].lower(), **byte_range, **dict(zip(_COLUMNS, values))}


def _holds_images(kind: pa.DataType) -> bool:
    """Return whether a type is a struct with a field `bytes`."""
    if not pa.types.is_struct(kind) or (index := kind.get_field_index("bytes")) < 0:
        return False
    return pa.types.is_binary(kind.field(index).type) or pa.types.is_large_binary(kind.field(index).type)


def _read_column(batch: pa.RecordBatch, names: tuple[str, ...], kind: type) -> list[Any]:
    """Return the values of the first column among `names`; None without such a column or for values of another type.

    A class number becomes its name if the schema's metadata have it; a negative number becomes None.
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
