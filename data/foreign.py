"""Folders of other people's shards: WebDataset's tar files, and Arrow or Parquet files of Hugging Face's `datasets`.

They are scanned once into the table of a collection, whose rows are parts of those files. The files are at the root or
in its folders `train`, `val` and so on, and `data`; a file is of the split that its path names, else of training.
"""

import functools
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.huggingface import scan_arrow
from data.manifest import fault_of_path
from data.manifest_formats import fill_columns, read_parquet
from data.scan import IMAGE_SUFFIXES, holds_image, list_folder
from data.table import PLACES, SCHEMA, SPLIT_NAMES, Scanned, settle_test_split, show_some, sort_rows
from data.tags.posts import POSTS
from data.tags.records import Sidecar, parse_json, parse_record, parse_text
from utils.errors import UserError
from utils.io.files import write_atomically
from utils.io.memo import files_key
from utils.ranks.processes import count_cores, map_in_processes
from utils.record.logging import get_logger
from utils.record.progress import track

log = get_logger(__name__)

_VERSION = 1  # of what a scan finds
_SCHEMA = pa.schema([*SCHEMA, ("id", pa.int64()), *PLACES.items()])
_TAR, _ARROW = (".tar",), (".arrow", ".parquet")
_SIDECARS = ("json", "cls", "txt")
_MAX_SIDECAR_BYTES = 2**20
_PARALLEL_FROM = 8  # tar files; below, starting processes takes longer


def read_foreign(root: Path, cache: Path) -> pa.Table | None:
    """Return the table of other people's shards, sorted by path; None where a folder has none, or has images.

    cache: keeps the table until a file changes. Logs what is skipped.
    Raises UserError (`data.root`) where the folder has shards of both kinds, or no image in them.
    """
    files = _find_files(root)
    if not files:
        return None
    if holds_image(root):
        log.info("data.root: %s beside images: only the images are read", show_some(files))
        return None
    if len({name.endswith(_TAR) for name in files}) > 1:
        raise UserError(f"data.root: {str(root)!r} holds both tar and Arrow or Parquet files; keep those of one kind")
    target = cache / f"shards-{files_key([root / name for name in files], _VERSION)}.parquet"
    table = read_parquet(target).cast(_SCHEMA) if target.is_file() else None
    if table is None or not all((root / shard).is_file() for shard in pc.unique(table["shard"]).to_pylist()):
        table = _scan(root, files, cache)
        write_atomically(target, lambda file: pq.write_table(table, file, compression="zstd"))
    log.info("data.root: %s images in %d shards (%s)", f"{len(table):,}", len(files), show_some(files))
    if table["id"].null_count == len(table):
        table = table.drop_columns(["id"])
    columns = dict(zip(table.column_names, table.columns))
    return settle_test_split(sort_rows(fill_columns(columns, len(table))))


def _find_files(root: Path) -> list[str]:
    """Return the paths of shards, relative to the root, sorted."""
    names = [entry.name for entry in list_folder(root) if entry.name.lower() in (*SPLIT_NAMES, "data")]
    folders = ["", *(f"{name}/" for name in names if (root / name).is_dir())]
    found = [(folder, entry) for folder in folders for entry in list_folder(root / folder)]
    return sorted(
        folder + entry.name
        for folder, entry in found
        if entry.name.endswith((*_TAR, *_ARROW))
        and entry.name[0] != "."
        and entry.name not in POSTS
        and entry.is_file()
    )


def _scan(root: Path, files: list[str], cache: Path) -> pa.Table:
    """Scan shards into one table; tar files in one process per core."""
    if not files[0].endswith(_TAR):
        scans: Iterator[Scanned] = (scan_arrow(root, name, cache) for name in files)
    elif len(files) < _PARALLEL_FROM or count_cores() == 1:
        scans = (_scan_tar(root, name) for name in files)
    else:
        scans = map_in_processes(functools.partial(_scan_tar, root), files, _fatal_tar, chunk_size=1)
    tables, skipped = [], []
    for name, scanned in zip(files, track(scans, len(files), "scanning shards")):
        split = next((SPLIT_NAMES[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLIT_NAMES), "train")
        tables.append(pa.Table.from_pylist([{"split": split, **row} for row in scanned.rows], _SCHEMA))
        skipped += scanned.skipped
    if not any(map(len, tables)):
        why = f"; skipped: {show_some(skipped)}" if skipped else ""
        raise UserError(f"data.root: {str(root)!r} holds no image in {show_some(files)}{why}")
    if skipped:
        log.warning("data.root: %s parts of shards are skipped: %s", f"{len(skipped):,}", show_some(skipped))
    return pa.concat_tables(tables)


# ----------------------------------------------------------------------------------------------------------- tar files


def _scan_tar(root: Path, name: str) -> Scanned:
    """Find the images of a tar file, and what the members of the same key say of them."""
    images: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, dict[str, bytes]] = {}
    skipped = []
    try:
        with tarfile.open(root / name, "r:") as tar:
            for member in tar:
                path = member.name.removeprefix("./")
                if member.isdir():
                    continue
                if fault := _fault_of_member(member, path):
                    skipped.append(f"{path!r} in {name} {fault}")
                    continue
                key, extension = _split_name(path)
                if f".{extension}" in IMAGE_SUFFIXES:
                    images[path] = member
                elif extension in _SIDECARS and member.size <= _MAX_SIDECAR_BYTES:
                    texts.setdefault(key, {})[extension] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError) as error:  # what came before is whole
        skipped.append(f"the end of {name} ({error})")
    rows = []
    for path, member in images.items():
        found, fault = _read_texts(f"{path!r} in {name}", texts.get(_split_name(path)[0], {}))
        place = {"shard": name, "offset": member.offset_data, "length": member.size, "size": member.size}
        rows.append({"path": f"{name}/{path}", **place, **found})
        skipped += fault
    return Scanned(rows, skipped)


def _fatal_tar(name: str) -> Scanned:
    return Scanned([], [f"{name}, which ends the process that reads it"])


def _fault_of_member(member: tarfile.TarInfo, path: str) -> str | None:
    """Return why a member is not taken: what it is, or where it would lead; None for an ordinary file."""
    if not member.isreg() or member.issparse():
        return "is a link, a device or another kind of member that is no plain file"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "has a name that is not UTF-8"
    return fault_of_path(path)


def _split_name(path: str) -> tuple[str, str]:
    """Return the key and the extension of a member, as WebDataset does: at the first dot of its name."""
    folder, slash, name = path.rpartition("/")
    key, _, extension = name.partition(".")
    return folder + slash + key, extension.lower()


def _read_texts(where: str, texts: dict[str, bytes]) -> tuple[dict[str, Any], list[str]]:
    """Return the columns that the texts beside an image give, and what of them cannot be read."""
    sidecar, label, faults = Sidecar(), None, []
    for extension in ("txt", "cls", "json"):  # the last one takes precedence
        try:
            text = texts.get(extension, b"").decode("utf-8-sig").strip()
            if extension == "cls":
                label = text or None
            elif extension == "txt":
                sidecar = parse_text(text) if text else sidecar
            elif isinstance(record := parse_json(text or "{}"), dict):
                sidecar = sidecar.updated(parse_record(where, record))
                label = str(record["label"]) if isinstance(record.get("label"), str | int) else label
        except ValueError as error:  # UserError is one
            faults.append(f"the {extension} of {where} ({error})")
    return {**sidecar._asdict(), "label": label}, faults
