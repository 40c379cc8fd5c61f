"""Fill the cache on disk ahead of training (prepare.py job=warm_cache)."""

import functools
from collections import Counter
from collections.abc import Callable

import numpy as np

from data.cache.disk import DiskCached
from data.cache.store import close_stores
from data.image_formats import UnreadableImage
from data.rows import spread
from utils.ranks.processes import map_items

_SAMPLED = 200  # images that a size is estimated from
THERE, ADDED, UNREADABLE = "there", "added", "unreadable"


def warm_cache(source: DiskCached, rows: np.ndarray, progress: Callable[[int, int], None]) -> Counter:
    """Put the images of some rows into the cache, in one process per core; what is there is not decoded again.

    Returns how many were THERE, ADDED and UNREADABLE.
    """
    counts: Counter = Counter()
    results = map_items(functools.partial(_fill, source), rows.tolist(), lambda row: UNREADABLE)
    for done, result in enumerate(results, start=1):
        counts[result] += 1
        progress(done, len(rows))
    close_stores()  # which writes what this process has waiting
    return counts


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
        return THERE
    try:
        source.fill(row)
    except UnreadableImage:  # a training run, and job=manifest, name it
        return UNREADABLE
    return ADDED
