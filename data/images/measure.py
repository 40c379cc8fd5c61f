"""Facts about each image file, measured once for the manifest and the other tools.

Each file adds a line to a journal when it is read, so a killed job continues where it stopped, and later jobs only
read new and changed files.
"""

import functools
import hashlib
import io
import math
import os
import time
from calendar import timegm
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import ExifTags, Image

from data.collection.duplicates import draw_thumbnail, read_thumbnails
from data.images.bytes import Files
from data.images.convert import UPRIGHT, convert, is_transparent, load_upright, read_orientation
from data.images.open import NO_DECODER, NO_MEMORY, NOT_OPENED, REMARK, UNLIMITED, open_image, read_file
from data.stream.source import UnreadableImage
from utils.formats.background import DEFAULT, background_rgb
from utils.io.files import sha256_text
from utils.io.memo import in_threads, measure_once
from utils.ranks.processes import map_items

CACHE = Path("outputs/cache/facts")
FATAL = "ends the process that reads it"  # the kind of fault if a decoder crashes
_PASSING = (NOT_OPENED, NO_MEMORY, NO_DECODER, FATAL)  # faults that an unchanged file may lose
_PARALLEL_FROM = 512  # files; with fewer, starting processes takes longer than the work
_NEARLY_BLACK = 2**13  # levels of 2**16
_SIDE_PX = 512  # size for measuring sharpness, so that one threshold fits all images


class FileFacts(NamedTuple):
    """Facts about one file. kind, reason: why it is unreadable (data/images/open.py), else None.

    sha256: None if it cannot be opened. All other fields are None unless it was decoded. width, height: after EXIF
    rotation. mode: Pillow's mode of the file. orientation: from EXIF, 1 to 8. transparent: 0 or 1. thumbnail:
    see data/collection/duplicates.py. brightness: mean grey level, 0 to 1. sharpness: variance of the Laplacian of grey
    levels from 0 to 255, with the longer side at 512 pixels; below about 100 an image looks blurred.
    remark: an oddity of a readable file. taken: EXIF's time of a photograph, in seconds. camera_and_year: by EXIF, too.
    Source: Pech-Pacheco et al. 2000, Diatom autofocusing in brightfield microscopy.
    """

    sha256: str | None = None
    kind: str | None = None
    reason: str | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    mode: str | None = None
    orientation: int | None = None
    transparent: int | None = None
    thumbnail: str | None = None
    brightness: float | None = None
    sharpness: float | None = None
    remark: str | None = None
    taken: int | None = None
    camera_and_year: str | None = None

    @property
    def size_and_format(self) -> str:
        """What a person sees of a file."""
        return f"{self.width} x {self.height} {self.format}"

    @property
    def border(self) -> str:
        """Whether black, or white, is in the rows of the thumbnail above and below: bars, a watermark."""
        edge = read_thumbnails([self.thumbnail or ""])[:, np.r_[:32, 224:256]]
        colours = {"black": edge.min(initial=255) < 8, "white": edge.max(initial=0) > 247}
        return " and ".join(name for name, is_there in colours.items() if is_there) or "other colours"

    @property
    def fine_detail(self) -> int:
        """The octave of the sharpness of an image that training reduces far, else 0."""
        is_large = min(self.width or 0, self.height or 0) > _SIDE_PX
        return round(math.log2(1 + self.sharpness)) if is_large else 0

    @property
    def is_damaged(self) -> bool:
        """Whether the file itself is unreadable; a missing decoder is no fault of the file."""
        return self.kind not in (None, NO_DECODER)


def measure_files(root: Path, paths: Sequence[str], max_pixels: int, *, decodes: bool = True) -> list[FileFacts]:
    """Return the facts of files with paths relative to the root, using one process per core."""
    cache_key = f"4 {decodes} {max_pixels} {PIL.__version__} {FileFacts._fields}"
    measure = functools.partial(measure_file, max_pixels=max_pixels, decodes=decodes)
    files = [Path(root, path) for path in paths]
    values = measure_once(
        files,
        lambda missing: map_items(measure, missing, _fatal_file, _PARALLEL_FROM),
        CACHE / f"{sha256_text(cache_key)[:16]}.jsonl",
        "reading the images",
        lambda facts: facts.kind not in _PASSING,
    )
    return [FileFacts(*value) for value in values]


