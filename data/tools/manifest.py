"""Write `manifest.parquet` for a folder (prepare.py job=manifest)."""

import os
from collections import Counter
from types import SimpleNamespace

import pyarrow as pa

from data.collection.collection import Row
from data.collection.index import CACHE
from data.collection.split import split_corrected
from data.config import DataConfig
from data.images.bytes import Shards
from data.images.measure import measure_files, measure_shards
from data.layouts.corrections import correct, read_corrections
from data.layouts.manifest import find_sizes, find_sources, refuse_foreign, save_manifest
from data.layouts.names import PARQUET, is_image_name
from data.layouts.recognise import open_folder
from data.layouts.scan import scan_folder
from data.layouts.table import SIDECARS, TYPES, count_values, replace_column, show_some
from data.layouts.unused import Unused, list_faults, say_unused
from data.layouts.walk import COPY, check_root, find_manifest
from data.tools.config import Manifest
from data.tools.duplicates import find_groups
from data.validity.groups import group_rows
from utils.io.journal import open_journal
from utils.io.memo import own_cache
from utils.record.logging import log

_DECODED = ("width", "height", "mode", "orientation", "transparent", "sharpness")  # columns of verify=true


def write_manifest(job: Manifest, data: DataConfig) -> str:
    """Write `manifest.parquet` into the folder.

    Raises UserError (`data.root`) as `read_folder` does, for a link out of the root, a folder that is not writable or
    whose manifest another command writes, and a manifest that this job did not write.
    """
    folder = check_root(data.root)
    with open_journal("data.root", folder / PARQUET, advice=COPY):
        if manifest := find_manifest(folder):
            refuse_foreign(manifest)
        sources = find_sources(folder)
        layout = open_folder(scan_folder(folder, unused := Unused(), data.choice()), own_cache(CACHE))
        table = list_faults(layout.read(), unused, data.on_bad_sidecar)
        say_unused(unused.describe(), said=unused.said)
        paths = table["path"].to_pylist()
        columns = {SIDECARS: [sources.get(path, "") for path in paths]}
        if layout.files:
            given = dict(zip(table.column_names, table.columns))
            contents = Shards(SimpleNamespace(root=folder, row=lambda row: Row(given, row)))
            facts = measure_shards(contents, len(table), data.max_pixels, decodes=job.verify)
            shards = zip(table["shard"].to_pylist(), paths)  # a Parquet file, and not its unpacked copy
            columns["shard"] = [path.rpartition("/")[0] if os.path.isabs(shard) else shard for shard, path in shards]
        else:
            find_sizes(folder, paths, "a manifest cannot name this image")
            facts = measure_files(folder, paths, data.max_pixels, decodes=job.verify)
        damaged = {path: fact for path, fact in zip(paths, facts) if fact.is_damaged}
        columns["weight"] = [0.0 if path in damaged else 1.0 for path in paths]
        if damaged:
            columns["reason"] = [f"unreadable: {fact.reason}" if fact.is_damaged else None for fact in facts]
        for name in ("sha256", *(_DECODED if job.verify else ())):
            columns[name] = [getattr(fact, name) for fact in facts]
        given = table["group"] if "group" in table.column_names else None
        if given is None and data.group != "none" and not layout.files:
            given, _ = group_rows(table, str(folder), data.group)
        if given is not None:
            columns["group"] = given.to_pylist()
        elif job.verify:
            groups = find_groups(dict(zip(paths, facts)), "near")
            numbers = {path: number for number, group in enumerate(groups) for path in group}
            columns["group"] = [numbers.get(path) for path in paths]
            largest = max(map(len, groups), default=0)
            log.info("near-duplicates: %d groups, the largest has %d images (column group)", len(groups), largest)
        for name, column in columns.items():
            table = replace_column(table, name, pa.array(column, TYPES.get(name, pa.string())))
        left = Unused()
        decisions = read_corrections(folder, left) if data.corrections else {}
        table = split_corrected(table, correct(table, decisions, left), data.validation_fraction)
        say_unused(left.describe())
        save_manifest(folder, table, {path: fact for path, fact in sources.items() if not is_image_name(path)})
    if damaged:
        kinds = Counter(fact.kind for fact in damaged.values()).most_common()
        log.warning(
            "%s of %s images are unreadable and get weight 0 (see the column reason): %s (%s); replace or remove them, "
            "then write the manifest again", f"{len(damaged):,}", f"{len(paths):,}",
            ", ".join(f"{kind}: {count:,}" for kind, count in kinds), show_some([*damaged]),
        )  # fmt: skip
    splits, labels, tags = (count_values(table[name]) for name in ("split", "label", "tags"))
    log.info("wrote %s: %s, %d classes, %d tags", folder / PARQUET, splits, len(labels), len(tags))
    return f"{len(table)} images, {len(damaged)} unreadable"
