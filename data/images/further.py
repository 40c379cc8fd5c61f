"""Formats that packages of requirements-formats.txt read: HEIF, JPEG XL, and the previews in raw photographs.

A package is imported at the first file that needs it: together they take half a second.
"""

import functools
import importlib
import io
import re
from types import ModuleType

from data.layouts.names import FURTHER, is_raw

# The first bytes of files that a package reads; an AVIF may begin as HEIF does, and names its kind a little later.
_BEGINS = {
    "pillow-heif": re.compile(rb"....ftyp(he|(mif1|msf1)(?!.{0,40}avi[fs]))", re.DOTALL),
    "pillow-jxl-plugin": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
}
FORMATS = {"pillow-heif": "HEIF", "pillow-jxl-plugin": "JXL"}  # Pillow's names
_TURNS = {3: 3, 5: 8, 6: 6}  # LibRaw's numbers of a rotation, and those of EXIF


def package_of(content: bytes, name: str) -> str | None:
    """Return the package that a file needs beside Pillow: by its first bytes, or by the ending of a raw photograph."""
    if is_raw(name):
        return "rawpy"
    return next((package for package, begins in _BEGINS.items() if begins.match(content)), None)


@functools.cache
def load_package(package: str) -> ModuleType:
    """Import a package and let Pillow know its format. Raises ImportError."""
    module = importlib.import_module(FURTHER[package][0])
    if package == "pillow-heif":
        # One thread, because a loader has a process for each core; a thumbnail has other pixels than its image.
        module.register_heif_opener(decode_threads=1, thumbnails=False)
    elif package == "pillow-jxl-plugin":
        module.JpegXLImagePlugin.DECODE_THREADS = 0
    return module


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
