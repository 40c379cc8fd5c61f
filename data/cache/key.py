"""The keys of cached images: a hash of everything that a record's pixels depend on.

An image is found in two steps, so that neither a file that was edited nor an old manifest ever gives a stale one:

    link_key(file) -> SHA-256 of the file's content      as it was read, never as a manifest states it
    image_key(SHA-256, name, recipe) -> the image

The first key has the file's path, size, inode and its times of change to the nanosecond. The system sets one of them
(ctime) whenever a file is changed, and programs cannot set it. A file that was copied, moved or touched is read and
hashed again, and its image is found by the second key. The `sha256` of a manifest is not a key: the file may have been
edited since, without changing its size.
"""

import os
import time

import PIL

from data.config import CacheConfig
from data.decode import Decoder
from data.source import FileRange
from data.tensor_store import record_key
from utils.io.memo import file_version

_VERSION = 2  # of the form of records and keys: another number decodes everything again
_YOUNG_SEC = 2  # coarsest clock of a file system: within one tick, a second change of a file leaves its times equal


def link_key(file: FileRange | None) -> str | None:
    """Return the key of the content hash of a file's part, None for what is none, or was changed a moment ago."""
    version = None if file is None else file_version(file.path)  # of no file: whoever reads it says why
    if version is None or time.time_ns() - version[2] < _YOUNG_SEC * 10**9:
        return None
    return record_key(_VERSION, "file", os.path.abspath(file.path), file.offset, file.length, version)


def recipe_of(decoder: Decoder, config: CacheConfig) -> str:
    """Return what stored pixels depend on beside the content: the decoder and the stored form."""
    stored = "raw" if config.format == "raw" else f"{config.format} {config.quality} by pillow {PIL.__version__}"
    return f"{decoder.identity()}; {stored}"


def image_key(digest: bytes, name: str, recipe: str) -> str:
    """Return the key of an image. digest: SHA-256 of its file's content. name: of the file; it may tell the format."""
    return record_key(_VERSION, digest.hex(), os.path.splitext(name)[1].lower(), recipe)
