"""A packed collection behind a URL that fsspec reads, such as s3://bucket/folder: its manifest, and ranges of shards.

Keys and endpoints are those of the environment and of fsspec's configuration (FSSPEC_S3_ENDPOINT_URL and so on).
"""

import time
from collections.abc import Mapping
from pathlib import Path

import fsspec
from fsspec.spec import AbstractFileSystem

from data.manifest_formats import PARQUET
from data.source import join_ranges
from utils.errors import UserError
from utils.io.files import sha256_text, write_atomically

_ATTEMPTS, _PAUSE_SEC = 3, 0.5


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


def read_ranges(
    files: AbstractFileSystem, folder: str, places: Mapping[int, tuple[str, int, int]]
) -> dict[int, bytes | Exception]:
    """Return the bytes of some (shard, offset, length), or the error of the last attempt; near ones in one request."""
    found: dict[int, bytes | Exception] = {}
    for attempt in range(_ATTEMPTS):
        missing = [key for key, (_, _, length) in places.items() if not _is_whole(found.get(key), length)]
        if not missing:
            break
        time.sleep(attempt * _PAUSE_SEC)
        found |= _read_once(files, folder, {key: places[key] for key in missing})
    return found


def _is_whole(content: bytes | Exception | None, length: int) -> bool:
    return isinstance(content, bytes) and len(content) == length


def _read_once(
    files: AbstractFileSystem, folder: str, places: Mapping[int, tuple[str, int, int]]
) -> dict[int, bytes | Exception]:
    groups = join_ranges(places)
    starts = [max(0, places[group[0]][1]) for group in groups]
    ends = [max(places[key][1] + places[key][2] for key in group) for group in groups]
    shards = [f"{folder}/{places[group[0]][0]}" for group in groups]
    try:
        contents = files.cat_ranges(shards, starts, ends, on_error="return")
    except Exception as error:  # each store has errors of its own
        return dict.fromkeys(places, error)
    found: dict[int, bytes | Exception] = {}
    for group, start, content in zip(groups, starts, contents):
        for key in group:
            _, offset, length = places[key]
            at = offset - start
            found[key] = content if isinstance(content, Exception) else content[max(0, at) : at + length]
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
