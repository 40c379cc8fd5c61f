"""Sidecars that changed after job=manifest has read them: count them at the start, or read them again."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc

from data.layouts.folders import POSTS, is_image_name, read_folder, walk_folders
from data.layouts.huggingface import TABLES
from data.layouts.manifest import PARQUET, find_manifest, read_parquet, refuse_foreign, save_manifest, scanned_at
from data.layouts.sidecars import SUFFIXES, list_faults, pair_sidecars
from data.layouts.table import TAG_LISTS, replace_column, show_some, take_rows
from data.layouts.unused import Unused
from utils.errors import UserError
from utils.io.journal import open_journal
from utils.record.logging import get_logger

log = get_logger(__name__)

_COPIED_NS = 60 * 10**9  # a manifest whose ctime is so much later than its mtime was copied with its times
_PATIENCE_SEC = 600  # for another command that writes the manifest, such as a job that starts together with this one
_READ_AGAIN = ("label", *TAG_LISTS, "rating", "caption", "id")


def find_newer(root: Path, manifest: Path) -> list[str]:
    """Return and log the sidecars that changed after job=manifest has read them; none for another manifest."""
    if (scanned := scanned_at(manifest)) is None:
        return []
    status, newer = manifest.stat(), []
    was_copied = status.st_ctime_ns - status.st_mtime_ns > _COPIED_NS  # then a sidecar's ctime is the time of the copy
    for folder, entries, names in walk_folders(root, Unused()):
        changed = set()
        for entry in entries:
            if entry.name.lower().endswith(SUFFIXES) or entry.name in (*TABLES, *POSTS):
                with suppress(OSError):
                    times = entry.stat()
                    if max(times.st_mtime_ns, 0 if was_copied else times.st_ctime_ns) > scanned:
                        changed.add(folder + entry.name)
        if changed:
            _, orphans = pair_sidecars(folder, filter(is_image_name, names), names)
            newer += sorted(changed.difference(orphans))
    if newer:
        log.warning(
            "data.root: %s sidecars are newer than %s and are not read: %s; data.manifest=refresh reads them again",
            f"{len(newer):,}", manifest.name, show_some(newer),
        )  # fmt: skip
    return newer


def refresh_manifest(root: Path, cache: Path, on_bad_sidecar: Literal["stop", "skip"]) -> None:
    """Read the sidecars of the images in a manifest of job=manifest again, and replace it. All else stays.

    cache: for the list of sidecars that cannot be read. Raises UserError (`data.manifest`, `data.on_bad_sidecar`).
    """
    if (manifest := find_manifest(root)) is None:
        raise UserError(f"data.manifest: refresh, but {str(root)!r} has no manifest; set keep, or run job=manifest")
    with open_journal("data.root", root / PARQUET, patience_sec=_PATIENCE_SEC):
        refuse_foreign(manifest)
        scanned, folder = time.time_ns(), read_folder(root, unused := Unused())
        folder, table = list_faults(folder, cache, unused, on_bad_sidecar), read_parquet(manifest)
        rows = pc.index_in(table["path"], value_set=folder["path"].combine_chunks())
        fresh = take_rows(folder, rows.combine_chunks())
        for name in _READ_AGAIN:
            if name in fresh.column_names:
                table = replace_column(table, name, fresh[name])
            elif name in table.column_names:
                table = table.drop_columns(name)
        if added := len(folder) - (len(table) - rows.null_count):
            log.warning("data.root: %s images are not in %s; job=manifest adds them", f"{added:,}", manifest.name)
        save_manifest(root, table, scanned_ns=scanned)
