"""Recognise the layout of a collection. No other code needs to know the layout.

A layout is the files that determine the table of a collection, and how to read it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from data.layouts.folders import read_folder
from data.layouts.names import is_remote
from data.layouts.scan import Folder, TableChoice, scan_folder
from data.layouts.unused import Unused
from data.layouts.walk import check_root, find_manifest
from utils.record.logging import log


class Layout(NamedTuple):
    """files: what determines the table; none: all of the folder. read: reads the table of data/layouts/table.py."""

    files: list[Path]
    read: Callable[[], pa.Table]


def find_layout(root: str, cache: Path, unused: Unused, choice: TableChoice) -> Layout:
    """Return the layout of a collection: the first that fits. Fetched and unpacked files go to `cache`.

    Raises UserError (`data.root`).
    """
    if is_remote(root):
        from data.layouts.manifest import read_manifest
        from data.layouts.remote import fetch_manifest

        manifest = fetch_manifest(root, cache)
        return Layout([manifest], partial(read_manifest, None, manifest, unused, choice, cache))
    path = check_root(root)
    if manifest := find_manifest(path):
        from data.layouts.manifest import find_changed, read_listed

        if choice.table not in ("auto", "none"):
            log.warning(
                "data.table: %s is not read, because the manifest goes first; move it away to read the table: %s",
                choice.table, manifest,
            )  # fmt: skip
        find_changed(path, manifest)
        return Layout([manifest], partial(read_listed, path, manifest, unused, choice, cache))
    return open_folder(scan_folder(path, unused, choice), cache)


def open_folder(folder: Folder, cache: Path) -> Layout:
    """Return the layout of a folder without a manifest: its images, else its shards."""
    if folder.images or not folder.shards:
        return Layout([], partial(read_folder, folder))
    from data.layouts.shards import find_shards, read_shards

    files = find_shards(folder, cache)
    return Layout(list(files.values()), partial(read_shards, folder.root, files, folder.unused, folder.choice))
