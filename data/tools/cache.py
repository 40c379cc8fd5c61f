"""job=cache: list the caches, what they hold and what no run uses; remove that, or fill the cache of images."""

import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import deserialize

from data.config import DataConfig
from data.images.caches import GIB
from data.images.record_store import DAY_SEC, USED, Store
from data.load import load_collection
from data.open import open_images
from data.stream.source import UnreadableImage
from data.tools.config import Cache
from utils.errors import UserError
from utils.io.files import output_errors
from utils.io.memo import in_threads
from utils.io.safe_text import Lines
from utils.record.figures import show_rows
from utils.record.logging import log
from utils.record.progress import track
from utils.record.report import TableRow

_CACHES = Path("outputs/cache")


def manage_caches(job: Cache, data: DataConfig) -> str:
    """Fill, or list and remove. Raises UserError (`job.apply`, `data.cache.disk_gib`)."""
    if job.fill:
        return _fill(job, data)
    caches = {*_CACHES.glob("*"), Path(data.cache.folder)}
    unused = []
    rows = []
    for path in sorted(path for path in caches if path.exists()):
        records = Store(path).unused(time.time() - job.unused_days * DAY_SEC)
        rows.append(_describe(path, len(records)))
        unused += records
    log.info("%s", Lines(show_rows(rows)))
    size = sum(file.stat().st_size for file in unused) / GIB
    with output_errors("job.apply", _CACHES):
        for file in unused if job.apply else ():
            file.unlink(missing_ok=True)
    done = "removed" if job.apply else "job.apply=true removes them"
    return f"{len(unused):,} files ({size:.3g} GiB) not used for {job.unused_days:g} days: {done}"


def _fill(job: Cache, data: DataConfig) -> str:
    """Keep all images in the cache on disk; return how many it has."""
    if not data.cache.disk_gib:
        raise UserError("data.cache.disk_gib: 0 keeps no image; set the GiB that the cache may take, as for training")
    collection = load_collection(data)
    channels = 1 if job.fill == "grey" else 3
    source = open_images(collection, data, {"channels": channels, "shortest_px": job.shortest_px})

    def keep(row: int) -> bool:
        with suppress(UnreadableImage):  # training names it
            source.read(row)
        return source.has(row)

    rows = np.flatnonzero(collection.weights() > 0).tolist()
    kept = sum(track(in_threads(keep, rows), len(rows), "filling the cache"))
    place = f"{data.cache.folder}, which data.cache.disk_gib={data.cache.disk_gib:g} limits"
    return f"{kept:,} of {len(rows):,} images are raw uint8 pixels in {place} ({source.inner.decoder.identity()})"


def _describe(path: Path, unused: int) -> TableRow:
    """Return a row on a cache: a folder or a file."""
    sizes = [file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()]
    row = {"cache": str(path), "files": len(sizes), "GiB": sum(sizes) / GIB, "unused": unused}
    return {**row, "bytes a file": sum(sizes) / max(1, len(sizes)), "a record": _describe_record(path)}


def _describe_record(path: Path) -> str:
    """Return the dtypes and shapes of a record of tensors, or nothing for images; a user's folder may look so, too."""
    mark = path / USED
    files = Store(path).files() if mark.exists() and not mark.read_text() else ()
    tensors = [part for file in files[:1] for part in deserialize(Store(path).get(file.name).tobytes())]
    return ", ".join(f"{name} {facts['dtype']} {facts['shape']}" for name, facts in tensors)
