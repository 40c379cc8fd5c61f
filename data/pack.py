"""Pack a collection into tar shards, which WebDataset reads too (prepare.py job=pack).

The shards of a split are `000000.tar` and on; a row is `<key>.jpg`, `<key>.json` with all its columns, `<key>.cls` with
the number of its class among the sorted classes of training, and `<key>.txt` with its caption or tags. The training
rows are in a random order, so that neighbours in a shard are not of one class. `manifest.parquet` is written last: it
has the columns of the collection, where each image is, and its width and height (null for what is no image).
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from data.care.tool import Tool
from data.collection import Collection
from data.config import DataConfig
from data.image_formats import UnreadableImage
from data.images import Contents, open_contents
from data.manifest_writer import save_manifest
from data.open import load_collection
from data.pixels import upright_size
from data.scan import IMAGE_SUFFIXES
from data.shards import HEADER_BYTES, TAR, member_key
from data.table import MEASURED, PLACES, SPLITS, hash_table, replace_column
from utils import rng
from utils.config.schema import PathText
from utils.errors import UserError
from utils.io.files import output_errors, read_json, write_atomically, write_json
from utils.record.logging import get_logger
from utils.record.progress import counting

log = get_logger(__name__)

_PLAN = "pack.json"  # what is packed: a folder is gone on with only where that is the same
_VERSION = 1  # of what is in a shard
_ORDER_SEED = 0
_MIB = 2**20
_OVERHEAD_BYTES = 3072  # of a row beside its image: headers, padding and the other members
_READ_AT_ONCE, _THREADS = 256, 16

_Member = tuple[str, bytes]  # name and content


class PackReport(NamedTuple):
    """What `pack_collection` wrote. kept: shards that were there. weightless: skipped images, of weight 0."""

    rows: int
    shards: int
    kept: int
    weightless: int


class _Place(NamedTuple):
    offset: int
    length: int
    sha256: str
    size_hw: tuple[int, int] | None


class Pack(Tool):
    """Write the images as tar shards of about `shard_mib` MiB, and their manifest, into the folder `output`."""

    name: Literal["pack"]
    output: PathText
    shard_mib: Annotated[int, Field(ge=1, le=2**20)]

    def run(self, data: DataConfig) -> str:
        """Pack. Raises UserError (`job.output`, `data.root`)."""
        collection = load_collection(data)
        with counting("packing the images") as progress:
            report = pack_collection(collection, Path(self.output), self.shard_mib, progress)
        log.info(
            "wrote %s: %s images in %d shards (%d of them were there), %d images of weight 0 skipped",
            self.output, f"{report.rows:,}", report.shards, report.kept, report.weightless,
        )  # fmt: skip
        return f"{report.rows} images in {report.shards} shards"


def pack_collection(
    collection: Collection, output: Path, shard_mib: int, progress: Callable[[int, int], None]
) -> PackReport:
    """Write a collection as shards of about `shard_mib` MiB and their manifest; go on where an earlier call ended.

    Shards that are there are read and checked; one that is damaged is written again. progress: called with the images
    done and their number.

    Raises UserError: `job.output` where the folder holds anything else, or cannot be written; `data.root` where an
    image cannot be read, or has not the stated SHA-256.
    """
    kept_rows = collection.weights() > 0
    shards = _plan_shards(collection, kept_rows, shard_mib * _MIB)
    total, done, kept, places = int(kept_rows.sum()), 0, 0, []
    with output_errors("job.output", output):
        _claim(output, {"collection": hash_table(collection.table, measured=True), "shard_mib": shard_mib})
        packer = _Packer(collection)
        for name, rows in shards.items():
            found = packer.check(output / name, rows)
            kept += found is not None
            places += packer.write(output / name, rows) if found is None else found
            done += len(rows)
            progress(done, total)
    table = _with_places(collection.table, shards, places)
    save_manifest(output, table, "pack_collection")
    return PackReport(total, len(shards), kept, len(collection) - total)


def _plan_shards(collection: Collection, kept: np.ndarray, limit: int) -> dict[str, np.ndarray]:
    """Return the rows of each shard by its name: no shard has rows of two splits."""
    groups: list[np.ndarray] = []
    sizes = collection.table["size"].to_numpy()
    for split in SPLITS:
        rows = collection.rows(split)
        rows = rows[kept[rows]]
        if split == "train":
            rows = rows[rng.permutation(_ORDER_SEED, 0, len(rows))]
        numbers = (np.cumsum(sizes[rows] + _OVERHEAD_BYTES) - 1) // limit
        groups += np.split(rows, np.flatnonzero(np.diff(numbers)) + 1) if len(rows) else []
    return {f"{number:06}{TAR}": rows for number, rows in enumerate(groups)}


def _claim(output: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or make sure that it holds what an earlier call with the same plan wrote."""
    plan = {**plan, "version": _VERSION}
    if not output.exists() or not any(output.iterdir()):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / _PLAN, plan)
        return
    try:
        found = read_json(output / _PLAN)
    except (FileNotFoundError, ValueError):
        found = None
    if found != plan:
        raise UserError(
            f"job.output: {str(output)!r} is not empty, and does not hold shards of this collection with the same "
            "job.shard_mib; name a new folder"
        )
    for leftover in output.glob(f".*{TAR}.*.tmp"):  # of a call that was killed
        leftover.unlink()


