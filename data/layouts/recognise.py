"""Recognise the layout of a collection and read it into a table. No other code needs to know the layout."""

import functools
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from data.layouts.folders import read_folder
from data.layouts.huggingface import read_arrow, unpack_parquet
from data.layouts.manifest import find_manifest, read_manifest, scanned_at
from data.layouts.names import POSTS, SHARD_SUFFIXES, is_image_name, is_sidecar, is_table
from data.layouts.remote import fetch_manifest, is_remote
from data.layouts.sidecars import FAULT, pair_sidecars
from data.layouts.table import PLACES, SPLIT_NAMES, TYPES, build_table, show_some
from data.layouts.unused import OTHERS, Unused
from data.layouts.walk import check_root, walk_folders
from data.layouts.webdataset import read_tar
from utils.errors import UserError
from utils.ranks.processes import count_cores, map_in_processes
from utils.record.logging import get_logger
from utils.record.progress import track

log = get_logger(__name__)

_TAR, _PARQUET = ".tar", ".parquet"
_ROWS = pa.schema([*{**TYPES, "id": pa.int64(), FAULT: pa.string()}.items()])
_COPIED_NS = 60 * 10**9  # a manifest whose ctime is so much later than its mtime was copied with its times
_PARALLEL_FROM = 8  # shards; with fewer, starting processes takes longer


def recognise(root: str, cache: Path, unused: Unused) -> tuple[list[Path], Callable[[], pa.Table]]:
    """Return the files that determine the table of a collection (none: all of its folder), and how to read the table.

    The order: a URL of packed shards, a manifest, WebDataset or Hugging Face shards if the folder has no image, a table
    of posts, folders. Fetched and unpacked files go to `cache`. Raises UserError (`data.root`).
    """
    if is_remote(root):
        manifest = fetch_manifest(root, cache)
        return [manifest], functools.partial(read_manifest, None, manifest, unused)
    folder = check_root(root)
    if (manifest := find_manifest(folder)) is not None:
        find_newer(folder, manifest)
        return [manifest], functools.partial(_read_listed, folder, manifest, unused)
    names = _find_shards(folder, unused)
    if not names:
        return [], functools.partial(read_folder, folder, unused)
    files = {name: folder / name for name in names}
    files |= {name: unpack_parquet(file, cache) for name, file in files.items() if name.endswith(_PARQUET)}
    return list(files.values()), functools.partial(_read_shards, folder, files, unused)


def _read_listed(root: Path, manifest: Path, unused: Unused) -> pa.Table:
    """Read a manifest, and count what its folders have beside the images that it lists."""
    table = read_manifest(root, manifest, unused)
    is_packed = PLACES.keys() <= set(table.column_names)
    listed = set(table["shard" if is_packed else "path"].to_pylist())
    others = Unused()
    for folder, _, names in walk_folders(root, others):
        paths = {folder + name for name in names} - listed
        unused.add("images that the manifest does not list", *filter(is_image_name, paths))
        if scanned_at(manifest) is None:
            unused.add("sidecars beside a manifest", *filter(is_sidecar, paths))
    unused.add(OTHERS, *(path for path in others.get(OTHERS, ()) if path not in listed))
    return table


def find_newer(root: Path, manifest: Path) -> list[str]:
    """Return and log the sidecars that changed after job=manifest has read them; none for another manifest."""
    scanned = scanned_at(manifest)
    if scanned is None:
        return []
    status = manifest.stat()
    was_copied = status.st_ctime_ns - status.st_mtime_ns > _COPIED_NS  # then a sidecar's ctime is the time of the copy
    newer = []
    for folder, entries, names in walk_folders(root, Unused()):
        changed = set()
        for entry in entries:
            path = folder + entry.name
            with suppress(OSError):  # a dangling link
                if (is_sidecar(path) or is_table(path)) and _changed_ns(entry, was_copied) > scanned:
                    changed.add(path)
        if changed:
            _, orphans = pair_sidecars(folder, filter(is_image_name, names), names)
            newer += sorted(changed.difference(orphans))
    if newer:
        log.warning(
            "data.root: %s sidecars are newer than %s and are not read: %s; prepare.py job=manifest reads them",
            f"{len(newer):,}", manifest.name, show_some(newer),
        )  # fmt: skip
    return newer


def _changed_ns(entry: os.DirEntry[str], was_copied: bool) -> int:
    times = entry.stat()
    return times.st_mtime_ns if was_copied else max(times.st_mtime_ns, times.st_ctime_ns)


def _find_shards(root: Path, unused: Unused) -> list[str]:
    """Return the sorted paths of WebDataset or Hugging Face shards at any depth.

    There is none if the folder has an image. Tables beside tar files are about them, as img2dataset writes them.
    """
    names, others = [], Unused()
    for folder, _, files in walk_folders(root, others):
        if any(map(is_image_name, files)):
            return []
        names += [folder + name for name in files if name.endswith(SHARD_SUFFIXES) and name not in POSTS]
        others.add("texts beside shards", *pair_sidecars(folder, (), files)[1])
    tables = [name for name in names if not name.endswith(_TAR)]
    if 0 < len(tables) < len(names):
        others.add("tables beside tar files", *tables)
        names = [name for name in names if name.endswith(_TAR)]
    if names:
        unused.merge(others)
    return sorted(names)


def _read_shards(root: Path, files: dict[str, Path], unused: Unused) -> pa.Table:
    """Read WebDataset or Hugging Face shards, files by name, into one table, in one process per core."""
    shards = [(name, name if file == root / name else str(file.resolve()), file) for name, file in files.items()]
    tables, results = [], map(_read_shard, shards)
    if len(shards) >= _PARALLEL_FROM and count_cores() > 1:
        lost = "shards that end the process that reads them"
        results = map_in_processes(_read_shard, shards, lambda shard: (_ROWS.empty_table(), Unused({lost: [shard[0]]})))
    for rows, left in track(results, len(shards), "scanning shards"):
        tables.append(rows)
        unused.merge(left)
    if not any(map(len, tables)):
        why = "".join(f"; {line}" for _, line in unused.describe())
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
    by_name = next((SPLIT_NAMES[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLIT_NAMES), "train")
    rows = [{**row, "split": row.get("split") or by_name, "shard": shard_name} for row in rows]
    return pa.Table.from_pylist(rows, _ROWS), unused
