"""Exclude images from training: weight 0 and a reason in the manifest that job=manifest made. No file is touched.

    line = exclude(root, "filter", {"a/1.png": "too few tags: 2"})

A job's next call takes back what it excluded before and does not exclude now; job=manifest makes the manifest anew,
without reasons.
"""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from data.care.tool import ReportingTool
from data.config import DataConfig
from data.manifest_formats import PARQUET, read_parquet
from data.manifest_writer import refuse_foreign, save_manifest
from data.scan import check_root
from data.table import replace_column
from utils.errors import UserError


class ExcludingTool(ReportingTool):
    """A job that finds images which are not to be trained on. apply: exclude them; False: list them."""

    apply: bool

    def exclude(self, data: DataConfig, reasons: Mapping[str, str]) -> str:
        """List images and why, and exclude them where `apply` says so; return a line for the log."""
        listing = self.list_files(reasons)
        if not self.apply:
            return f"{len(reasons):,} images would be excluded ({listing}); set job.apply=true to do it"
        return f"{exclude(check_root(data.root), self.name, reasons):,} images excluded ({listing})"


def read_own_manifest(root: Path) -> pa.Table:
    """Return the manifest that job=manifest made. Raises UserError (`data.root`) where there is none, or another."""
    if not (root / PARQUET).is_file():
        raise UserError(f"data.root: {str(root)!r} has no {PARQUET}; run prepare.py job=manifest first")
    refuse_foreign(root / PARQUET)
    return read_parquet(root / PARQUET)


def excluded_by_others(root: Path, job: str) -> set[str]:
    """Return the images that the manifest gives weight 0 for another reason than this job's."""
    if not (root / PARQUET).is_file():
        return set()
    table = read_parquet(root / PARQUET)
    reasons = table["reason"].to_pylist() if "reason" in table.column_names else [None] * len(table)
    rows = zip(table["path"].to_pylist(), table["weight"].to_pylist(), reasons)
    return {path for path, weight, why in rows if weight == 0 and why and not why.startswith(f"{job}: ")}


def exclude(root: Path, job: str, reasons: Mapping[str, str]) -> int:
    """Write weight 0 and the reason of each image into the manifest; return how many rows of this job have one."""
    table = read_own_manifest(root)
    before = table["reason"].to_pylist() if "reason" in table.column_names else [None] * len(table)
    now = []
    for path, reason in zip(table["path"].to_pylist(), before):
        is_ours = reason is None or reason.startswith(f"{job}: ")
        now.append((f"{job}: {reasons[path]}" if path in reasons else None) if is_ours else reason)
    weights = [
        0.0 if reason is not None else 1.0 if old is not None else weight
        for weight, old, reason in zip(table["weight"].to_pylist(), before, now)
    ]
    table = replace_column(table, "weight", pa.array(weights, pa.float32()))
    table = replace_column(table, "reason", pa.array(now, pa.string()))
    save_manifest(root, table if any(now) else table.drop_columns("reason"), "write_manifest")
    return sum(reason is not None and reason.startswith(f"{job}: ") for reason in now)
