"""Jobs that change the manifest of job=manifest: filter, and duplicates beside this file, write weight 0 and a reason.

A `Finder` also restores images that an earlier call excluded and this one does not find. A manifest of the user's is
refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from data.collection.search import find_rows
from data.config import DataConfig
from data.layouts.manifest import find_manifest, refuse_foreign, save_manifest
from data.layouts.names import PARQUET
from data.layouts.table import replace_column
from data.layouts.tables import read_parquet
from data.layouts.walk import check_root
from data.open import load_collection
from data.tools.tool import Tool, list_files
from utils.config.schema import PathText, TermsText
from utils.errors import UserError
from utils.io.journal import open_journal


class Finder(Tool):
    """A job that finds images to exclude from training. report: the folder for reports. apply: exclude them."""

    report: PathText
    apply: bool

    def choose(self, data: DataConfig) -> dict[str, str]:
        """Return the reason for each image to exclude, by path. Raises UserError."""
        raise NotImplementedError

    def run(self, data: DataConfig) -> str:
        """List the images, and exclude them if `apply` is true."""
        root = check_root(data.root)
        reasons = self.choose(data)
        listing = list_files(self.report, self.name, reasons)
        if not self.apply:
            return f"{len(reasons):,} images would be excluded ({listing}); set job.apply=true to exclude them"
        with open_journal("data.root", root / PARQUET):
            table, count = exclude(read_own_manifest(root), self.name, reasons)
            save_manifest(root, table)
        return f"{count:,} images excluded ({listing})"


def read_own_manifest(root: Path) -> pa.Table:
    """Return the manifest that job=manifest wrote. Raises UserError (`data.root`) if it is absent or foreign."""
    file = find_manifest(root)
    if file is None:
        raise UserError(f"data.root: {str(root)!r} has no {PARQUET}; run prepare.py job=manifest first")
    refuse_foreign(file)
    return read_parquet(file)


def read_reasons(table: pa.Table) -> list[str | None]:
    """Return the reason for weight 0 of each row of a manifest, or None."""
    if "reason" not in table.column_names:
        return [None] * len(table)
    return pc.if_else(pc.equal(table["weight"], 0.0), table["reason"], None).to_pylist()


def exclude(table: pa.Table, job: str, reasons: Mapping[str, str]) -> tuple[pa.Table, int]:
    """Return a manifest with weight 0 and a reason for each image, and how many rows `job` excludes now."""
    weights = []
    now = []
    ours = 0
    for path, weight, before in zip(table["path"].to_pylist(), table["weight"].to_pylist(), read_reasons(table)):
        reason = before
        if before is None or before.startswith(f"{job}: "):
            reason = f"{job}: {reasons[path]}" if path in reasons else None
            ours += reason is not None
        if reason is not None:
            weight = 0.0
        elif before is not None:
            weight = 1.0  # restored
        now.append(reason)
        weights.append(weight)
    table = replace_column(table, "weight", pa.array(weights, pa.float32()))
    table = replace_column(table, "reason", pa.array(now, pa.string()))
    return (table if any(now) else table.drop_columns("reason")), ours


class Filter(Finder):
    """Exclude or list the images that terms find (data/collection/search.py); null: restore earlier ones."""

    name: Literal["filter"]
    find: TermsText | None

    def choose(self, data: DataConfig) -> dict[str, str]:
        """Return the images that are found. Raises UserError (`data.root`, `job.find`)."""
        if self.find is None:
            return {}
        collection = load_collection(data)
        rows = find_rows(collection, self.find, "job.find")
        paths = collection.table["path"].take(rows).to_pylist()
        return dict.fromkeys(paths, f"found by {self.find}")
