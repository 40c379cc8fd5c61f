"""Shards: WebDataset tar files, and Arrow and Parquet files of Hugging Face `datasets`.

`tarfile` ends without a word at a damaged header, so the place where it ends is checked here. Members with the same key
belong together.

An Arrow file has an image column, a struct of bytes and path. It stores image bytes uncompressed, so a row is a byte
range of it. A Parquet file is compressed: it is unpacked once into an Arrow file in the cache, as `datasets` does.
"""

import functools
import itertools
import os
import re
import tarfile  # noqa: TID251 (members are listed)
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import Table

from data.layouts.manifest import OUTSIDE, unpack_parquet
from data.layouts.names import IMAGE_SUFFIXES, is_mask_name, is_passed_over, stem_of, suffix_of
from data.layouts.places import describe_splits, place_images
from data.layouts.readers import TABLES, is_table
from data.layouts.scan import Folder, TableChoice
from data.layouts.sidecars import TEXT_SUFFIXES, read_texts
from data.layouts.table import TYPES, build_table, replace_column, show_some
from data.layouts.tables import read_fields
from data.layouts.unused import FAULT, Unused
from data.layouts.values import read_label
from utils.errors import UserError, about
from utils.io.files import readable
from utils.io.names import Names
from utils.ranks.processes import map_items
from utils.record.progress import track

_TAR = ".tar"
_PARQUET = ".parquet"
_ROWS = pa.schema([*{**TYPES, "id": pa.int64(), FAULT: pa.string()}.items()])
_IMAGE = re.compile(r"(large_)?binary|struct<(.*, )?bytes: (large_)?binary.*>")  # types of columns
_PARALLEL_FROM = 8  # shards; with fewer, starting processes takes longer
_MAX_TEXT_BYTES = 2**20


def find_shards(folder: Folder, cache: Path) -> dict[str, Path]:
    """Return the files of WebDataset or Hugging Face shards, by name; Parquet files unpacked into `cache`.

    Tables beside tar files are about them, as img2dataset writes them.
    """
    folder.unused.add_files(*folder.files.get(TABLES, ()))
    folder.unused.add("tables beside shards", *filter(is_table, itertools.chain(*folder.files.values())))
    names = folder.shards
    if tars := [name for name in names if name.endswith(_TAR)]:
        folder.unused.add("tables beside tar files", *set(names).difference(tars))
        names = tars
    files = {name: folder.root / name for name in sorted(names)}
    return files | {name: unpack_parquet(file, cache) for name, file in files.items() if name.endswith(_PARQUET)}


def read_shards(root: Path, files: dict[str, Path], unused: Unused, choice: TableChoice) -> Table:
    """Read WebDataset or Hugging Face shards, files by name, into one table, in one process per core.

    Names of shards say splits as names of folders do.
    """
    places = [name if file == root / name else str(file.resolve()) for name, file in files.items()]
    splits, _, names = place_images([f"{stem_of(name)}/" for name in files], choice.splits)
    unused.said += describe_splits(names, splits, "shards")
    shards = [*zip(files, places, splits, files.values())]
    tables = []
    read = functools.partial(_read_shard, choice)
    lost = "shards that end the process that reads them"
    fatal = lambda shard: (_ROWS.empty_table(), Unused({lost: [shard[0]]}))  # noqa: E731
    results = map_items(read, shards, fatal, _PARALLEL_FROM)
    for rows, left in track(results, len(shards), "scanning shards"):
        tables.append(rows)
        unused.merge(left)
    if not any(map(len, tables)):
        why = "".join(f"; {line}" for line in unused.describe())
        raise UserError(f"data.root: '{root}' holds no image in {show_some(list(files))}{why}")
    return build_table(pa.concat_tables(tables))


def _read_shard(choice: TableChoice, shard: tuple[str, str, str | None, Path]) -> tuple[Table, Unused]:
    """Return the rows of a shard, and what is not used.

    shard: its name, the value for the column `shard`, the split that its name says, and the file.
    """
    name, place, split, file = shard
    unused = Unused()
    with about("data.root"):
        rows = (_read_tar if name.endswith(_TAR) else _read_arrow)(file, name, unused, choice)
    rows = replace_column(rows, "split", rows["split"].fill_null(split or "train"))
    return replace_column(rows, "shard", pa.repeat(place, len(rows))), unused


