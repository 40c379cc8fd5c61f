"""Jobs that exclude images from training: weight 0 and a reason in the manifest that job=manifest made.

A job's next call takes back what it excluded before and does not exclude now; job=manifest makes the manifest anew,
without reasons.
"""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from data.care.tool import Tool, list_files
from data.config import DataConfig
from data.manifest_formats import PARQUET, read_parquet
from data.manifest_writer import refuse_foreign, save_manifest
from data.scan import check_root
from data.table import replace_column
from utils.config.schema import PathText
from utils.errors import UserError


class Finder(Tool):
    """A job that finds images which are not to be trained on. report: of pages and lists. apply: exclude them."""

    report: PathText
    apply: bool

    def find(self, data: DataConfig) -> dict[str, str]:
        """Return the images, by path, and why. Raises UserError."""
        raise NotImplementedError

    def run(self, data: DataConfig) -> str:
        """List them, and exclude them where `apply` says so."""
        reasons = self.find(data)
        listing = list_files(self.report, self.name, reasons)
        if not self.apply:
            return f"{len(reasons):,} images would be excluded ({listing}); set job.apply=true to do it"
        return f"{exclude(check_root(data.root), self.name, reasons):,} images excluded ({listing})"


def read_own_manifest(root: Path) -> pa.Table:
    """Return the manifest that job=manifest made. Raises UserError (`data.root`) where there is none, or another."""
    if not (root / PARQUET).is_file():
        raise UserError(f"data.root: {str(root)!r} has no {PARQUET}; run prepare.py job=manifest first")
    refuse_foreign(root / PARQUET)
    return read_parquet(root / PARQUET)


def _read_reasons(table: pa.Table) -> list[str | None]:
    """Return why each row of a manifest has weight 0, None where it has not."""
    return table["reason"].to_pylist() if "reason" in table.column_names else [None] * len(table)


def excluded_by_others(root: Path, job: str) -> set[str]:
    """Return the images that the manifest excludes for another reason than this job's."""
    if not (root / PARQUET).is_file():
        return set()
    table = read_parquet(root / PARQUET)
    rows = zip(table["path"].to_pylist(), table["weight"].to_pylist(), _read_reasons(table))
    return {path for path, weight, why in rows if weight == 0 and why and not why.startswith(f"{job}: ")}


def exclude(root: Path, job: str, reasons: Mapping[str, str]) -> int:
    """Write weight 0 and the reason of each image into the manifest; return how many rows of this job have one."""
    table = read_own_manifest(root)
    weights, now, ours = [], [], 0
    for path, weight, before in zip(table["path"].to_pylist(), table["weight"].to_pylist(), _read_reasons(table)):
        is_ours = before is None or before.startswith(f"{job}: ")
        now.append(before if not is_ours else f"{job}: {reasons[path]}" if path in reasons else None)
        weights.append(0.0 if now[-1] else 1.0 if before else weight)
        ours += bool(is_ours and now[-1])
    table = replace_column(table, "weight", pa.array(weights, pa.float32()))
    table = replace_column(table, "reason", pa.array(now, pa.string()))
    save_manifest(root, table if any(now) else table.drop_columns("reason"), "write_manifest")
    return ours
