"""Choose the validation split: the one of the collection, or a share of its training rows; count what splits share."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray
from pyarrow import Table

from data.layouts.table import SPLITS, TEST, replace_column, show_some
from utils.record.logging import log

Share = float | Literal["auto"] | list[int]  # of the images, for validation; [2, 5]: the second of five folds
FINGERPRINTS = ("group", "sha256")  # columns in which equal or similar images agree
# `data.validation_fraction=auto`: a tenth. A tenth of fewer images measures next to nothing, and training needs it.
_FRACTION = 0.1
_LEAST_IMAGES = 100


def assign_validation(table: Table, fraction: Share) -> Table:
    """Return a table with a validation split, and log what was done. Test rows stay test rows.

    Without a validation split, `fraction` of the training rows becomes one; `auto` takes none from a small collection.
    A fold replaces a validation split.
    """
    if isinstance(fraction, list):
        return _assign_fold(table, *fraction)
    chosen = np.zeros(len(table), bool)
    # Rows of weight 0 are never read; they stay in training.
    is_read = pc.and_(pc.not_equal(table["split"], TEST), pc.not_equal(table["weight"], 0.0)).to_numpy()
    if fraction == 0 or not is_read.any() or "val" in table["split"].unique().to_pylist():
        return table
    if fraction == "auto" and is_read.sum() < _LEAST_IMAGES:
        log.info(
            "data.root: all %s images are for training: below %d none is taken for validation, unless "
            "data.validation_fraction=%s or a folder val/ asks for it", is_read.sum(), _LEAST_IMAGES, _FRACTION,
        )  # fmt: skip
        return table
    fraction = _FRACTION if fraction == "auto" else fraction
    chosen[is_read] = _choose(table.filter(pa.array(is_read)), fraction)
    log.info(
        "data.root: no validation split; split off %s of %s images: of each class %g (data.validation_fraction), at "
        "least one, but none of a single image or group", f"{chosen.sum():,}", f"{is_read.sum():,}", fraction,
    )  # fmt: skip
    return replace_column(table, "split", pc.if_else(pa.array(chosen), "val", table["split"]))


def split_corrected(table: Table, corrected: Table, fraction: Share) -> Table:
    """Return a corrected table with the splits of `table`, which has no corrections.

    A first label, and a group, count as if `table` had them. Other corrections move no image to another split.
    """
    table = replace_column(table, "label", pc.coalesce(table["label"], corrected["label"]))
    if "group" in corrected.column_names:
        table = replace_column(table, "group", corrected["group"])
    return replace_column(corrected, "split", assign_validation(table, fraction)["split"])


def _choose(table: Table, fraction: float) -> ndarray:
    """Return the validation rows of a table that is sorted by path, bool [N].

    A class of n images gives round(fraction * n) images (halves up), at least 1 and at most n - 1: the ones with the
    lowest path hashes. The choice in a class does not depend on other classes, and an added image moves at most one
    other. A class with a single image keeps it for training, with a warning. Images without a label are chosen by
    their `id` if the table has that column (the highest id % 1000, from 950 for 0.05), unless these are fewer than half
    of `fraction`; else if their path hash is in the lowest `fraction` of all hashes. Rows of one `group` stay together:
    the first one decides. Images without a label leave neither split empty: the lowest hash goes to validation, or the
    highest to training.
    """
    names = pc.unique(table["label"]).drop_null()
    labels = pc.index_in(table["label"], value_set=names).fill_null(-1).to_numpy()
    hashes = hash_paths(table["path"])
    chosen = hashes < np.uint64(fraction * 2**64)
    if "id" in table.column_names and pa.types.is_integer(table["id"].type):
        has_id = pc.is_valid(table["id"]).to_numpy()
        by_id = table["id"].fill_null(0).to_numpy() % 1000 >= round(1000 * (1 - fraction))
        # Ids in a row, as of a collection that was numbered, may have none of these.
        if by_id.sum() >= fraction * has_id.sum() / 2:
            chosen = np.where(has_id, by_id, chosen)
    leads = lead_rows(table)
    is_lead = leads == np.arange(len(table))
    rows, ranks, sizes = rank_by_hash(np.flatnonzero(is_lead & (labels >= 0)), labels, hashes)
    chosen[rows] = ranks < np.where(
        sizes > 1, np.clip(np.floor(fraction * sizes + 0.5), 1, np.maximum(sizes - 1, 1)), 0
    )
    free = np.flatnonzero(is_lead & (labels < 0))
    if len(free) and not chosen[is_lead].any():
        chosen[free[hashes[free].argmin()]] = is_lead.sum() > 1
    elif len(free) and chosen[is_lead].all():
        chosen[free[hashes[free].argmax()]] = False
    if single := sorted(names.take(pa.array(labels[rows[sizes == 1]])).to_pylist()):
        log.warning(
            "data.root: %d classes have a single image (of weight above 0), which stays in training: %s; add a second "
            "image to each class, or remove it",
            len(single), show_some(single),
        )  # fmt: skip
    return chosen[leads]


def _assign_fold(table: Table, number: int, count: int) -> Table:
    """Return a table whose validation split is every n-th row by class and path hash; groups stay together.

    A class of one group stays in training.
    """
    leads = lead_rows(table)
    labels = pc.rank(table["label"], tiebreaker="dense").to_numpy()
    is_split = np.bincount(labels[np.unique(leads)])[labels] > 1
    places = np.argsort(np.lexsort((hash_paths(table["path"]), labels)))
    split = np.where((is_split & (places % count == number - 1))[leads], "val", "train")
    return replace_column(table, "split", pc.if_else(pc.equal(table["split"], TEST), TEST, pa.array(split)))


def rank_by_hash(rows: ndarray, classes: ndarray, hashes: ndarray) -> tuple[ndarray, ...]:
    """Return rows by class and hash, the rank of each in its class, and how many are in it; each [n].

    classes, hashes: of all rows, [N].
    """
    rows = rows[np.lexsort((hashes[rows], classes[rows]))]
    first, end = (np.searchsorted(classes[rows], classes[rows], side) for side in ("left", "right"))
    return rows, np.arange(len(rows)) - first, end - first


def hash_paths(paths: pa.ChunkedArray) -> ndarray:
    """Return a hash of each path, uint64 [N]."""
    digests = b"".join(hashlib.sha256(path.encode()).digest()[:8] for path in paths.to_pylist())
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def lead_rows(table: Table, prints: Sequence[str] = ("group",)) -> ndarray:
    """Return the first row of each row's group of near-duplicates, or the row itself, int64 [N].

    prints: columns that may name the group; the first column with a value does.
    """
    rows = np.arange(len(table))
    for name in prints:
        if name in table.column_names and table[name].null_count < len(table):
            first = pc.index_in(table[name], value_set=table[name].combine_chunks(), skip_nulls=True)
            return np.where(first.is_valid(), first.fill_null(0), rows)
    return rows


def exclude_twins(table: Table) -> Table:
    """Return a table whose training images have weight 0 if they equal or resemble an image of another split."""
    leads = lead_rows(table, FINGERPRINTS)
    is_train = pc.equal(table["split"], SPLITS[0]).to_numpy()
    is_twin = is_train & np.isin(leads, leads[~is_train])
    return replace_column(table, "weight", pc.if_else(pa.array(is_twin), np.float32(0), table["weight"]))


def count_twins(table: Table) -> dict[str, int]:
    """Return how many images of `val` and of `test` have an equal or similar image in training, without weight 0."""
    table = table.filter(pc.not_equal(table["weight"], 0.0))
    leads = lead_rows(table, FINGERPRINTS)
    train, *others = (leads[pc.equal(table["split"], split).to_numpy()] for split in SPLITS)
    return {split: int(np.isin(rows, train).sum()) for split, rows in zip(SPLITS[1:], others)}
