"""What the tools know of each image file, measured once.

A line is appended to the cache for each file as it is read, so a killed job goes on where it was, and the next job
reads only files that are new or changed.
"""

import functools
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.decode import FORMATS, UnreadableImage, decode_image, pillow_version, read_file
from data.duplicates import perceptual_hash
from data.inspection import fatal_file
from utils.io.files import output_errors, sha256_text
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
        pixels = decode_image(content, file, 3, max_pixels)
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
    known_by = f"{os.path.realpath(root)} {max_pixels} {pillow_version()} {Facts._fields}"
    cache = CACHE / f"{sha256_text(known_by)[:16]}.jsonl"
    known = _read_known(cache)
    versions = {path: _version_of(root / path) for path in paths}
    waiting = [path for path in paths if path not in known or known[path][0] != versions[path]]
    measure = functools.partial(measure_file, max_pixels=max_pixels)
    found = map_items(measure, [str(root / path) for path in waiting], _fatal_facts)
    with output_errors("outputs", cache), counting("reading the images") as report:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(cache, "a", encoding="utf-8") as stream:
            for done, (path, facts) in enumerate(zip(waiting, found), start=1):
                known[path] = versions[path], facts
                stream.write("\n" + json.dumps([path, versions[path], facts]))
                report(done, len(waiting))
    return [known[path][1] for path in paths]


def _read_known(cache: Path) -> dict[str, tuple[list[int], Facts]]:
    """Return the version and the facts of each path in the cache."""
    known = {}
    for line in cache.read_text(encoding="utf-8").splitlines() if cache.is_file() else ():
        try:
            path, version, values = json.loads(line)
        except ValueError:  # the last line of a killed job
            continue
        known[path] = version, Facts(*values)
    return known


def _version_of(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


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
