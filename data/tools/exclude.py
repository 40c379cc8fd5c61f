"""Jobs that change the manifest of job=manifest: filter, and duplicates beside this file, write weight 0 and a reason.

A `Finder` also restores images that an earlier call excluded and that it no longer finds. It refuses a manifest that
the user wrote.
"""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import Table

from data.collection.search import find_rows
from data.config import DataConfig
from data.layouts.manifest import refuse_foreign, save_manifest
from data.layouts.names import PARQUET
from data.layouts.table import replace_column
from data.layouts.tables import read_parquet
from data.layouts.walk import check_root, find_manifest
from data.load import load_collection
from data.tools.config import Filter, Finder
from data.tools.tool import list_files
from utils.errors import UserError
from utils.io.journal import open_journal


def exclude_found(job: Finder, data: DataConfig, reasons: Mapping[str, str]) -> str:
    """List images, and exclude them if `apply` is true. reasons: by path.

    Raises UserError (`data.root`) if the manifest of job=manifest is absent or foreign.
    """
    root = check_root(data.root)
    listing = list_files(job.report, job.name, reasons)
    if not job.apply:
        return f"{len(reasons):,} images would be excluded ({listing}); set job.apply=true to exclude them"
    with open_journal("data.root", root / PARQUET):
        file = find_manifest(root)
        if file is None:
            raise UserError(f"data.root: '{root}' has no {PARQUET}; run prepare.py job=manifest first")
        refuse_foreign(file)
        table, count = exclude(read_parquet(file), job.name, reasons)
        save_manifest(root, table)
    return f"{count:,} images excluded ({listing})"


def read_reasons(table: Table) -> list[str | None]:
    """Return the reason for weight 0 of each row of a manifest, or None."""
    if "reason" not in table.column_names:
        return [None] * len(table)
    return pc.if_else(pc.equal(table["weight"], 0.0), table["reason"], None).to_pylist()


def exclude(table: Table, job: str, reasons: Mapping[str, str]) -> tuple[Table, int]:
    """Return a manifest with weight 0 and a reason for each image, and how many rows `job` excludes now."""
    weights = []
    now = []
    for path, weight, before in zip(table["path"].to_pylist(), table["weight"].to_pylist(), read_reasons(table)):
        reason = before
        if before is None or before.startswith(f"{job}: "):
            reason = f"{job}: {reasons[path]}" if path in reasons else None
        now.append(reason)
        weights.append(weight if reason == before else float(reason is None))
    table = replace_column(table, "weight", pa.array(weights, pa.float32()))
    table = replace_column(table, "reason", pa.array(now, pa.string()))
    count = sum(reason.startswith(f"{job}: ") for reason in filter(None, now))
    return (table if any(now) else table.drop_columns("reason")), count


def filter_images(job: Filter, data: DataConfig) -> str:
    """Exclude the images that `job.find` finds. Raises UserError (`data.root`, `job.find`)."""
    reasons = {}
    if job.find is not None:
        collection = load_collection(data)
        rows = find_rows(collection, job.find, "job.find")
        reasons = dict.fromkeys(collection.table["path"].take(rows).to_pylist(), f"found by {job.find}")
    return exclude_found(job, data, reasons)
