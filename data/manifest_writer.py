"""Make `manifest.parquet` of a scanned folder (prepare.py job=manifest)."""

from collections import Counter
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import model_validator

from data.care.tool import Tool
from data.config import DataConfig
from data.duplicates import group_duplicates
from data.facts import measure_files
from data.image_formats import DEFAULT_MAX_PIXELS
from data.manifest import PARQUET, find_manifest, find_sizes, read_parquet
from data.scan import check_root
from data.split import assign_validation
from data.table import MEASURED, count_values, replace_column
from data.tags.posts import read_folder
from utils.canvas import DEFAULT
from utils.errors import UserError
from utils.io.files import write_atomically
from utils.record.logging import get_logger

log = get_logger(__name__)

# The Parquet metadata name the function that made a manifest, so that a user's own file is never overwritten.
_MAKER = b"atelier.made_by"
_DECODED = ("width", "height", "mode", "orientation", "transparent", "phash")  # columns that verify fills in
_NAMED = 20  # unreadable images in the log


class Manifest(Tool):
    """Check the images of `data.root` and write its manifest.

    verify: decode every image; unreadable ones get weight 0. duplicates: find near-duplicates too, which needs verify.
    """

    name: Literal["manifest"]
    verify: bool
    duplicates: bool

    def run(self, data: DataConfig) -> str:
        """Write it. Raises UserError (`data.root`)."""
        table = write_manifest(
            data.root,
            validation_fraction=data.validation_fraction,
            verify=self.verify,
            duplicates=self.duplicates,
            max_pixels=data.max_pixels,
        )
        unreadable = _log_reasons(table)
        _log_conversions(table, DEFAULT if data.background is None else data.background)
        if self.duplicates:
            sizes = [count for count in Counter(table["group"].drop_null().to_pylist()).values() if count > 1]
            log.info(
                "%s of %s images are near-duplicates of others, some mirrored: %s groups, the largest of %s (column "
                "group)", f"{sum(sizes):,}", f"{len(table):,}", f"{len(sizes):,}", f"{max(sizes, default=0):,}",
            )  # fmt: skip
        splits, labels, tags = (count_values(table[name]) for name in ("split", "label", "tags"))
        log.info("wrote %s: %s, %d classes, %d tags", Path(data.root) / PARQUET, splits, len(labels), len(tags))
        return f"{len(table)} images, {unreadable} unreadable"

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
) -> pa.Table:
    """Scan a folder and write `manifest.parquet` into it, with the SHA-256 of every file; return it.

    verify: decode every image too, and fill in the columns width and height, in pixels, of the upright image, mode,
    orientation, transparent and phash. One that is unreadable stays in the manifest with weight 0 and a reason. A file
    that cannot even be opened is treated so in any case. duplicates: fill in group (data/duplicates.py) too, which
    needs verify.

    Raises UserError (`data.root`) as `read_folder` does, for a link out of the root, for a folder that cannot be
    written, and for a manifest already there that this function did not write.
    """
    folder = check_root(root)
    refuse_foreign(find_manifest(folder))
    table = read_folder(folder)
    paths = table["path"].to_pylist()
    find_sizes(folder, paths, "a manifest cannot name this image")
    facts = measure_files(folder, paths, max_pixels, "pixels" if verify else "hash")
    reasons = [fact.reason for fact in facts]
    columns = {
        "sha256": pa.array([fact.sha256 for fact in facts], pa.string()),
        "weight": pa.array([1.0 if reason is None else 0.0 for reason in reasons], pa.float32()),
    }
    if any(reasons):
        columns["reason"] = pa.array([reason and f"unreadable: {reason}" for reason in reasons], pa.string())
    if verify:
        columns |= {name: pa.array([getattr(fact, name) for fact in facts], MEASURED[name]) for name in _DECODED}
    if duplicates:
        hashes = columns["phash"]
        groups = pa.array(group_duplicates(hashes.drop_null().to_numpy()), MEASURED["group"])
        columns["group"] = pc.replace_with_mask(hashes, hashes.is_valid(), groups)
    for name, column in columns.items():
        table = replace_column(table, name, column)
    table = assign_validation(table, validation_fraction)
    save_manifest(folder, table, "write_manifest")
    return table


def save_manifest(root: Path, table: pa.Table, maker: str) -> None:
    """Write a table as the root's `manifest.parquet`, atomically.

    Only what the maker "write_manifest" wrote is ever overwritten by it. Raises UserError (`data.root`) where the
    folder is not writable.
    """
    table = table.replace_schema_metadata({_MAKER: maker.encode()})
    try:
        write_atomically(root / PARQUET, lambda file: pq.write_table(table, file, compression="zstd"))
    except PermissionError as error:
        raise UserError(f"data.root: {str(root)!r} is not writable, so {PARQUET} cannot be made there") from error


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


def _log_reasons(table: pa.Table) -> int:
    """Log the first unreadable images, and how many there are by kind; return their number."""
    if "reason" not in table.column_names:
        return 0
    rows = table.filter(table["reason"].is_valid()).select(["path", "reason"]).to_pylist()
    for row in rows[:_NAMED]:
        log.warning("%s: %s", row["path"], row["reason"])
    kinds = Counter(row["reason"].removeprefix("unreadable: ").split(" (")[0] for row in rows)
    log.warning(
        "%s of %s images are unreadable and weigh 0 (the column reason says why): %s; replace or remove them, then "
        "make the manifest again", f"{len(rows):,}", f"{len(table):,}",
        ", ".join(f"{kind}: {count:,}" for kind, count in kinds.most_common()),
    )  # fmt: skip
    return len(rows)


def _log_conversions(table: pa.Table, background: Any) -> None:
    """Log how many images are read otherwise than their owner may expect, each kind with an example."""
    if "mode" not in table.column_names:
        return
    kinds = {
        "CMYK, converted to RGB without an ink profile": pc.equal(table["mode"], "CMYK"),
        "16 bits per channel, scaled to 8": pc.starts_with(table["mode"], "I"),
        "rotated upright, as EXIF says": pc.greater(table["orientation"], 1),
        f"transparent, placed on data.background ({background})": pc.equal(table["transparent"], 1),
    }
    for kind, is_so in kinds.items():
        paths = table["path"].filter(is_so)
        if len(paths):
            log.info("%s images are %s (such as %s)", f"{len(paths):,}", kind, paths[0].as_py())
