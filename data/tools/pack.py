"""Pack a collection into tar shards, which WebDataset can also read (prepare.py job=pack).

Shards are named `000000.tar` and so on. A row becomes `<key>.jpg`, `<key>.json` with all its columns, `<key>.cls` with
the index of its class in the sorted training classes, and `<key>.txt` with its caption or tags. Training rows are
shuffled, so that neighbours in a shard differ in class. `manifest.parquet` is written last, with the columns of the
collection, the byte range of each image, and its width and height (null if it cannot be read).
"""

import functools
import hashlib
import io
import itertools
import json
import tarfile  # noqa: TID251 (shards are written)
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from data.collection.collection import Collection
from data.config import DataConfig
from data.images.bytes import TAR, member_key, open_contents
from data.images.sizes import upright_size
from data.layouts.manifest import save_manifest
from data.layouts.names import IMAGE_SUFFIXES, suffix_of
from data.layouts.table import PLACES, SPLITS, TYPES, replace_column, take_rows
from data.layouts.values import FIELDS
from data.load import load_collection
from data.stream.source import UnreadableImage
from data.tools.config import Pack
from utils import rng
from utils.errors import UserError
from utils.io.files import Json, write_atomically
from utils.io.journal import open_journal
from utils.io.memo import in_threads
from utils.record.logging import log
from utils.record.progress import track

_VERSION = 1  # version of the shard content
_ORDER_SEED = 0
_MIB = 2**20
_OVERHEAD_BYTES = 3072  # bytes per row besides the image: headers, padding, other members
_READ_AT_ONCE = 256


def pack(job: Pack, data: DataConfig) -> str:
    """Write the shards. Raises UserError as `write_shards` does."""
    collection = load_collection(data)
    collection.refuse_faults(*FIELDS)
    table = write_shards(job, collection)
    log.info("%d images of weight 0 are skipped", len(collection) - len(table))
    return f"{len(table)} images in {pc.count_distinct(table['shard'])} shards"


def write_shards(job: Pack, collection: Collection) -> pa.Table:
    """Write the shards and the manifest, and return the manifest. Complete shards of a killed call are kept.

    Raises UserError: `job.output` if the folder has other content or cannot be written; `data.root` if an image
    cannot be read or its SHA-256 differs from the manifest.
    """
    shards = _plan_shards(collection, job.shard_mib * _MIB)
    output = Path(job.output)
    classes = {label: number for number, label in enumerate(collection.class_names("train"))}
    plan = [collection.fingerprint, job.shard_mib, _VERSION]
    with open_journal("job.output", output, plan, is_folder=True) as journal:
        members = list(itertools.chain.from_iterable(journal.parts()))
        if not members and any(output.glob("[!.]*")):
            raise UserError(f"job.output: '{output}' is not empty; name a new folder")
        packed = {member["shard"] for member in members}
        for name, rows in track(shards.items(), len(shards), "packing the images"):
            if name not in packed:
                write = functools.partial(_write_shard, collection=collection, rows=rows, classes=classes)
                places = [{"shard": name, **place} for place in write_atomically(output / name, write)]
                journal.add(places)
                members += places
        table = take_rows(collection.table, pa.array(np.concatenate([np.empty(0, np.int64), *shards.values()])))
        columns = {name: [member[name] for member in members] for name in (*PLACES, "sha256", "width", "height")}
        for name, values in {**columns, "size": columns["length"]}.items():
            table = replace_column(table, name, pa.array(values, TYPES[name]))
        save_manifest(output, table)
    return table


def _plan_shards(collection: Collection, limit: int) -> dict[str, ndarray]:
    """Return the rows of each shard, by name. A shard has rows of one split only."""
    groups = []
    sizes = collection.table["size"].to_numpy()
    for split in SPLITS:
        rows = collection.rows(split)
        if split == "train":
            rows = rows[rng.permutation(_ORDER_SEED, 0, len(rows))]
        numbers = (np.cumsum(sizes[rows] + _OVERHEAD_BYTES) - 1) // limit
        groups += np.split(rows, np.flatnonzero(np.diff(numbers)) + 1) if len(rows) else []
    return {f"{number:06}{TAR}": rows for number, rows in enumerate(groups)}


def _write_shard(file: Path, collection: Collection, rows: ndarray, classes: dict[str, int]) -> list[Json]:
    """Write a shard; return byte range, SHA-256 and size of each image."""
    places = []
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for record, content in _read_rows(collection, rows):
            known = {name: record.get(name) for name in ("sha256", "width", "height")}
            places.append({"offset": tar.offset + tarfile.BLOCKSIZE, "length": len(content), **known})
            key = member_key(record["path"])
            suffix = suffix_of(record["path"])
            members = {suffix if suffix in IMAGE_SUFFIXES else ".img": content}
            stated = {name: value for name, value in record.items() if value is not None}
            members[".json"] = json.dumps(stated, ensure_ascii=False, sort_keys=True).encode()
            if record["label"] in classes:
                members[".cls"] = str(classes[record["label"]]).encode()
            if text := record["caption"] or ", ".join(record["tags"]):
                members[".txt"] = text.encode()
            for name, member in members.items():
                header = tarfile.TarInfo(key + name)
                header.size = len(member)
                header.mode = 0o644
                tar.addfile(header, io.BytesIO(member))
    return places


def _read_rows(collection: Collection, rows: ndarray) -> Iterator[tuple[Json, bytes]]:
    """Yield the columns of rows, with SHA-256 and upright size, and their encoded images; threads read ahead.

    Raises UserError (`data.root`).
    """
    contents = open_contents(collection)
    names = [name for name in collection.table.column_names if name not in PLACES]

    def load(row: int) -> tuple[Json, bytes]:
        view = collection.row(row)
        record = {name: getattr(view, name) for name in names}
        try:
            content = contents.read(row)
        except UnreadableImage as error:
            raise UserError(
                f"data.root: {error}; restore the image, or run prepare.py job=manifest to give it weight 0"
            ) from None
        digest = hashlib.sha256(content).hexdigest()
        if record["sha256"] not in (None, digest):
            raise UserError(
                f"data.root: {record['path']!r} has the SHA-256 {digest}, but the manifest says {record['sha256']}; "
                "restore the image, or write the manifest again"
            )
        if not record.get("width"):
            with suppress(UnreadableImage):
                record["height"], record["width"] = upright_size(content, record["path"])
        return {**record, "sha256": digest}, content

    for start in range(0, len(rows), _READ_AT_ONCE):
        yield from in_threads(load, rows[start : start + _READ_AT_ONCE].tolist())
