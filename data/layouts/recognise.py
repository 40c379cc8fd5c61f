"""Recognise the layout of a collection and read it into a table. No other code needs to know the layout."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from data.layouts.folders import check_root, holds_image, list_folder
from data.layouts.huggingface import read_arrow, unpack_parquet
from data.layouts.manifest import find_manifest, read_manifest
from data.layouts.posts import POSTS, read_folder
from data.layouts.remote import fetch_manifest, is_remote
from data.layouts.table import PLACES, SCHEMA, SPLIT_NAMES, build_table, show_some
from data.layouts.unused import Unused
from data.layouts.webdataset import read_tar
from utils.errors import UserError
from utils.ranks.processes import count_cores, map_in_processes
from utils.record.logging import get_logger
from utils.record.progress import track

log = get_logger(__name__)

_TAR, _ARROW, _PARQUET = ".tar", ".arrow", ".parquet"
_ROWS = pa.schema([*SCHEMA, ("id", pa.int64()), *PLACES.items()])
_PARALLEL_FROM = 8  # tar files; with fewer, starting processes takes longer


class Layout(NamedTuple):
    """How to read a collection. files: the files that determine the table; empty: all files of the folder."""

    files: list[Path]
    read: Callable[[Unused], pa.Table]


def recognise(root: str, cache: Path) -> Layout:
    """Return the layout of a collection; fetched and unpacked files go to `cache`.

    The order: a URL of packed shards, a manifest, WebDataset or Hugging Face shards if the folder has no image, a table
    of posts, folders. Raises UserError (`data.root`).
    """
    if is_remote(root):
        manifest = fetch_manifest(root, cache)
        return Layout([manifest], functools.partial(read_manifest, None, manifest))
    folder = check_root(root)
    if (manifest := find_manifest(folder)) is not None:
        return Layout([manifest], functools.partial(read_manifest, folder, manifest))
    names = _find_shards(folder)
    if names and not holds_image(folder):
        files = {name: folder / name for name in names}
        files |= {name: unpack_parquet(file, cache) for name, file in files.items() if name.endswith(_PARQUET)}
        return Layout(list(files.values()), functools.partial(_read_shards, folder, files))

    def read(unused: Unused) -> pa.Table:
        unused.add("shards beside images, because only the images are read", *names)
        return read_folder(folder, unused)

    return Layout([], read)


def _find_shards(root: Path) -> list[str]:
    """Return the sorted paths of WebDataset or Hugging Face shards at the root or in its folders train, val, data etc.

    Raises UserError if both kinds are present.
    """
    folders = [entry.name for entry in list_folder(root) if entry.name.lower() in (*SPLIT_NAMES, "data")]
    found = sorted(
        f"{folder}{entry.name}"
        for folder in ("", *(f"{name}/" for name in folders if (root / name).is_dir()))
        for entry in list_folder(root / folder)
        if entry.name.endswith((_TAR, _ARROW, _PARQUET)) and entry.name[0] != "." and entry.name not in POSTS
    )
    if len({name.endswith(_TAR) for name in found}) > 1:
        raise UserError(f"data.root: {str(root)!r} holds both tar and Arrow or Parquet files; keep one kind")
    return found


def _read_shards(root: Path, files: dict[str, Path], unused: Unused) -> pa.Table:
    """Read WebDataset or Hugging Face shards into one table; tar files in one process per core. files: by name."""
    shards = [(name, name if file == root / name else str(file.resolve()), file) for name, file in files.items()]
    if shards[0][0].endswith(_TAR) and len(shards) >= _PARALLEL_FROM and count_cores() > 1:
        results = map_in_processes(_read_shard, shards, _skip_shard)
    else:
        results = map(_read_shard, shards)
    tables = []
    for rows, others in track(results, len(shards), "scanning shards"):
        tables.append(rows)
        unused.merge(others)
    if not any(map(len, tables)):
        why = "; ".join(("", *unused.describe()))
        raise UserError(f"data.root: {str(root)!r} holds no image in {show_some(list(files))}{why}")
    table = pa.concat_tables(tables)
    log.info("data.root: %s images in %d shards (%s)", f"{len(table):,}", len(files), show_some(list(files)))
    return build_table(dict(zip(table.column_names, table.columns)))


def _read_shard(shard: tuple[str, str, Path]) -> tuple[pa.Table, Unused]:
    """Return the rows of a shard, and what is not used. The split comes from the shard's name.

    shard: its name, the value for the column `shard`, and the file.
    """
    name, shard_name, file = shard
    rows = (read_tar if name.endswith(_TAR) else read_arrow)(file, name, unused := Unused())
    split = next((SPLIT_NAMES[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLIT_NAMES), "train")
    return pa.Table.from_pylist([{"split": split, "shard": shard_name, **row} for row in rows], _ROWS), unused


def _skip_shard(shard: tuple[str, str, Path]) -> tuple[pa.Table, Unused]:
    return _ROWS.empty_table(), Unused({"shards that end the process that reads them": [shard[0]]})
