"""Write `manifest.parquet` for a folder (prepare.py job=manifest)."""

import time
from collections import Counter
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from data.collection.duplicates import group_duplicates
from data.collection.split import assign_validation
from data.config import DataConfig
from data.layouts.folders import check_root, read_folder
from data.layouts.manifest import PARQUET, find_manifest, find_sizes, refuse_foreign, save_manifest
from data.layouts.sidecars import list_faults
from data.layouts.table import MEASURED, count_values, replace_column
from data.layouts.unused import Unused, warn_unused
from data.open import CACHE
from data.tools.facts import measure_files
from data.tools.tool import Tool
from utils.record.logging import get_logger

log = get_logger(__name__)

_DECODED = ("width", "height", "mode", "orientation", "transparent", "phash")  # columns of verify=true
_NAMED = 20  # unreadable images in the log


class Manifest(Tool):
    """Check the images of `data.root` and write a manifest with the SHA-256 of every file.

    verify: decode every image and fill in the columns _DECODED. Damaged images get weight 0 and a reason; without
    verify, only files that cannot be opened. duplicates: verify, and fill in group (see `group_duplicates`).
    """

    name: Literal["manifest"]
    verify: bool
    duplicates: bool

    def run(self, data: DataConfig) -> str:
        """Write the manifest. Raises UserError (`data.root`)."""
        table = self.write(data)
        reasons: dict[str, str] = {}
        if "reason" in table.column_names:
            reasons = {row["path"]: row["reason"] for row in table.to_pylist() if row["reason"]}
            for path in list(reasons)[:_NAMED]:
                log.warning("%s: %s", path, reasons[path])
            kinds = Counter(reason.removeprefix("unreadable: ").split(" (")[0] for reason in reasons.values())
            log.warning(
                "%s of %s images are unreadable and get weight 0 (see the column reason): %s; replace or remove them, "
                "then write the manifest again", f"{len(reasons):,}", f"{len(table):,}",
                ", ".join(f"{kind}: {count:,}" for kind, count in kinds.most_common()),
            )  # fmt: skip
        if self.duplicates:
            sizes = [count for count in Counter(table["group"].drop_null().to_pylist()).values() if count > 1]
            log.info(
                "%s of %s images are near-duplicates, mirrored ones included: %s groups, the largest has %s (column "
                "group)", f"{sum(sizes):,}", f"{len(table):,}", f"{len(sizes):,}", f"{max(sizes, default=0):,}",
            )  # fmt: skip
        splits, labels, tags = (count_values(table[name]) for name in ("split", "label", "tags"))
        log.info("wrote %s: %s, %d classes, %d tags", Path(data.root) / PARQUET, splits, len(labels), len(tags))
        return f"{len(table)} images, {len(reasons)} unreadable"

    def write(self, data: DataConfig) -> pa.Table:
        """Write `manifest.parquet` into the folder and return it.

        Raises UserError (`data.root`) as `read_folder` does, for a link out of the root, for a folder that is not
        writable, and for an existing manifest that this job did not write.
        """
        folder, verify = check_root(data.root), self.verify or self.duplicates
        if (manifest := find_manifest(folder)) is not None:
            refuse_foreign(manifest)
        scanned_ns, table = time.time_ns(), read_folder(folder, unused := Unused())
        table = list_faults(table, CACHE, unused, data.on_bad_sidecar)
        warn_unused(unused.describe())
        paths = table["path"].to_pylist()
        find_sizes(folder, paths, "a manifest cannot name this image")
        facts = measure_files(folder, paths, data.max_pixels, decodes=verify)
        columns = {
            "sha256": pa.array([fact.sha256 for fact in facts], pa.string()),
            "weight": pa.array([0.0 if fact.is_damaged else 1.0 for fact in facts], pa.float32()),
        }
        if any(fact.is_damaged for fact in facts):
            reasons = [f"unreadable: {fact.reason}" if fact.is_damaged else None for fact in facts]
            columns["reason"] = pa.array(reasons, pa.string())
        if verify:
            columns |= {name: pa.array([getattr(fact, name) for fact in facts], MEASURED[name]) for name in _DECODED}
        if self.duplicates:
            hashes = columns["phash"]
            groups = pa.array(group_duplicates(hashes.drop_null().to_numpy()), MEASURED["group"])
            columns["group"] = pc.replace_with_mask(hashes, hashes.is_valid(), groups)
        for name, column in columns.items():
            table = replace_column(table, name, column)
        table = assign_validation(table, data.validation_fraction)
        save_manifest(folder, table, scanned_ns=scanned_ns)
        return table
