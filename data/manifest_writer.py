"""Make `manifest.parquet` of a scanned folder (prepare.py job=manifest)."""

from collections import deque
from pathlib import Path
from typing import Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import model_validator

from data.care.tool import Tool
from data.config import DataConfig
from data.duplicates import group_duplicates
from data.facts import measure_files
from data.image_formats import DEFAULT_MAX_PIXELS
from data.inspection import UNREADABLE, ManifestReport, count_groups, count_kinds, count_traits, list_unreadable
from data.manifest import find_files, find_labels, find_manifest
from data.manifest_formats import PARQUET, read_parquet
from data.scan import check_root
from data.table import MEASURED, assign_validation, count_values, replace_column
from data.tags.posts import read_folder
from utils.canvas import DEFAULT
from utils.errors import UserError
from utils.io.files import write_atomically

# The Parquet metadata name the function that made a manifest, so that a user's own file is never overwritten.
_MAKER = b"atelier.made_by"
_DECODED = ("width", "height", "mode", "orientation", "transparent", "phash")  # columns that verify fills in


class Manifest(Tool):
    """Check the images of `data.root` and write its manifest.

    verify: decode every image; unreadable ones get weight 0. duplicates: find near-duplicates too, which needs verify.
    """

    name: Literal["manifest"]
    verify: bool
    duplicates: bool

    def run(self, data: DataConfig) -> str:
        """Write it. Raises UserError (`data.root`)."""
        report = write_manifest(
            data.root,
            validation_fraction=data.validation_fraction,
            verify=self.verify,
            duplicates=self.duplicates,
            max_pixels=data.max_pixels,
        )
        report.log(DEFAULT if data.background is None else data.background)
        return f"{report.rows} images, {len(report.unreadable)} unreadable"

    @model_validator(mode="after")
    def _decodes_for_duplicates(self) -> Self:
        if self.duplicates and not self.verify:
            raise ValueError("job.duplicates: true, and job.verify=false decodes no image; set job.verify=true")
        return self


def write_manifest(
    root: str,
    *,
    validation_fraction: float,
    verify: bool,
    duplicates: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> ManifestReport:
    """Scan a folder and write `manifest.parquet` into it, with the SHA-256 of every file.

    verify: decode every image too, and fill in the columns width and height, in pixels, of the upright image, mode,
    orientation, transparent and phash. One that is unreadable stays in the manifest with weight 0 and is reported, by
    name in `manifest.unreadable.jsonl`. A file that cannot even be opened is treated so in any case. duplicates: fill
    in group (data/duplicates.py) too, which needs verify.

    Raises UserError (`data.root`) as `read_folder` does, for a link out of the root, for a folder that cannot be
    written, and for a manifest already there that this function did not write.
    """
    folder = check_root(root)
    refuse_foreign(find_manifest(folder))
    table = read_folder(folder)
    refuse_foreign(find_labels(folder, table))
    paths = table["path"].to_pylist()
    deque(find_files(folder, table["path"], lambda path: "a manifest cannot name this image"), maxlen=0)
    facts = measure_files(folder, paths, max_pixels, "pixels" if verify else "hash")
    reasons = [fact.reason for fact in facts]
    table = replace_column(table, "sha256", pa.array([fact.sha256 for fact in facts], pa.string()))
    table = replace_column(
        table, "weight", pa.array([1.0 if reason is None else 0.0 for reason in reasons], pa.float32())
    )
    if any(reasons):
        why = [None if reason is None else f"unreadable: {reason}" for reason in reasons]
        table = replace_column(table, "reason", pa.array(why, pa.string()))
    if verify:
        for name in _DECODED:
            table = replace_column(table, name, pa.array([getattr(fact, name) for fact in facts], MEASURED[name]))
    if duplicates:
        hashes = table["phash"].combine_chunks()
        groups = pa.array(group_duplicates(hashes.drop_null().to_numpy()), MEASURED["group"])
        table = replace_column(table, "group", pc.replace_with_mask(hashes, hashes.is_valid(), groups))
    table = assign_validation(table, validation_fraction)
    unreadable = [(path, reason) for path, reason in zip(paths, reasons) if reason is not None]
    counts = [count_values(table[name]) for name in ("split", "label", "tags")]
    return ManifestReport(
        save_manifest(folder, table, "write_manifest"),
        table.num_rows,
        *counts,
        unreadable,
        count_kinds(facts),
        count_traits(paths, facts),
        list_unreadable(folder / UNREADABLE, unreadable),
        count_groups(table["group"]) if duplicates else None,
    )


def save_manifest(root: Path, table: pa.Table, maker: str) -> Path:
    """Write a table as the root's `manifest.parquet`, atomically, and return its path.

    Only what the maker "write_manifest" wrote is ever overwritten by it. Raises UserError (`data.root`) where the
    folder is not writable.
    """
    table = table.replace_schema_metadata({_MAKER: maker.encode()})
    try:
        write_atomically(root / PARQUET, lambda file: pq.write_table(table, file, compression="zstd"))
    except PermissionError as error:
        raise UserError(f"data.root: {str(root)!r} is not writable, so {PARQUET} cannot be made there") from error
    return root / PARQUET


def refuse_foreign(file: Path | None) -> None:
    """Raise UserError for a manifest that `write_manifest` did not make."""
    if file is None:
        return
    made_by = (read_parquet(file).schema.metadata or {}).get(_MAKER) if file.name == PARQUET else None
    if made_by != b"write_manifest":
        raise UserError(
            f"data.root: {str(file)!r} was not made from this folder and is not overwritten; it is read as it is. To "
            "have one made from the folder, move it away"
        )
