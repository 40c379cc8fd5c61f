"""Fill the cache on disk ahead of training (prepare.py job=warm_cache)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data.cache.disk import DiskCached
from data.cache.store import close_stores
from data.image_formats import UnreadableImage
from data.rows import spread
from utils.ranks.processes import map_items

_SAMPLED = 200  # images that a size is estimated from


class Warmed(NamedTuple):
    """How many rows were in the cache, were added, and are unreadable; evicted: records that had to go meanwhile."""

    there: int
    added: int
    unreadable: int
    evicted: int


def warm_cache(source: DiskCached, rows: np.ndarray, progress: Callable[[int, int], None]) -> Warmed:
    """Put the images of some rows into the cache, in one process per core; what is there is not decoded again."""
    fill, items = functools.partial(_fill, source), rows.tolist()
    results = map_items(fill, items, _fatal_row)
    counts = dict.fromkeys(("there", "added", "unreadable"), 0)
    for done, result in enumerate(results, start=1):
        counts[result] += 1
        progress(done, len(items))
    close_stores()  # which writes what this process has waiting
    return Warmed(**counts, evicted=source.counts.totals()["evicted"])


def estimate_missing(source: DiskCached, rows: np.ndarray) -> tuple[int, int]:
    """Return how many rows are not in the cache, and about how many bytes they will take there."""
    missing = np.array([row for row in rows.tolist() if not source.has(row)], dtype=np.int64)
    sizes = []
    for row in spread(missing, _SAMPLED).tolist():
        try:
            sizes.append(source.stored_bytes(row))
        except UnreadableImage:  # a training run, and job=manifest, name it
            sizes.append(0)
    return len(missing), round(len(missing) * float(np.mean(sizes or [0])))


def _fill(source: DiskCached, row: int) -> str:
    if source.has(row):
        return "there"
    try:
        source.fill(row)
    except UnreadableImage:  # a training run, and job=manifest, name it
        return "unreadable"
    return "added"


def _fatal_row(row: int) -> str:
    return "unreadable"
