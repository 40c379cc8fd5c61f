"""job=cache: what the caches hold, and which records no run uses; removes these."""

import time
from pathlib import Path
from typing import Literal

from data.config import DataConfig
from data.images.caches import GIB
from data.images.record_store import Store
from data.tools.tool import Tool
from utils.config.bounds import DurationOrZero
from utils.config.schema import PathText
from utils.io.files import output_errors
from utils.io.safe_text import Lines
from utils.record.figures import show_rows
from utils.record.logging import get_logger
from utils.record.report import TableRow

log = get_logger(__name__)

_DAY_SEC = 86_400


class Cache(Tool):
    """List the caches in `folder`; with `apply`, remove the records that no run has used for `unused_days`."""

    name: Literal["cache"]
    folder: PathText
    unused_days: DurationOrZero
    apply: bool

    def run(self, data: DataConfig) -> str:
        """List and remove. Raises UserError (`job.folder`)."""
        folder = Path(self.folder)
        caches = {*folder.glob("*"), Path(data.cache.folder)}
        unused = []
        rows = []
        for path in sorted(path for path in caches if path.exists()):
            records = Store(path).unused(time.time() - self.unused_days * _DAY_SEC)
            rows.append(_describe(path, len(records)))
            unused += records
        log.info("%s", Lines(show_rows(rows)))
        size = sum(file.stat().st_size for file in unused) / GIB
        with output_errors("job.folder", folder):
            for file in unused if self.apply else ():
                file.unlink(missing_ok=True)
        done = "removed" if self.apply else "job.apply=true removes them"
        return f"{len(unused):,} files ({size:.3g} GiB) not used for {self.unused_days:g} days: {done}"


def _describe(path: Path, unused: int) -> TableRow:
    """Return a row on a cache: a folder or a file."""
    states = [file.stat() for file in (path, *path.rglob("*")) if file.is_file()]
    written = time.localtime(max((state.st_mtime for state in states), default=0))
    size = sum(state.st_size for state in states) / GIB
    day = time.strftime("%Y-%m-%d", written)
    return {"cache": str(path), "files": len(states), "GiB": size, "written": day, "unused": unused}
