"""The manifest: a Parquet, JSONL or CSV file at the root of a collection that lists its images with their metadata.

It has the columns of `table.SCHEMA`; only `path` is required. Extra columns of numbers or texts are kept. A manifest
may come from an untrusted source, so its paths must stay inside the root. With the columns `table.PLACES`, images are
byte ranges of shards, and `path` is only a name.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os.path import getsize, isfile, islink, join, realpath
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pyarrow import Table

from data.layouts.names import MISSING, PARQUET, is_image_name, is_sidecar, suffix_of
from data.layouts.readers import SIDECARS as BESIDE_IMAGES
from data.layouts.readers import TABLES, has_reader, is_table
from data.layouts.scan import TableChoice, scan_folder
from data.layouts.sidecars import refuse_link_out
from data.layouts.table import PLACES, SCHEMA, SIDECARS, TYPES, build_table, is_packed, replace_column, show_some
from data.layouts.tables import cast_columns, name_columns, name_field, read_columns, read_splits
from data.layouts.unused import Unused
from data.layouts.walk import COPY, HIDDEN, walk_folders
from utils.errors import UserError, about
from utils.io.files import output_errors, write_atomically
from utils.io.memo import files_key, in_threads
from utils.io.names import find_path, list_names
from utils.record.logging import log

OUTSIDE = r"(^|/)\.{0,2}(/|$)|\x00"  # absolute paths, empty parts, `.`, `..` and NUL
_TABLES = b"atelier.tables"  # in the metadata of a manifest of job=manifest alone; others are never overwritten
_TIME = re.compile(r" \d+(?=, |$)")  # of a file
_BATCH_ROWS = 64
_PART = 512  # files per task of a thread, and cached folders


def read_manifest(root: Path | None, file: Path, unused: Unused, choice: TableChoice, cache: Path) -> Table:
    """Read a manifest into a table, sorted by path, and fill in file sizes.

    root: None for remote shards, which are not checked. cache: for unpacked Parquet files.

    Raises UserError (`data.root`) with the file and the column, row (from 0, without a CSV header) or path: broken
    file; missing column or wrong type; path that is missing, repeated or outside the root; unknown split; weight that
    is negative or not finite; shard that is missing or too short.
    """
    if root:
        refuse_link_out(root, file)
    table = read_table(file, unused, choice)
    if len(table) == 0:
        raise UserError(f"data.root: '{file}' has no row; list at least one image, or remove the file")
    if further := [name for name in table.column_names if name not in (*TYPES, "id", "reason")]:
        log.info("data.root: %s has the extra columns %s; known columns: %s", file.name, further, list(TYPES))
    weights = table["weight"].fill_null(1.0).to_numpy()
    for row in np.flatnonzero(~((weights >= 0) & np.isfinite(weights))).tolist():
        raise UserError(f"data.root: '{file}', row {row}: weight is {weights[row]}; write a number of at least 0")
    packed = is_packed(table)
    paths = table["path"] if root is None or packed else _spell_paths(root, table["path"].to_pylist())
    table = build_table(table, path=paths, split=read_splits(file, table["split"], "train", choice, unused))
    paths = table["path"]
    where = f"'{file}', column path"
    repeated = paths.slice(1).filter(pc.equal(paths.slice(1), paths.slice(0, len(paths) - 1)))
    if len(repeated):
        raise UserError(f"data.root: {where}: {repeated[0].as_py()!r} is there twice; keep one of the rows")
    _check_spelling(paths, where)
    if packed:
        table = replace_column(table, "shard", _open_shards(root, file, table, cache))
        sizes = table["length"]
    elif root is None:
        raise UserError(f"data.root: {file.name} lists files, but a URL must hold shards; pack the files (job=pack)")
    else:
        sizes = pa.array(find_sizes(root, paths.to_pylist(), where))
    return replace_column(table, "size", pc.coalesce(table["size"], sizes))


def _spell_paths(root: Path, paths: Sequence[str]) -> list[str]:
    """Return paths as the folders spell them: a manifest may have their other Unicode form."""
    listed = functools.lru_cache(_PART)(list_names)
    base = join(root, "")
    with about("data.root"):
        return [path if path.isascii() else find_path(base + path, listed).removeprefix(base) for path in paths]


def read_table(file: Path, unused: Unused, choice: TableChoice) -> Table:
    """Read a manifest without checking its rows, and cast its columns to our types.

    Raises UserError (`data.root`) for a broken file, a missing column, or one of _ASKED that cannot be cast.
    """
    table = read_columns(file)
    stated = choice.columns
    if read_sources(file) is not None:  # job=manifest has given our names to some
        stated = {ours: theirs for ours, theirs in stated.items() if theirs in table.column_names}
    fields = {*map(name_field, table.column_names), *stated}
    if len(set(table.column_names)) < table.num_columns or "path" not in fields:
        raise UserError(
            f"data.root: '{file}' has the columns {', '.join(table.column_names)}; it needs path, and may have "
            f"{', '.join(SCHEMA.names)}, each once; data.columns={{path: NAME}} says which one is the path"
        )
    columns = cast_columns(file, table, name_columns(table, stated), unused)
    if columns["path"].null_count:
        row = pc.index(columns["path"].is_null(), True).as_py()
        raise UserError(f"data.root: '{file}', row {row}: path is null; fill it in, or remove the row")
    return pa.table(columns)


def _check_spelling(paths: pa.Array | pa.ChunkedArray, where: str) -> None:
    """Raise UserError for a path that is absolute or leaves the collection."""
    outside = paths.filter(pc.match_substring_regex(paths, OUTSIDE))
    if len(outside):
        raise UserError(
            f"data.root: {where}: {outside[0].as_py()!r} is absolute, or has an empty part, '.' or '..'; write "
            "paths inside the collection, with / between folders"
        )


def _open_shards(root: Path | None, file: Path, table: Table, cache: Path) -> pa.Array:
    """Return the file of each packed row. Raises UserError if the row is not inside a shard of the collection."""
    shards = pc.unique(table["shard"]).drop_null()
    where = f"'{file}', column shard"
    _check_spelling(shards, where)
    sizes = find_sizes(root, shards.to_pylist(), where) if root else [math.inf] * len(shards)
    ends = dict(zip(shards.to_pylist(), sizes))
    files = {name: name for name in ends}
    for name in ends if root else ():
        if name.endswith(".parquet"):
            files[name] = str(unpack_parquet(root / name, cache).resolve())
            ends[name] = getsize(files[name])
    for place in table.select(["path", *PLACES]).to_pylist():
        _, shard, offset, length = place.values()
        if None in place.values() or not 0 <= offset <= offset + length <= ends[shard]:
            raise UserError(f"data.root: '{file}': {place} is not inside a shard; pack the collection again")
    return pa.array(map(files.get, table["shard"].to_pylist()), pa.string())


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
            raise UserError(f"data.root: '{file}' cannot be read ({error}); remove it, or save it again") from error
    return target


def find_sizes(root: Path, paths: Sequence[str], where: str) -> list[int]:
    """Return the sizes of files of a collection in bytes.

    where: the source of the paths, for messages.
    Raises UserError (`data.root`) with the paths that are no files, or are links out of the root.
    """
    real = join(realpath(root), "")
    find_folder = functools.lru_cache(_PART)(lambda folder: realpath(join(root, folder)))

    def look_up(path: str) -> int | None:
        folder, _, name = path.rpartition("/")
        file = join(find_folder(folder), name)
        file = realpath(file) if islink(file) else file
        return getsize(file) if file.startswith(real) and isfile(file) else None

    parts = [paths[start : start + _PART] for start in range(0, len(paths), _PART)]
    sizes = list(itertools.chain(*in_threads(lambda part: list(map(look_up, part)), parts)))
    if absent := [path for path, size in zip(paths, sizes) if size is None]:
        raise UserError(
            f"data.root: {where}: {len(absent):,} of {len(paths):,} are no files that can be read, or links out of the "
            f"collection: {show_some(absent)}; list files inside '{root}'"
        )
    return sizes


def save_manifest(root: Path, table: Table, tables: Mapping[str, str] | None = None) -> None:
    """Write a table as `manifest.parquet` of the root, atomically.

    tables: what job=manifest has read of `find_sources`; None: as in the manifest that is replaced.
    Raises UserError (`data.root`) if it cannot be written.
    """
    tables = read_sources(root / PARQUET) if tables is None else tables
    table = table.replace_schema_metadata({} if tables is None else {_TABLES: json.dumps(tables)})
    with output_errors("data.root", root / PARQUET, COPY):
        write_atomically(root / PARQUET, lambda file: pq.write_table(table, file, compression="zstd"))


def read_sources(file: Path) -> dict[str, str] | None:
    """Return the tables that job=manifest has read for its manifest (`find_sources`); None if it did not write it."""
    with suppress(pa.ArrowException, OSError, TypeError, KeyError, ValueError):  # reading refuses a broken file
        return json.loads(pq.read_schema(file).metadata[_TABLES])
    return None


def refuse_foreign(file: Path) -> None:
    """Raise UserError for a manifest that job=manifest did not write."""
    if read_sources(file) is None:
        raise UserError(
            f"data.root: '{file}' was not written by job=manifest and is not overwritten. To create a new one "
            "from the folder, move it away"
        )


def read_listed(root: Path, manifest: Path, unused: Unused, choice: TableChoice, cache: Path) -> Table:
    """Read a manifest, and count what its folders have beside the images that it lists."""
    table = read_manifest(root, manifest, unused, choice, cache)
    listed = set(table["shard" if is_packed(table) else "path"].to_pylist())
    is_of_user = read_sources(manifest) is None
    takes = lambda path: has_reader(path) or (path in listed and suffix_of(path) not in MISSING)  # noqa: E731
    for folder, _, names in walk_folders(root, unused, takes):
        paths = {folder + name for name in names} - listed
        unused.add("images that the manifest does not list", *filter(is_image_name, paths))
        if is_of_user:
            unused.add("sidecars beside a manifest", *filter(is_sidecar, paths))
    unused.pop(HIDDEN, None)
    return table


def find_sources(root: Path) -> dict[str, str]:
    """Return name, size and time of change of each table, and of the sidecars of each image, by path."""
    folder = scan_folder(root, Unused(), TableChoice())
    tables = [files for form, files in folder.files.items() if form not in (TABLES, BESIDE_IMAGES)]
    sources = {**folder.sidecars, **{table: [table] for table in itertools.chain(*tables)}}
    return {path: ", ".join(_describe(root / file) for file in files) for path, files in sources.items()}


def _describe(file: Path) -> str:
    status = file.stat(follow_symlinks=file.exists())  # a dangling link has a time of its own
    return f"{file.name} {status.st_size} {status.st_mtime_ns}"


def find_changed(root: Path, manifest: Path) -> list[str]:
    """Return and log the tables, and the images with sidecars, that differ from what job=manifest has read.

    None for another manifest. The sizes and the times of files are compared with the recorded ones. If no file has its
    recorded time, the folder is a copy, and the sizes alone count.
    """
    tables = read_sources(manifest)
    if tables is None:
        return []
    images = pq.read_table(manifest, columns=["path", SIDECARS]).to_pydict()
    before = {**dict(zip(images["path"], images[SIDECARS])), **tables}
    now = find_sources(root)
    if {*", ".join(before.values()).split(", ")}.isdisjoint(", ".join(now.values()).split(", ")):
        both = ({path: _TIME.sub("", fact) for path, fact in facts.items()} for facts in (before, now))
        before, now = both
    changed = sorted(path for path in {*before, *filter(is_table, now)} if before.get(path, "") != now.get(path, ""))
    if changed:
        log.warning(
            "data.root: sidecars of %s images, or tables, differ from what %s has read: %s; prepare.py job=manifest "
            "reads them", f"{len(changed):,}", manifest.name, show_some(changed),
        )  # fmt: skip
    return changed
