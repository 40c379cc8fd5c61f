"""A store that fsspec reads, such as s3://bucket/folder: packed shards and their manifest.

Keys and endpoints are those of the environment and of fsspec's configuration (FSSPEC_S3_ENDPOINT_URL and so on).
`filecache::s3://bucket/folder` keeps the shards that were read on a local disk.
"""

from pathlib import Path

import fsspec
from fsspec.spec import AbstractFileSystem

from utils.errors import UserError
from utils.io.files import sha256_text, write_atomically


def is_remote(root: str) -> bool:
    """Return whether a root is a URL."""
    return "://" in root


def fetch_manifest(root: str, cache: Path) -> Path:
    """Copy the manifest of remote shards into the cache, where it changed, and return the copy.

    Raises UserError (`data.root`) where the store has none, or does not give it.
    """
    files, folder = open_store(root)
    try:
        content = files.cat_file(f"{folder}/manifest.parquet")
    except Exception as error:  # each store has errors of its own
        raise UserError(
            f"data.root: the manifest.parquet of {root!r} cannot be read ({type(error).__name__}: {error}); check URL, "
            "network and keys, and that the shards of prepare.py job=pack are there with it"
        ) from error
    target = cache / "remote" / sha256_text(root)[:16] / "manifest.parquet"
    if not target.is_file() or target.read_bytes() != content:
        write_atomically(target, lambda temporary: temporary.write_bytes(content))
    return target


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
