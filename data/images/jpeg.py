"""JPEGs without an end marker, as interrupted copies and broken cards leave them: whether their data are whole."""

import re

import simplejpeg

_END = b"\xff\xd9"
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd9-\xfe])")  # none is in the data of a scan
_SCAN = 0xDA
_FRAMES = (*range(0xC0, 0xC4), *range(0xC9, 0xCC))
_COLOURS = {"L": "GRAY", "CMYK": "CMYK"}


def lacks_end(content: bytes) -> bool:
    """Return whether no end marker follows the last scan; other bytes may follow the marker."""
    return not content.endswith(_END) and content.find(_END, content.rfind(b"\xff\xda")) < 0


def complete(content: bytes, mode: str) -> bytes:
    """Return a JPEG with its end marker; mode: Pillow's. Raises OSError if its data are not all there.

    libjpeg warns if data end within a scan, but not if whole scans of a progressive JPEG are missing.
    """
    whole = content + _END
    try:
        simplejpeg.decode_jpeg(whole, _COLOURS.get(mode, "RGB"))
        is_whole = _has_all_scans(whole)
    except ValueError:
        is_whole = False
    if not is_whole:
        raise OSError("truncated: the data of its pixels are not all there")
    return whole


def _has_all_scans(jpeg: bytes) -> bool:
    """Return whether scans give each of the 64 coefficients of each component to its last bit."""
    missing = 0
    start = 2
    while (found := _MARKER.search(jpeg, start)) is not None:
        body = found.end() + 2
        start = found.end() + int.from_bytes(jpeg[found.end() : body])
        marker = found[1][0]
        if marker in _FRAMES:
            missing = 64 * jpeg[body + 5]
        elif marker == _SCAN:
            count = jpeg[body]
            first, last, bits = jpeg[body + 1 + 2 * count : body + 4 + 2 * count]
            missing -= count * (last + 1 - first) if bits & 15 == 0 else 0
    return missing <= 0
