"""Fill the cache on disk ahead of training (prepare.py job=warm_cache)."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from data.cache.disk import DiskCached
from data.cache.store import close_stores
from data.care.tool import Tool
from data.config import DataConfig
from data.image_formats import UnreadableImage
from data.open import load_collection, open_images
from data.rows import spread
from utils.canvas import DEFAULT
from utils.config.bounds import Side
from utils.errors import UserError
from utils.ranks.processes import map_items
from utils.record.logging import get_logger
from utils.record.progress import counting

log = get_logger(__name__)

_SAMPLED = 200  # images that a size is estimated from
THERE, ADDED, UNREADABLE = "there", "added", "unreadable"


class WarmCache(Tool):
    """Decode the images of `data.root` into the cache on disk, as a training will look them up.

    channels: `model.in_channels`. shortest_px: of the shorter side to which larger images are shrunk; null: to none.
    """

    name: Literal["warm_cache"]
    channels: Annotated[int, Field(ge=1, le=3)]
    shortest_px: Side | None

    def check(self, data: DataConfig) -> str:
        """Return how many images are missing, and about how much they will take."""
        source, rows = self._open(data)
        missing, size = estimate_missing(source, rows)
        return f"dry run: {missing:,} of {len(rows):,} images are missing, about {size / 2**30:.2f} GiB"

    def run(self, data: DataConfig) -> str:
        """Fill the cache. Raises UserError (`data.root`, `data.cache`)."""
        source, rows = self._open(data)
        with counting("filling the cache") as progress:
            warmed = warm_cache(source, rows, progress)
        if evicted := source.counts.totals()["evicted"]:
            log.warning(
                "data.cache.disk_gib: %g is too little for all images: the oldest %s records made room for others",
                data.cache.disk_gib, f"{evicted:,}",
            )  # fmt: skip
        return f"{warmed[ADDED]:,} images added, {warmed[THERE]:,} were there, {warmed[UNREADABLE]:,} unreadable"

    def _open(self, data: DataConfig) -> tuple[DiskCached, np.ndarray]:
        if data.cache.disk_gib == 0:
            raise UserError("data.cache.disk_gib: 0 is no cache, and job=warm_cache fills it; set the GiB of the cache")
        collection = load_collection(data)
        background = DEFAULT if data.background is None else data.background
        source = open_images(collection, data, self.channels, background, shortest_px=self.shortest_px)
        return source, np.flatnonzero(collection.weights())


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
