"""Jobs that change the manifest of job=manifest: filter and duplicates write weight 0 and a reason, split the splits.

A `Finder` also restores images that an earlier call excluded and this one does not find. A manifest of the user's is
refused.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.collection.duplicates import group_duplicates
from data.collection.search import find_rows
from data.collection.split import assign_validation
from data.config import DataConfig
from data.layouts.manifest import find_manifest, refuse_foreign, save_manifest
from data.layouts.names import PARQUET
from data.layouts.table import SPLITS, TEST, TYPES, count_values, replace_column
from data.layouts.tables import read_parquet
from data.layouts.walk import check_root
from data.open import load_collection
from data.tools.measure import FileFacts, measure_files
from data.tools.tool import Tool, list_files, refuse_shards, save_report
from utils.config.schema import PathText, TermsText
from utils.errors import UserError
from utils.io.journal import open_journal

_TEXTS = ("caption", "tags", "label")


class Finder(Tool):
    """A job that finds images to exclude from training. report: the folder for reports. apply: exclude them."""

    report: PathText
    apply: bool

    def choose(self, data: DataConfig) -> tuple[dict[str, str], dict[str, int]]:
        """Return the reason for each image to exclude, and numbers of groups; both by path. Raises UserError."""
        raise NotImplementedError

    def run(self, data: DataConfig) -> str:
        """List the images, and exclude them if `apply` is true."""
        root = check_root(data.root)
        reasons, groups = self.choose(data)
        listing = list_files(self.report, self.name, reasons)
        if not self.apply:
            return f"{len(reasons):,} images would be excluded ({listing}); set job.apply=true to exclude them"
        with open_journal("data.root", root / PARQUET):
            table, count = exclude(read_own_manifest(root), self.name, reasons)
            if groups:
                known = table["group"].to_pylist() if "group" in table.column_names else [None] * len(table)
                now = [groups.get(path, number) for path, number in zip(table["path"].to_pylist(), known)]
                table = replace_column(table, "group", pa.array(now, TYPES["group"]))
            save_manifest(root, table)
        return f"{count:,} images excluded ({listing})"


def read_own_manifest(root: Path) -> pa.Table:
    """Return the manifest that job=manifest wrote. Raises UserError (`data.root`) if it is absent or foreign."""
    file = find_manifest(root)
    if file is None:
        raise UserError(f"data.root: {str(root)!r} has no {PARQUET}; run prepare.py job=manifest first")
    refuse_foreign(file)
    return read_parquet(file)


def _read_reasons(table: pa.Table) -> list[str | None]:
    """Return the reason for weight 0 of each row of a manifest, or None."""
    if "reason" not in table.column_names:
        return [None] * len(table)
    return pc.if_else(pc.equal(table["weight"], 0.0), table["reason"], None).to_pylist()


def exclude(table: pa.Table, job: str, reasons: Mapping[str, str]) -> tuple[pa.Table, int]:
    """Return a manifest with weight 0 and a reason for each image, and how many rows `job` excludes now."""
    weights = []
    now = []
    ours = 0
    for path, weight, before in zip(table["path"].to_pylist(), table["weight"].to_pylist(), _read_reasons(table)):
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

    def choose(self, data: DataConfig) -> tuple[dict[str, str], dict[str, int]]:
        """Return the images that are found. Raises UserError (`data.root`, `job.find`)."""
        if self.find is None:
            return {}, {}
        collection = load_collection(data)
        rows = find_rows(collection, self.find, "job.find")
        paths = collection.table["path"].take(rows).to_pylist()
        return dict.fromkeys(paths, f"found by {self.find}"), {}


class Duplicates(Finder):
    """Write a table of groups of duplicates, and exclude or list all images but one of each; write column `group`.

    One of the test split is kept before others, then the one with the most of caption, tags and label, of these the
    largest. No image of the test split is excluded. match: near: similar images,
    mirrored ones included; exact: equal bytes.
    """

    name: Literal["duplicates"]
    match: Literal["near", "exact"]

    def choose(self, data: DataConfig) -> tuple[dict[str, str], dict[str, int]]:
        """Return all images except one of each group. Raises UserError (`data.root`, `job.report`)."""
        root = check_root(data.root)
        table = load_collection(data).table
        refuse_shards(root, table)
        rows = table.select(["path", "size", "weight", "split", *_TEXTS]).to_pylist()
        found = {  # without images that other jobs exclude: a group must not keep one of those
            row["path"]: row for row, why in zip(rows, _read_reasons(table))
            if row["weight"] or not why or why.startswith(f"{self.name}: ")
        }  # fmt: skip
        facts = dict(zip(found, measure_files(root, list(found), data.max_pixels)))

        def rank(path: str) -> tuple[Any, ...]:  # tests first, then most texts, then most pixels, then most bytes
            texts = sum(bool(found[path][name]) for name in _TEXTS)
            is_other = found[path]["split"] != TEST
            return is_other, -texts, -(facts[path].width or 0) * (facts[path].height or 0), -found[path]["size"], path

        groups = [sorted(group, key=rank) for group in find_groups(facts, self.match)]
        numbers: dict[str, int] = {}
        reasons: dict[str, str] = {}
        rows = []
        for number, group in enumerate(groups, start=1):
            for path in group:
                width, height = facts[path].width, facts[path].height
                is_kept = path == group[0] or found[path]["split"] == TEST
                rows.append({"group": number, "path": path, "kept": is_kept, "width": width, "height": height})
                numbers[path] = -number  # negative, because the groups of job=manifest are hashes
                if not is_kept:
                    reasons[path] = f"a duplicate: {group[0]} is kept"
        figures = {"groups": len(groups), "images in them": len(rows)}
        save_report(Path(self.report) / self.name, str(root), figures, {"groups": rows}, {})
        return reasons, numbers


def find_groups(facts: dict[str, FileFacts], match: str) -> list[list[str]]:
    """Return the paths of each group with at least two images, the largest group first.

    match: near: similar by the perceptual hash, or equal bytes without a hash; exact: equal bytes.
    """
    keys: dict[str, int | str | None] = {path: fact.sha256 for path, fact in facts.items()}
    if match != "exact":
        hashed = [path for path, fact in facts.items() if fact.phash is not None]
        found = group_duplicates(np.array([facts[path].phash for path in hashed], np.int64))
        keys |= zip(hashed, found.tolist())
    members: dict[int | str, list[str]] = {}
    for path, key in keys.items():
        if key is not None:
            members.setdefault(key, []).append(path)
    return sorted((group for group in members.values() if len(group) > 1), key=lambda group: -len(group))


class Split(Tool):
    """Assign the split column of the manifest again, as job=manifest does; rows of a test split stay.

    apply: write it; False: only log the result.
    """

    name: Literal["split"]
    apply: bool

    def run(self, data: DataConfig) -> str:
        """Split. Raises UserError (`data.root`)."""
        root = check_root(data.root)
        with open_journal("data.root", root / PARQUET) if self.apply else nullcontext():
            table = read_own_manifest(root)
            ours = pc.if_else(pc.equal(table["split"], TEST), TEST, "train")
            table = assign_validation(replace_column(table, "split", ours), data.validation_fraction)
            counts = count_values(table["split"])
            line = ", ".join(f"{split}: {counts.get(split, 0):,}" for split in SPLITS)
            if not self.apply:
                return f"{line}; set job.apply=true to write it into the manifest"
            save_manifest(root, table)
            return line
