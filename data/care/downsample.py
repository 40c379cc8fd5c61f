"""Shrink the images of a collection to a longest side; the old files are kept in the trash."""

from data.care.config import DownsampleConfig
from data.care.moves import plan_moves, write_journal
from data.care.resize import Shrink, read_longest, shrink_file
from data.care.work import Work
from data.manifest import find_manifest
from data.scan import list_images
from utils.io.files import output_errors
from utils.ranks.processes import map_items
from utils.record.logging import get_logger
from utils.record.progress import track

log = get_logger(__name__)

_WARNED = 20  # images that are left alone


def downsample_images(work: Work, wanted: DownsampleConfig) -> str:
    """Replace, or list, the images with a side longer than `longest_px`; the others stay as they are.

    A killed job goes on where it was: what it has replaced is no longer too long.
    Raises UserError (`data.root`, `report`, `trash`).
    """
    paths = sorted(image.path for image in list_images(work.root))
    found = map_items(read_longest, [str(work.root / path) for path in paths], lambda file: 0)
    sides = dict(zip(paths, track(found, len(paths), "reading the headers")))
    reasons = {path: f"too long: {side:g} pixels" for path, side in sides.items() if side > wanted.longest_px}
    listing = work.list_files(reasons)
    if not work.apply:
        return f"{len(reasons):,} of {len(paths):,} images would be downsampled ({listing}); set apply=true to do it"
    if not reasons:
        return f"none of {len(paths):,} images is longer than {wanted.longest_px} pixels"
    journal, moves = plan_moves(work, reasons, replaced=reasons)
    tasks = [
        Shrink(move.source, move.target, wanted.longest_px, wanted.quality, work.data.max_pixels) for move in moves
    ]
    with output_errors("trash", journal.parent):
        write_journal(journal, moves)
        faults = map_items(shrink_file, tasks, lambda task: "it ended the process that read it")
        left = {path: why for path, why in zip(reasons, track(faults, len(tasks), "downsampling")) if why is not None}
    for path, why in list(left.items())[:_WARNED]:
        log.warning("%s stays as it is: %s", path, why)
    if find_manifest(work.root) is not None:
        log.warning("the manifest states the old sizes and checksums; run prepare.py job=manifest again")
    done = f"{len(reasons) - len(left):,} images downsampled, {len(left):,} left as they are"
    return f"{done}; prepare.py job=undo source={journal} brings the old ones back"
