"""The closed list of image formats, and how a file is opened or refused: one kind of fault and one message for each.

Every image file goes through `open_image`, whichever library decodes its pixels.
"""

import functools
import io
import os
import warnings
from collections.abc import Callable
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from data.stream.source import UnreadableImage

# The formats that are read, with any suffix. A closed list: some of Pillow's other readers start programs
# (EPS runs Ghostscript), and a collection may come from strangers. TGA has no signature, so it is tried last and only
# for files with its suffix.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO", "JPEG2000")
_TGA_SUFFIX = ".tga"
# Above this Pillow itself refuses a file as a decompression bomb (twice Image.MAX_IMAGE_PIXELS).
DEFAULT_MAX_PIXELS = 178_956_970

# The kinds of what makes a file unreadable, by which `prepare.py job=manifest` counts.
EMPTY = "the file is empty"
CUT_OFF = "the file is cut off"
DAMAGED = "the file is damaged"
UNKNOWN = "not an image of a known format"
UNSUPPORTED = "a kind of image that is not supported"
TOO_LARGE = "too many pixels"
NOT_OPENED = "the file cannot be opened"
NO_MEMORY = "too little memory"

# Pillow's warnings (cut-off EXIF, a palette with transparency, a broken animation) would fill the training log with a
# line per image and worker. Sizes are limited by `max_pixels`.
warnings.filterwarnings("ignore", module=r"PIL\.")

Used = TypeVar("Used")


class Unsupported(ValueError):
    """An image that is whole, but of a kind that has no 8-bit form."""


def read_file(path: str | os.PathLike[str], name: str | None = None) -> bytes:
    """Return a file's bytes. Raises UnreadableImage, of its name if given, where it cannot be opened."""
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except (OSError, ValueError, MemoryError) as error:
        raise UnreadableImage(name or os.fspath(path), *_explain(error)) from error


def open_image(content: bytes, name: str, max_pixels: int, use: Callable[[Image.Image], Used]) -> Used:
    """Return what `use` makes of an opened image that is not decoded yet; any failure becomes UnreadableImage."""
    if not content:
        raise UnreadableImage(name, EMPTY, "0 bytes")
    try:
        try:
            image = Image.open(io.BytesIO(content), formats=formats_of(name))
        except UnidentifiedImageError as error:
            raise UnreadableImage(name, *_explain_header(content[:256])) from error
        with image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height} pixels"
                raise UnreadableImage(name, TOO_LARGE, f"{size} is more than the {max_pixels:,} allowed")
            return use(image)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise any exception on damaged bytes: OSError, SyntaxError, struct.error...
        raise UnreadableImage(name, *_explain(error)) from error


def _explain(error: Exception) -> tuple[str, str]:
    """Return the kind of fault behind an exception of the decoder, and its details."""
    said = " ".join(str(error).split())
    match error:
        case Image.DecompressionBombError():
            return TOO_LARGE, f"more pixels than Pillow opens, {DEFAULT_MAX_PIXELS:,}"
        case Unsupported():
            return UNSUPPORTED, said
        case MemoryError():
            return NO_MEMORY, "there is too little left to decode it"
        case OSError(errno=int()):
            return NOT_OPENED, f"{type(error).__name__}: {error.strerror}"
    return CUT_OFF if "truncated" in said.lower() else DAMAGED, f"{type(error).__name__}: {said}"


def _explain_header(head: bytes) -> tuple[str, str]:
    """Return the kind of fault of a file that no reader accepted, and its details, from the file's first bytes."""
    for name in _formats():
        if (accepts := Image.OPEN[name][1]) is not None and accepts(head):
            return DAMAGED, f"it begins as {name}, but what follows is broken, cut off or of a rare kind"
    return UNKNOWN, f"it begins with {head[:24]!r}; allowed are {', '.join(_formats())}"


def formats_of(name: str) -> tuple[str, ...]:
    """Return the formats that a file of this name may have."""
    is_tga = name.lower().endswith(_TGA_SUFFIX) and "TGA" in Image.OPEN
    return (*_formats(), "TGA") if is_tga else _formats()


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