def measure_shards(contents: Files, count: int, max_pixels: int, *, decodes: bool = True) -> list[FileFacts]:
    """Return the facts of images in shards, which threads read at each call."""

    def measure(row: int) -> FileFacts:
        return _measure(functools.partial(contents.read, row), contents.name_of(row), max_pixels, decodes)

    return [*in_threads(measure, range(count))]


def measure_file(file: str | os.PathLike[str], max_pixels: int = UNLIMITED, *, decodes: bool = True) -> FileFacts:
    """Return the SHA-256 of a file, and facts about its pixels if it `decodes`, or the reason why it is unreadable."""
    return _measure(functools.partial(read_file, file), os.fspath(file), max_pixels, decodes)


def _measure(read: Callable[[], bytes], name: str, max_pixels: int, decodes: bool) -> FileFacts:
    digest = None
    try:
        content = read()
        digest = hashlib.sha256(content).hexdigest()
        if not decodes:
            with suppress(Exception), Image.open(io.BytesIO(content), formats=["JPEG"]) as image:  # any type
                return _read_exif(image)._replace(sha256=digest)
            return FileFacts(digest)
        with open_image(content, name, max_pixels) as image:
            return _measure_image(image)._replace(sha256=digest)
    except UnreadableImage as error:
        return FileFacts(digest, error.kind, error.reason)


def _read_exif(image: Image.Image) -> FileFacts:
    """Return what EXIF says of a photograph."""
    taken = origin = None
    with suppress(Exception):  # any type, of damaged EXIF
        exif = image.getexif()
        text = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal]
        origin = f"{exif.get(ExifTags.Base.Model)} {text[:4]}"
        taken = timegm(time.strptime(text, "%Y:%m:%d %H:%M:%S"))
    return FileFacts(taken=taken, camera_and_year=origin)


def _fatal_file(file: str) -> FileFacts:
    """Return the facts of a file that crashes the process reading it, as it would crash training."""
    reason = "reading it ended the process: the decoder crashed, or memory was exhausted"
    return measure_file(file, decodes=False)._replace(kind=FATAL, reason=reason)


def _measure_image(image: Image.Image) -> FileFacts:
    """Decode an opened image and return its facts."""
    mode = image.mode
    facts = _read_exif(image)
    orientation = read_orientation(image)  # loading a TIFF removes it
    upright = load_upright(image)
    transparent = int(is_transparent(upright))
    pixels = convert(upright, 3, background_rgb(DEFAULT))
    grey = Image.fromarray(pixels).convert("L")
    grey.thumbnail((_SIDE_PX, _SIDE_PX))
    levels = np.asarray(grey, np.float32)
    edges = np.diff(levels, 2, axis=0)[:, 1:-1] + np.diff(levels, 2, axis=1)[1:-1]
    remark = image.info.get(REMARK)
    if (pixels == pixels[0, 0]).all():
        remark = f"a picture of one colour, or wholly transparent ({', '.join(map(str, pixels[0, 0]))})"
    top = np.asarray(upright).max() if upright.mode.startswith("I;16") else 0
    if 0 < top < _NEARLY_BLACK:
        remark = f"16-bit grey that is nearly black (levels up to {top:,} of 65,535; save it with more of them)"
    facts = facts._replace(format=image.format, width=upright.width, height=upright.height, mode=mode)
    facts = facts._replace(orientation=orientation if orientation in UPRIGHT else 1, transparent=transparent)
    return facts._replace(
        thumbnail=draw_thumbnail(pixels),
        brightness=round(float(levels.mean()) / 255, 4),
        sharpness=round(float(edges.var()), 2) if edges.size else 0.0,
        remark=remark,
    )
