"""The cache of decoded images on disk, `data.cache.disk_gib`.

source = keep_on_disk(Images(collection, decoder), config.cache)    in a folder, which runs share
"""

import functools
import os
from pathlib import Path

from data.config import CacheConfig
from data.images.bytes import Files, Images
from data.images.caches import GIB, Cached
from data.images.record_store import LimitedStore, record_key
from utils.io.memo import file_version


def keep_on_disk(images: Images, config: CacheConfig) -> Cached:
    """Return the source behind a folder of records, by the file's state and the decoder's identity.

    The state is path, range, size, times and inode, so an edited file or another decoder never gets old records.
    Raises UserError (`data.cache.folder`) if the folder cannot be used.
    """
    store = LimitedStore(Path(config.folder), round(config.disk_gib * GIB))
    key_of = functools.partial(image_key, images.contents, inputs=images.decoder.identity())
    return Cached(images, store, key_of, "l2")


def image_key(contents: Files, row: int, inputs: str) -> str | None:
    """Return the key of a row's image for the decoder `inputs`; None if its file is missing or was changed just now."""
    if (file := contents.file_of(row)) is None:  # remote shards are only replaced together with their index
        digest = contents.collection.row(row).sha256
        return record_key(inputs, digest, contents.name_of(row)) if digest else None
    version = file_version(file.path)
    return version and record_key(inputs, os.path.abspath(file.path), file.offset, file.length, version)