def _read_tar(file: Path, name: str, unused: Unused, choice: TableChoice) -> Table:
    """Return the images of a tar file.

    The texts of an image have its name up to the last dot, else up to the first one, which is WebDataset's key. An
    image such as `x.seg.png` beside `x.jpg`, without texts of its own, belongs to the latter and is no row. Without any
    text, folders are splits and classes.
    """
    images = {}
    texts = {}  # their names, by stem and suffix
    contents = {}
    with open(file, "rb") as stream:
        for member in _read_members(stream, name, unused):
            path = member.name.removeprefix("./")
            where = f"{name}/{path}"
            stem = stem_of(path)
            suffix = suffix_of(path)
            if not _is_plain(member) or re.search(OUTSIDE, path):
                unused.add("members of shards that are no plain files, or have an unsafe path", where)
            elif suffix not in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES):
                unused.add_files(where)
            elif is_mask_name(path) or any(map(is_passed_over, path.split("/"))):
                unused.add("masks, hidden names and thumbnails in shards", where)
            elif suffix in IMAGE_SUFFIXES:
                if path in images:
                    unused.add("members of shards before another one of their name", where)
                images[path] = member
            elif member.size > _MAX_TEXT_BYTES:
                unused.add(f"texts in shards above {_MAX_TEXT_BYTES:,} bytes", where)
            else:
                texts.setdefault(stem, {})[suffix] = where
                contents[where] = os.pread(stream.fileno(), member.size, member.offset_data)
    rows = []
    places = dict(zip(images, zip(*place_images([*images], choice.splits))))
    stems = {stem_of(path) for path in images}
    known = Names(texts)
    read = set()
    for path, member in images.items():
        stem = stem_of(path)
        key = re.sub(r"\.[^/]*$", "", path)
        own = known.find(stem)
        if own is None and key != stem and key in stems:
            unused.add("further images of a sample", f"{name}/{path}")
            continue
        read.add(owner := own or known.find(key))
        columns = read_texts(f"{name}/{path}", texts.get(owner, {}), contents.__getitem__, unused)._asdict()
        columns |= {"offset": member.offset_data, "length": member.size, "size": member.size}
        if not texts:
            columns["split"], label, _ = places[path]
            columns["label"] = read_label(label)
        rows.append({"path": f"{name}/{path}", **columns})
    folders = {os.path.dirname(path) for path in images} - {""} if texts else ()
    unused.add("folders in shards with texts, which are no classes", *(f"{name}/{folder}" for folder in folders))
    alone = (file for stem in texts if stem not in read for file in texts[stem].values())
    unused.add("texts in shards without an image", *alone)
    return Table.from_pylist(rows, _ROWS)


def _read_members(stream: IO[bytes], name: str, unused: Unused) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file, up to its end or to the first damaged header."""
    end = os.fstat(stream.fileno()).st_size
    offset = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
            for member in tar:
                offset = member.offset
                if _is_plain(member) and not 0 <= member.size <= end - member.offset_data:
                    raise ValueError(f"a member of {member.size:,} bytes")
                if not member.isdir():
                    yield member
            offset = tar.offset
        rest = os.pread(stream.fileno(), _MAX_TEXT_BYTES, offset)
        fault = "" if rest else "the mark of its end is missing"
        if rest.strip(b"\0"):
            fault = "its end is followed by more" if rest.startswith(bytes(tarfile.BLOCKSIZE)) else "no header"
    except (tarfile.TarError, ValueError, OSError, RecursionError) as error:
        fault = str(error)
    if fault:
        unused.add("ends of damaged shards", f"{name} from byte {offset:,} of {end:,} ({fault})")


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Return whether a member's content is in the file as it is."""
    return member.isreg() and not member.issparse()


def _read_arrow(file: Path, name: str, unused: Unused, choice: TableChoice) -> Table:
    """Return the images of an Arrow file.

    Raises UserError (`data.root`) if it cannot be read, is compressed, or has no image column.
    """
    with readable(Path(name), file.suffix), pa.memory_map(str(file)) as mapped:
        whole = mapped.read_buffer()
        table = pa.ipc.open_stream(whole).read_all()  # its buffers are slices of `whole`
        table.validate(full=True)
        image = _find_image(table.schema)
        if image is None:
            raise UserError(f"data.root: {name!r} has no image column (bytes), only {table.column_names}")
        columns = read_fields(Path(name), table.drop_columns(image), choice.columns, unused)
        places = [place for chunk in table[image].chunks for place in _find_bytes(name, chunk, whole)]
    rows = [
        {"path": f"{name}/{number:08}{ending}", "offset": offset, "length": length, "size": length}
        for number, (ending, offset, length) in enumerate(places)
    ]
    unused.add("rows without image bytes", *(row["path"] for row in rows if not row["length"]))
    found = Table.from_pylist(rows, _ROWS)
    for field, column in columns.items():
        found = replace_column(found, field, column) if field != "path" else found
    return found.filter(pc.greater(found["length"], 0))


def _find_image(schema: pa.Schema) -> str | None:
    """Return the column of images: a struct with bytes, else plain bytes."""
    found = [field for field in schema if _IMAGE.fullmatch(str(field.type))]
    return min(found, key=lambda field: not pa.types.is_struct(field.type)).name if found else None


def _find_bytes(name: str, images: pa.Array, whole: pa.Buffer) -> Iterator[tuple[str, int, int]]:
    """Return the ending, the first byte in `whole`, and the length of each image; length 0 without an image."""
    columns = dict(zip(images.type.names, images.flatten())) if pa.types.is_struct(images.type) else {"bytes": images}
    content = columns["bytes"].cast(pa.large_binary())
    _, starts, data = content.buffers()
    begin = 0 if data is None else data.address - whole.address
    if not 0 <= begin <= whole.size:
        raise UserError(f"data.root: {name!r} is compressed; save it uncompressed, as save_to_disk of `datasets` does")
    starts = begin + np.frombuffer(starts, np.int64)[content.offset :]
    files = columns.get("path", pa.nulls(len(images))).to_pylist()
    endings = [suffix_of(file or "") for file in files]
    return zip(endings, starts.tolist(), pc.binary_length(content).fill_null(0).to_pylist())
