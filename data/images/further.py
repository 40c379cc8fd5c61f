"""Formats that packages of requirements-formats.txt read: HEIF, JPEG XL, DICOM, and the previews in raw photographs.

A package is imported at the first file that needs it: together they take half a second.
"""

import functools
import importlib
import io
import re
from types import ModuleType

from data.layouts.names import FURTHER

_JXL_START = re.compile(rb"\xff\x0a|.*?jxl(?:c|p....)\xff\x0a", re.DOTALL)  # of the codestream, bare or in a box
_JXL_RATIOS = 1, 1, 1.2, 4 / 3, 1.5, 16 / 9, 1.25, 2  # width to height, by code from 1
_JXL_BITS = 9, 13, 18, 30  # of a side, by code
_TURNS = {3: 3, 5: 8, 6: 6}  # EXIF's number of a rotation, by LibRaw's


@functools.cache
def load_package(package: str) -> ModuleType:
    """Import a package and let Pillow know its format. Raises ImportError."""
    module = importlib.import_module(FURTHER[package][0])
    if package == "pillow-heif":
        # One thread, because a loader has a process for each core; a thumbnail has other pixels than its image.
        module.register_heif_opener(decode_threads=1, thumbnails=False)
    elif package == "pillow-jxl-plugin":
        module.JpegXLImagePlugin.DECODE_THREADS = 0
    elif package == "pydicom":  # else a line for each odd value of a header
        module.config.settings.reading_validation_mode = module.config.IGNORE
    return module


def count_jxl_pixels(content: bytes) -> int:
    """Return how many pixels the header of a JPEG XL states, which its plugin reads only with the image; 0 if none.

    Source: ISO/IEC 18181-1, SizeHeader.
    """
    start = _JXL_START.match(content)
    if start is None:
        return 0
    bits = int.from_bytes(content[start.end() : start.end() + 12], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits % 2**count
        bits >>= count
        return value

    is_small = take(1)

    def take_side() -> int:
        return 8 * take(5) + 8 if is_small else take(_JXL_BITS[take(2)]) + 1

    height = take_side()
    ratio = take(3)
    return int(height * (height * _JXL_RATIOS[ratio] if ratio else take_side()))


def read_preview(content: bytes) -> tuple[bytes, int]:
    """Return the JPEG in a raw photograph, and the EXIF orientation that holds if the JPEG has none.

    Raises ValueError if it is another picture, LibRaw's error if there is none.
    """
    rawpy = load_package("rawpy")
    with rawpy.imread(io.BytesIO(content)) as raw:
        preview = raw.extract_thumb()
        if preview.format != rawpy.ThumbFormat.JPEG:
            raise ValueError("its preview is no JPEG; export one")
        return preview.data, _TURNS.get(raw.sizes.flip, 1)
