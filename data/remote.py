"""A packed collection behind a URL that fsspec reads, such as s3://bucket/folder: its manifest, and ranges of shards.

Keys and endpoints are those of the environment and of fsspec's configuration (FSSPEC_S3_ENDPOINT_URL and so on).
`filecache::s3://bucket/folder` keeps the shards that were read on a local disk.
"""

from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path

import fsspec
from fsspec.spec import AbstractFileSystem

from data.manifest_formats import PARQUET
from data.source import FileRange, join_ranges
from utils.errors import UserError
from utils.io.files import sha256_text, write_atomically


def is_remote(root: str) -> bool:
    """Return whether a root is a URL."""
    return "://" in root


def fetch_manifest(root: str, cache: Path) -> Path:
    """Copy the manifest of remote shards into the cache and return the copy.

    Raises UserError (`data.root`) where the store has none, or does not give it.
    """
    files, folder = open_store(root)
    try:
        content = files.cat_file(f"{folder}/{PARQUET}")
    except FileNotFoundError as error:
        raise UserError(
            f"data.root: {root!r} has no {PARQUET} (404); make shards with prepare.py job=pack and copy them there"
        ) from error
    except PermissionError as error:
        raise UserError(
            f"data.root: {root!r} may not be read with these keys (403: {error}); set those of a user who may"
        ) from error
    except Exception as error:  # each store has errors of its own
        raise UserError(
            f"data.root: {root!r} cannot be read ({type(error).__name__}: {error}); check URL, network and keys"
        ) from error
    target = cache / "remote" / sha256_text(root)[:16] / PARQUET
    write_atomically(target, lambda temporary: temporary.write_bytes(content))
    return target


def read_ranges(files: AbstractFileSystem, places: Mapping[int, FileRange]) -> dict[int, bytes | Exception]:
    """Return the bytes of some parts of files, or the error that the store gave; near parts in one request."""
    joined = join_ranges(places.values())
    paths, starts, lengths = (list(column) for column in zip(*joined))
    ends = [start + length for start, length in zip(starts, lengths)]
    try:
        contents = files.cat_ranges(paths, starts, ends, on_error="return")
    except Exception as error:  # each store has errors of its own
        return dict.fromkeys(places, error)
    found: dict[int, bytes | Exception] = {}
    for key, (path, offset, length) in places.items():
        number = bisect_right(joined, (path, offset, float("inf"))) - 1
        content, at = contents[number], offset - starts[number]
        found[key] = content[at : at + length] if isinstance(content, bytes) else content
    return found


def open_store(root: str) -> tuple[AbstractFileSystem, str]:
    """Return the store and the folder in it. Raises UserError (`data.root`).

    fsspec keeps one store for each process and thread, so a fork gets its own, and threads should share one.
    """
    try:
        return fsspec.core.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"data.root: {root!r} cannot be opened ({error}); `make install-cloud` installs what reads s3://"
        ) from error
