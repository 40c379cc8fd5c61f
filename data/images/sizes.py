"""Measure the files of a collection once: the sizes of images, and the hashes of files."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image

from data.collection.collection import Collection
from data.images.convert import read_orientation
from data.images.open import UNLIMITED, open_image, read_file
from data.stream.source import UnreadableImage
from utils.errors import UserError
from utils.io.files import sha256_file
from utils.io.memo import in_threads, measure_once
from utils.ranks import distributed
from utils.record.logging import log

SIZES = Path("outputs/cache/upright_sizes.jsonl")
_WIDTH = 0x0100  # a tag of TIFF
_HEIGHT = 0x0101


def read_upright_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the height and width of a file after EXIF rotation."""
    return upright_size(read_file(path), os.fspath(path))


def upright_size(content: bytes, name: str) -> tuple[int, int]:
    """Return the height and width after EXIF rotation, from the header; only a PNG is decoded completely.

    Raises UnreadableImage as `Decoder` does, except for damaged pixels.
    """
    with open_image(content, name, UNLIMITED, header=True) as image:
        return size_of(image)


def size_of(image: Image.Image) -> tuple[int, int]:
    """Return the height and width of an opened image after EXIF rotation."""
    stored = image.tag_v2 if image.format == "TIFF" else {}  # newer Pillows open a TIFF with its rotated size
    height = stored.get(_HEIGHT, image.height)
    width = stored.get(_WIDTH, image.width)
    return (width, height) if read_orientation(image) in (5, 6, 7, 8) else (height, width)


def image_sizes(collection: Collection, rows: ndarray, cache: Path) -> ndarray:
    """Return the sizes of rows, int64 [N, 2], from the manifest's width and height, else from the files' headers.

    0 for unreadable images. cache: a file in which rank 0 keeps measured sizes.
    Raises UserError (`data.root`) if the index of shards has no sizes; shards are not read.
    """
    names = ("height", "width")
    is_stated = {*names} <= {*collection.table.column_names}
    sizes = np.zeros((len(rows), 2), dtype=np.int64)
    for axis, name in enumerate(names if is_stated else ()):
        sizes[:, axis] = np.nan_to_num(collection.column(name)[rows])
    unknown = np.flatnonzero((sizes == 0).any(axis=1) & (not is_stated or not collection.is_packed))
    measured = _measure(collection, rows[unknown], cache, read_upright_size, "image sizes")
    for index, size in zip(unknown, measured):
        sizes[index] = size or 0
    return sizes


def image_hashes(collection: Collection, rows: ndarray, cache: Path) -> list[str]:
    """Return the SHA-256 of the rows' files, "" if a file cannot be opened; for shards, from the manifest."""
    if collection.is_packed and collection.table["sha256"].null_count == 0:
        return collection.table["sha256"].take(rows).to_pylist()
    digests = _measure(collection, rows, cache, sha256_file, "image hashes")
    return [digest or "" for digest in digests]


def _measure(
    collection: Collection, rows: ndarray, cache: Path, measure: Callable[[Path], Any], what: str
) -> list[Any]:
    """Return the results of `measure` for the rows' files, on all ranks; rank 0 reads new and changed files.

    None for an unreadable file. Raises UserError (`data.root`) if the rows are in shards.
    """
    if len(rows) and collection.is_packed:
        raise UserError(
            f"data.root: the manifest of the shards in '{collection.root}' lacks {what}; run "
            f"prepare.py job=pack data=image_folder data.root={collection.root} job.output=NEW, and use NEW"
        )

    def measure_one(path: Path) -> Any:
        try:
            return measure(path)
        except (OSError, UnreadableImage) as error:
            log.warning("%s", error)
            return None

    paths = [collection.absolute_path(int(row)) for row in rows]
    every = functools.partial(in_threads, measure_one)
    return distributed.rank_zero_call(lambda: measure_once(paths, every, cache, f"reading {what}"))