class _Packer:
    """Write shards and check them; both return the places of the images, in the order of the rows."""

    def __init__(self, collection: Collection) -> None:
        self._contents: Contents = open_contents(collection)
        self._table, self._sizes = collection.table, collection.stated_sizes()
        self._classes = {label: number for number, label in enumerate(collection.class_names("train"))}

    def write(self, file: Path, rows: np.ndarray) -> list[_Place]:
        """Write a shard, atomically."""
        return write_atomically(file, lambda temporary: self._write(temporary, rows))

    def _write(self, file: Path, rows: np.ndarray) -> list[_Place]:
        places = []
        with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
            for record, (content, size_hw) in zip(self._records(rows), self._read(rows)):
                place = _Place(tar.offset + HEADER_BYTES, len(content), _sha256(content), size_hw)
                if record["sha256"] not in (None, place.sha256):
                    raise UserError(
                        f"data.root: {record['path']!r} has the SHA-256 {place.sha256}, not {record['sha256']} as the "
                        "manifest states; restore the image, or make the manifest again"
                    )
                places.append(place)
                for name, member in self._members(record, content, place.sha256):
                    header = tarfile.TarInfo(name)
                    header.size, header.mode = len(member), 0o644
                    tar.addfile(header, io.BytesIO(member))
        return places

    def check(self, file: Path, rows: np.ndarray) -> list[_Place] | None:
        """Return the places in a shard that holds these rows and nothing else; None where it does not."""
        if not file.is_file():
            return None
        places = []
        try:
            with tarfile.open(file, "r:") as tar:
                for row, record in zip(rows.tolist(), self._records(rows)):
                    image = tar.next()
                    content = _content(tar, image)
                    place = _Place(image.offset_data, image.size, _sha256(content), self._measure(row, content))
                    first, *others = self._members(record, content, place.sha256)
                    found = [(image.name, content)]
                    for _ in others:
                        member = tar.next()
                        found.append((member.name, _content(tar, member)))
                    if found != [first, *others] or record["sha256"] not in (None, place.sha256):
                        return None
                    places.append(place)
                return places if tar.next() is None else None
        except (tarfile.TarError, EOFError):
            return None

    def _records(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        """Yield the columns of rows, but for where the images are now."""
        table = self._table.drop_columns([name for name in PLACES if name in self._table.column_names])
        for start in range(0, len(rows), _READ_AT_ONCE):
            yield from table.take(rows[start : start + _READ_AT_ONCE]).to_pylist()

    def _read(self, rows: np.ndarray) -> Iterator[tuple[bytes, tuple[int, int] | None]]:
        """Yield the images of rows and their sizes; threads read some ahead. Raises UserError (`data.root`)."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(rows), _READ_AT_ONCE):
                try:
                    yield from pool.map(self._load, rows[start : start + _READ_AT_ONCE].tolist())
                except UnreadableImage as error:
                    raise UserError(
                        f"data.root: {error}; restore the image, or let prepare.py job=manifest give it weight 0"
                    ) from None

    def _load(self, row: int) -> tuple[bytes, tuple[int, int] | None]:
        content = self._contents.read(row)
        return content, self._measure(row, content)

    def _measure(self, row: int, content: bytes) -> tuple[int, int] | None:
        """Return the height and width that the collection states, or else those of the upright image in the file."""
        if self._sizes is not None and self._sizes[row].all():
            return tuple(self._sizes[row].tolist())
        try:
            return upright_size(content, self._table["path"][row].as_py())
        except UnreadableImage:
            return None

    def _members(self, record: dict[str, Any], content: bytes, sha256: str) -> list[_Member]:
        """Return the members of a row, the image first."""
        key, suffix = member_key(record["path"]), os.path.splitext(record["path"])[1].lower()
        columns = {name: value for name, value in record.items() if value is not None} | {"sha256": sha256}
        texts = {".json": json.dumps(columns, ensure_ascii=False, sort_keys=True)}
        if record["label"] in self._classes:
            texts[".cls"] = str(self._classes[record["label"]])
        if text := record["caption"] or ", ".join(record["tags"]):
            texts[".txt"] = text
        image = key + (suffix if suffix in IMAGE_SUFFIXES else ".img"), content
        return [image, *((key + name, text.encode()) for name, text in texts.items())]


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes:
    """Return a member's content. Raises EOFError where there is none."""
    stream = None if member is None else tar.extractfile(member)
    if stream is None:
        raise EOFError
    return stream.read()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _with_places(table: pa.Table, shards: dict[str, np.ndarray], places: Sequence[_Place]) -> pa.Table:
    """Return the packed rows of a table in the order of the shards, with the columns of PLACES and the sizes."""
    table = table.take(np.concatenate([np.empty(0, np.int64), *shards.values()]))
    columns = {
        "shard": [name for name, rows in shards.items() for _ in rows],
        "offset": [place.offset for place in places],
        "length": [place.length for place in places],
    }
    for name, kind in PLACES.items():
        table = replace_column(table, name, pa.array(columns[name], kind))
    for axis, name in enumerate(("height", "width")):
        sizes = [place.size_hw and place.size_hw[axis] for place in places]
        table = replace_column(table, name, pa.array(sizes, MEASURED[name]))
    lengths, digests = table["length"], [place.sha256 for place in places]
    table = replace_column(table, "size", lengths)
    return replace_column(table, "sha256", pa.array(digests, pa.string()))
