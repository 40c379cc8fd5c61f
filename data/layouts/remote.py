"""Packed shards and their manifest in a remote store that fsspec can read, such as s3://bucket/folder.

Credentials and endpoints come from the environment and fsspec's configuration (FSSPEC_S3_ENDPOINT_URL etc.).
`filecache::s3://bucket/folder` caches shards on a local disk.
"""

from pathlib import Path

import fsspec
from fsspec.spec import AbstractFileSystem

from utils.errors import UserError
from utils.io.files import sha256_text, write_atomically


def fetch_manifest(root: str, cache: Path) -> Path:
    """Copy the manifest of remote shards into the cache if it has changed, and return the copy.

    Raises UserError (`data.root`) if it cannot be read.
    """
    files, folder = open_store(root)
    try:
        content = files.cat_file(f"{folder}/manifest.parquet")
    except Exception as error:  # each store raises other errors
        raise UserError(
            f"data.root: the manifest.parquet of {root!r} cannot be read ({type(error).__name__}: {error}); check the "
            "URL, the network and the credentials, and that the folder holds the output of prepare.py job=pack"
        ) from error
    target = cache / "remote" / sha256_text(root)[:16] / "manifest.parquet"
    if not target.is_file() or target.read_bytes() != content:
        write_atomically(target, lambda temporary: temporary.write_bytes(content))
    return target


def open_store(root: str) -> tuple[AbstractFileSystem, str]:
    """Return the store and the path of the folder in it. Raises UserError (`data.root`).

    fsspec keeps one store per process and thread, so a fork gets a new one, and threads should share one.
    """
    try:
        return fsspec.core.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"data.root: {root!r} cannot be opened ({error}); `make install-cloud` installs support for s3://"
        ) from error
