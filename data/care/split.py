"""Split a collection into training and validation so that every class and tag has its share on both sides.

Iterative stratification: the rarest label first, each of its images to the side that lacks it most.
Source: Sechidis, Tsoumakas and Vlahavas 2011, On the stratification of multi-label data, algorithm 1. Differs: what is
assigned is a group of near-duplicates, by its number of images; ties go to training.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.care.moves import find_parquet, plan_moves, write_journal
from data.care.work import Work
from data.manifest_formats import PARQUET, read_parquet
from data.manifest_writer import save_manifest
from data.table import count_values, replace_column
from utils.errors import UserError
from utils.io.files import link_or_copy, output_errors
from utils.record.logging import get_logger

log = get_logger(__name__)

_LABELS = ("label", "rating", "tags")
_SHOWN = 5  # labels whose share is farthest off


def split_images(work: Work) -> str:
    """Write a stratified split column into the manifest that job=manifest made, or say what it would be.

    Images of a test split stay there, and those of weight 0 in training. Raises UserError (`data.root`,
    `data.validation_fraction`).
    """
    fraction = work.data.validation_fraction
    if fraction == 0:
        raise UserError("data.validation_fraction: 0.0 leaves nothing to validate on; set the share, such as 0.05")
    manifest = find_parquet(work.root)
    table = None if manifest is None else read_parquet(manifest)
    if table is None or "group" not in table.column_names:
        raise UserError(
            f"data.root: {str(work.root)!r} has no {PARQUET} with the column group, which keeps near-duplicates on one "
            "side; run prepare.py job=manifest duplicates=true first"
        )
    rows = np.flatnonzero(pc.and_(pc.not_equal(table["split"], "test"), pc.greater(table["weight"], 0.0)).to_numpy())
    is_val = choose_validation(table.take(rows), fraction)
    splits = np.array([split if split == "test" else "train" for split in table["split"].to_pylist()], object)
    splits[rows[is_val]] = "val"
    line = f"{is_val.sum():,} of {len(rows):,} images for validation"
    if not work.apply:
        return f"{line}; set apply=true to write it into {PARQUET}"
    journal, moves = plan_moves(work, {PARQUET: line}, replaced=[PARQUET])
    with output_errors("trash", journal.parent):
        write_journal(journal, moves)
        link_or_copy(moves[0].source, moves[0].target)
    save_manifest(work.root, replace_column(table, "split", pa.array(splits, pa.string())), "write_manifest")
    return f"{line}; prepare.py job=undo source={journal} brings the old manifest back"


def choose_validation(table: pa.Table, fraction: float) -> np.ndarray:
    """Return which rows are for validation, bool [N], and log the labels whose share is farthest from `fraction`.

    table: its columns group, label, rating and tags.
    """
    own = -1 - np.arange(len(table))  # of a row without a group; groups are not negative
    groups = pc.coalesce(table["group"], pa.array(own)).to_numpy()
    _, units = np.unique(groups, return_inverse=True)
    names, pairs = [], []
    for column in _LABELS:
        values = table[column].combine_chunks()
        rows = np.arange(len(table))
        if pa.types.is_list(values.type):
            rows, values = pc.list_parent_indices(values).to_numpy(), pc.list_flatten(values)
        known = list(count_values(pa.chunked_array([values])))
        ids = pc.index_in(values, value_set=pa.array(known, pa.string())).fill_null(-1).to_numpy()
        pairs.append(np.stack([rows, ids + len(names)])[:, ids >= 0])
        names += [f"{column} {name}" for name in known]
    rows, labels = np.concatenate(pairs, axis=1)
    chosen = stratify(units[rows], labels, np.bincount(units), fraction)[units]
    totals, ours = np.bincount(labels, minlength=len(names)), np.bincount(labels[chosen[rows]], minlength=len(names))
    worst = np.argsort(-np.abs(ours - fraction * totals), kind="stable")[:_SHOWN]
    log.info("farthest off: %s", "; ".join(f"{names[i]} {ours[i]:,} of {totals[i]:,}" for i in worst))
    return chosen


def stratify(units: np.ndarray, labels: np.ndarray, sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Return which units are on the smaller side, bool [U].

    units, labels: int64 [n], a pair for each label of each image of a unit. sizes: images of each unit, int64 [U].
    """
    count = len(sizes)
    order = np.random.default_rng(0).permutation(count)  # in which the units of a label are assigned: the largest first
    order = order[np.argsort(-sizes[order], kind="stable")]
    width = int(labels.max(initial=-1)) + 1
    pairs, images = np.unique(np.argsort(order)[units] * width + labels, return_counts=True)
    units, labels = np.divmod(pairs, width)
    sizes = sizes[order]
    starts = np.searchsorted(units, np.arange(count + 1))
    by_label = units[np.argsort(labels, kind="stable")]
    ends = np.cumsum(np.bincount(labels, minlength=width))
    remaining = np.bincount(labels, images, width)
    shares = np.array([1 - fraction, fraction])
    wanted, room = shares[:, None] * remaining, shares * sizes.sum()
    side = np.full(count, -1)

    def assign(unit: int, desires: np.ndarray) -> None:
        """Put a unit on the side that lacks it most, first by `desires` [2], then by the images still to come."""
        choice = int((desires[1], room[1]) > (desires[0], room[0]))
        own = slice(starts[unit], starts[unit + 1])
        wanted[choice, labels[own]] -= images[own]
        remaining[labels[own]] -= images[own]
        room[choice] -= sizes[unit]
        side[unit] = choice

    while (remaining > 0).any():
        label = int(np.argmin(np.where(remaining > 0, remaining, np.inf)))
        for unit in by_label[ends[label - 1] if label else 0 : ends[label]]:
            if side[unit] < 0:
                assign(unit, wanted[:, label])
    for unit in np.flatnonzero(side < 0):  # without a label
        assign(unit, np.zeros(2))
    chosen = np.zeros(count, bool)
    chosen[order] = side == 1
    return chosen
