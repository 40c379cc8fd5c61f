"""The list of allowed image formats, and opening of files with one kind and message for each fault.

Every image file is opened by `open_image`, whichever library decodes its pixels.
"""

import functools
import io
import os
import warnings
from collections.abc import Callable
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from data.stream.source import UnreadableImage

# The allowed formats, with any suffix. Some of Pillow's other readers start programs (EPS runs Ghostscript), and a
# collection may come from an untrusted source. TGA has no signature, so it is tried last, and only for its suffix.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO", "JPEG2000")
_TGA_SUFFIX = ".tga"
# Above this Pillow itself refuses a file as a decompression bomb (twice Image.MAX_IMAGE_PIXELS).
DEFAULT_MAX_PIXELS = 178_956_970

# The kinds of faults, as counted by `prepare.py job=manifest`.
EMPTY = "the file is empty"
CUT_OFF = "the file is cut off"
DAMAGED = "the file is damaged"
UNKNOWN = "not an image of a known format"
UNSUPPORTED = "a kind of image that is not supported"
TOO_LARGE = "too many pixels"
NOT_OPENED = "the file cannot be opened"
NO_MEMORY = "too little memory"

# Pillow's warnings (truncated EXIF, a palette with transparency, a broken animation) would add a line to the log for
# each image and worker. `max_pixels` limits sizes.
warnings.filterwarnings("ignore", module=r"PIL\.")

Used = TypeVar("Used")


class Unsupported(ValueError):
    """A valid image that has no 8-bit form."""


def read_file(path: str | os.PathLike[str], name: str | None = None) -> bytes:
    """Return the bytes of a file. Raises UnreadableImage, with `name` if given, if it cannot be opened."""
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except (OSError, ValueError, MemoryError) as error:
        raise UnreadableImage(name or os.fspath(path), *_explain(error)) from error


def open_image(content: bytes, name: str, max_pixels: int, use: Callable[[Image.Image], Used]) -> Used:
    """Open an image without decoding it and return `use(image)`; any failure becomes UnreadableImage."""
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
    except Exception as error:  # decoders raise many types on damaged bytes: OSError, SyntaxError, struct.error...
        raise UnreadableImage(name, *_explain(error)) from error


def _explain(error: Exception) -> tuple[str, str]:
    """Return the kind of fault for an exception of the decoder, and details."""
    text = " ".join(str(error).split())
    match error:
        case Image.DecompressionBombError():
            return TOO_LARGE, f"more pixels than Pillow opens, {DEFAULT_MAX_PIXELS:,}"
        case Unsupported():
            return UNSUPPORTED, text
        case MemoryError():
            return NO_MEMORY, "not enough memory to decode it"
        case OSError(errno=int()):
            return NOT_OPENED, f"{type(error).__name__}: {error.strerror}"
    return CUT_OFF if "truncated" in text.lower() else DAMAGED, f"{type(error).__name__}: {text}"


def _explain_header(head: bytes) -> tuple[str, str]:
    """Return the kind of fault for a file that no reader accepted, and details, from its first bytes."""
    for name in _formats():
        if (accepts := Image.OPEN[name][1]) is not None and accepts(head):
            return DAMAGED, f"it begins as {name}, but the rest is broken, cut off or of a rare kind"
    return UNKNOWN, f"it begins with {head[:24]!r}; allowed are {', '.join(_formats())}"


def formats_of(name: str) -> tuple[str, ...]:
    """Return the formats to try for a file name."""
    is_tga = name.lower().endswith(_TGA_SUFFIX) and "TGA" in Image.OPEN
    return (*_formats(), "TGA") if is_tga else _formats()


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the FORMATS that this Pillow build supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
