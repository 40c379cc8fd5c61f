"""What the tools know of each image file, measured once.

A line is appended to the cache for each file as it is read, so a killed job goes on where it was, and the next job
reads only files that are new or changed.
"""

import functools
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.decode import Decoder
from data.duplicates import perceptual_hash
from data.image_formats import FORMATS, UnreadableImage, read_file
from data.inspection import fatal_file
from utils.io.files import sha256_text
from utils.io.journal import Journal
from utils.ranks.processes import map_items
from utils.record.progress import counting

CACHE = Path("outputs/cache/care")
_SIDE_PX = 512  # at which sharpness is measured, so that one threshold serves all sizes


class Facts(NamedTuple):
    """One image file; `kind` and `reason` say why it cannot be read (data/decode.py), and are None where it can.

    width, height: of the upright image. brightness: its mean grey level, 0 to 1. sharpness: the variance of the
    Laplacian of its grey levels, 0 to 255, at 512 pixels of the longest side; below about 100 it looks blurred.
    Source: Pech-Pacheco et al. 2000, Diatom autofocusing in brightfield microscopy.
    """

    sha256: str | None = None
    kind: str | None = None
    reason: str | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    phash: int | None = None
    brightness: float | None = None
    sharpness: float | None = None


def measure_file(file: str, max_pixels: int) -> Facts:
    """Read a file and measure what it shows."""
    digest = None
    try:
        content = read_file(file)
        digest = hashlib.sha256(content).hexdigest()
        pixels = Decoder(3, max_pixels)(content, file).permute(1, 2, 0).numpy()
    except UnreadableImage as error:
        return Facts(digest, error.kind, error.reason)
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        name = image.format
    grey = Image.fromarray(pixels).convert("L")
    grey.thumbnail((_SIDE_PX, _SIDE_PX))
    levels = np.asarray(grey, np.float32)
    height, width = pixels.shape[:2]
    brightness, sharpness = round(float(levels.mean()) / 255, 4), round(_measure_sharpness(levels), 2)
    return Facts(digest, None, None, name, width, height, perceptual_hash(pixels), brightness, sharpness)


def measure_files(root: Path, paths: Sequence[str], max_pixels: int) -> list[Facts]:
    """Return the facts of some files of a collection, named relative to its root; in one process per core."""
    real = os.path.realpath(root)
    known_by = f"{real} {Decoder(3, max_pixels).identity()} {Facts._fields}"
    journal = Journal(CACHE / f"{sha256_text(known_by)[:16]}.jsonl")
    found = {path: journal.find(os.path.join(real, path)) for path in paths}
    waiting = [path for path, known in found.items() if known is None]
    files = [os.path.join(real, path) for path in waiting]
    measured = map_items(functools.partial(measure_file, max_pixels=max_pixels), files, _fatal_facts)
    with counting("reading the images") as report:
        for done, (path, file, facts) in enumerate(zip(waiting, files, measured), start=1):
            found[path] = facts
            journal.add(file, facts)
            report(done, len(waiting))
    journal.close()
    return [Facts(*found[path]) for path in paths]


def _fatal_facts(file: str) -> Facts:
    found = fatal_file(file)
    return Facts(found.digest, found.inspection.kind, found.inspection.reason)


def _measure_sharpness(levels: np.ndarray) -> float:
    """Return the variance of the Laplacian of grey levels [H, W]; 0 where a side is below 3."""
    inner = levels[1:-1, 1:-1]
    edges = levels[:-2, 1:-1] + levels[2:, 1:-1] + levels[1:-1, :-2] + levels[1:-1, 2:] - 4 * inner
    return float(edges.var()) if edges.size else 0.0


@functools.cache
def _formats() -> list[str]:
    """Return the formats that are read and that this Pillow has."""
    Image.init()
    return [name for name in (*FORMATS, "TGA") if name in Image.OPEN]
