"""Write a smaller copy of a collection: images shrunk to a longest side, all others and the sidecars as they are."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data.care.copy import check_target, copy_files, is_there, with_sidecars
from data.care.resize import Shrink, read_longest, shrink_file
from data.care.tool import ReportingTool
from data.config import DataConfig
from data.scan import check_root, list_images
from utils.config.bounds import Side
from utils.config.schema import PathText
from utils.io.files import output_errors
from utils.ranks.processes import map_items
from utils.record.logging import get_logger
from utils.record.progress import track

log = get_logger(__name__)

_WARNED = 20  # images that are copied as they are


class Downsample(ReportingTool):
    """Copy the collection to the folder `to`, images with a side longer than `longest_px` shrunk to it.

    quality: of JPEG and WebP. Killed, it goes on where it was.
    """

    name: Literal["downsample"]
    to: PathText
    longest_px: Side
    quality: Annotated[int, Field(ge=1, le=100)]

    def run(self, data: DataConfig) -> str:
        """Write the copy. Raises UserError (`data.root`, `job.report`, `job.to`)."""
        root = check_root(data.root)
        target = check_target(root, self.to)
        paths = sorted(image.path for image in list_images(root))
        found = map_items(read_longest, [str(root / path) for path in paths], lambda file: 0)
        sides = dict(zip(paths, track(found, len(paths), "reading the headers")))
        long = {path: f"too long: {side:g} pixels" for path, side in sides.items() if side > self.longest_px}
        listing = self.list_files(long)
        shrunk, left = self._shrink(root, target, list(long), data.max_pixels)
        for path, why in list(left.items())[:_WARNED]:
            log.warning("%s is copied as it is: %s", path, why)
        whole = [path for path in paths if path not in long or path in left]
        copy_files(root, target, [*whole, *(name for names in with_sidecars(root, paths).values() for name in names)])
        return (
            f"{len(paths):,} images are in {target}; of {len(long):,} that are longer than {self.longest_px} pixels "
            f"({listing}) {shrunk:,} were downsampled now; prepare.py job=manifest makes a manifest there"
        )

    def _shrink(self, root: Path, target: Path, paths: list[str], max_pixels: int) -> tuple[int, dict[str, str]]:
        """Shrink images that are not there yet; return how many were, and those that cannot be, and why."""
        with output_errors("job.to", target):
            waiting = [path for path in paths if not is_there(root / path, target / path)]
            tasks = [Shrink(root / path, target / path, self.longest_px, self.quality, max_pixels) for path in waiting]
            faults = map_items(shrink_file, tasks, lambda task: "it ended the process that read it")
            found = zip(waiting, track(faults, len(tasks), "downsampling"))
            left = {path: why for path, why in found if why is not None}
        return len(waiting) - len(left), left
