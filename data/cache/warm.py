"""Fill the cache on disk ahead of training (prepare.py job=warm_cache)."""

import functools
from collections import Counter
from contextlib import suppress
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from data.cache.disk import DiskCached
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
        missing = np.array([row for row in rows.tolist() if not source.has(row)], dtype=np.int64)
        sizes = [0]
        for row in spread(missing, _SAMPLED).tolist():
            with suppress(UnreadableImage):  # a training run, and job=manifest, name it
                sizes.append(source.stored_bytes(row))
        size = len(missing) * sum(sizes) / max(1, len(sizes) - 1)
        return f"dry run: {len(missing):,} of {len(rows):,} images are missing, about {size / 2**30:.2f} GiB"

    def run(self, data: DataConfig) -> str:
        """Fill the cache, in one process per core. Raises UserError (`data.root`, `data.cache`)."""
        source, rows = self._open(data)
        warmed: Counter[str] = Counter()
        with counting("filling the cache") as progress:
            results = map_items(functools.partial(_fill, source), rows.tolist(), lambda row: UNREADABLE)
            for done, result in enumerate(results, start=1):
                warmed[result] += 1
                progress(done, len(rows))
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


def _fill(source: DiskCached, row: int) -> str:
    if source.has(row):
        return THERE
    try:
        source.read(row)
    except UnreadableImage:  # a training run, and job=manifest, name it
        return UNREADABLE
    return ADDED
