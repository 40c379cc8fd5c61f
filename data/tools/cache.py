"""job=cache: list the caches and the records that no run uses; remove these, or fill the cache of images."""

import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.images.caches import GIB
from data.images.record_store import Store
from data.load import load_collection
from data.open import open_images
from data.stream.source import UnreadableImage
from data.tools.config import Cache
from utils.errors import UserError
from utils.io.files import output_errors
from utils.io.memo import in_threads
from utils.io.safe_text import Lines
from utils.record.figures import show_rows
from utils.record.logging import get_logger
from utils.record.progress import track
from utils.record.report import TableRow

log = get_logger(__name__)

_CACHES = Path("outputs/cache")
_DAY_SEC = 86_400


def manage_caches(job: Cache, data: DataConfig) -> str:
    """Fill, or list and remove. Raises UserError (`job.apply`, `data.cache.disk_gib`)."""
    if job.fill:
        return _fill(job, data)
    caches = {*_CACHES.glob("*"), Path(data.cache.folder)}
    unused = []
    rows = []
    for path in sorted(path for path in caches if path.exists()):
        records = Store(path).unused(time.time() - job.unused_days * _DAY_SEC)
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
    """Decode each image that the cache lacks."""
    if not data.cache.disk_gib:
        raise UserError("data.cache.disk_gib: 0 keeps no image; set the GiB that the cache may take, as for training")
    collection = load_collection(data)
    channels = 1 if job.fill == "grey" else 3
    source = open_images(collection, data, {"channels": channels, "shortest_px": job.shortest_px})

    def keep(row: int) -> None:
        with suppress(UnreadableImage):  # training names it
            source.read(row)

    rows = np.flatnonzero(collection.weights() > 0).tolist()
    for _ in track(in_threads(keep, rows), len(rows), "filling the cache"):
        pass
    kept = sum(map(source.has, rows))
    limit = f"data.cache.disk_gib={data.cache.disk_gib:g}"
    return f"{kept:,} of {len(rows):,} images are in {data.cache.folder}, which {limit} limits"


def _describe(path: Path, unused: int) -> TableRow:
    """Return a row on a cache: a folder or a file."""
    sizes = [file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()]
    return {"cache": str(path), "files": len(sizes), "GiB": sum(sizes) / GIB, "unused": unused}
