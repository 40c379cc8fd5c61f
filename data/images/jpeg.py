"""JPEGs without an end marker, as interrupted copies and broken cards leave them: whether their data are whole."""

import re
from contextlib import suppress

import simplejpeg

_END = b"\xff\xd9"
_FRAME = re.compile(rb"\xff[\xc0-\xc3\xc9-\xcb]\0.\x08....", re.DOTALL)  # the number of components follows
# A scan that gives coefficients to their last bit: its components, its first and its last coefficient.
_SCAN = re.compile(
    rb"\xff\xda\0.(\x01..|\x02.{4}|\x03.{6}|\x04.{8})(.)(.)[\0\x10\x20\x30\x40\x50\x60\x70\x80\x90\xa0\xb0\xc0\xd0]",
    re.DOTALL,
)


def complete(content: bytes, mode: str) -> bytes:
    """Return a JPEG with its end marker; mode: Pillow's. Raises OSError if its data are not all there.

    libjpeg warns if data end within a scan, but not if whole scans of a progressive JPEG are missing: all 64
    coefficients of each component must be given.
    """
    whole = content + _END
    with suppress(ValueError):
        simplejpeg.decode_jpeg(whole, "CMYK" if mode == "CMYK" else "GRAY")
        start = max(frame.end() for frame in _FRAME.finditer(whole))  # the others are of thumbnails
        scans = _SCAN.findall(whole, start)
        if sum(parts[0] * (last[0] + 1 - first[0]) for parts, first, last in scans) >= 64 * whole[start]:
            return whole
    raise OSError("truncated: the data of its pixels are not all there")
