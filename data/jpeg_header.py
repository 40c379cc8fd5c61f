"""The header of a JPEG that says nothing but how it is compressed.

Source: ITU-T T.81, annex B, and ITU-T T.871 (JFIF) for the marker APP0.
"""

from typing import NamedTuple

_START, _SCAN = b"\xff\xd8", 0xDA
_BASELINE, _PROGRESSIVE = 0xC0, 0xC2
_JFIF = 0xE0
_HARMLESS = (0xC4, 0xDB, 0xDD, 0xFE)  # Huffman tables, quantisation tables, restart intervals, comments


class PlainSize(NamedTuple):
    """The size of a JPEG of 8 bits, in pixels, and its channels: 1 is grey, 3 are YCbCr."""

    height: int
    width: int
    channels: int


def plain_size(content: bytes) -> PlainSize | None:
    """Return the size of a grey or YCbCr JPEG without metadata but comments.

    None for anything else: another format; EXIF, a profile, Adobe's marker; 12 bits, CMYK, lossless or
    arithmetic coding; and a header that is cut off or odd.
    """
    if content[:2] != _START:
        return None
    at, found, is_jfif = 2, None, False
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == _SCAN:
            return found if is_jfif else None
        if marker in (_BASELINE, _PROGRESSIVE):
            height, width = (int.from_bytes(content[place : place + 2], "big") for place in (at + 5, at + 7))
            if found is not None or content[at + 4] != 8 or content[at + 9] not in (1, 3) or not height * width:
                return None
            found = PlainSize(height, width, content[at + 9])
        elif marker == _JFIF and content[at + 4 : at + 9] == b"JFIF\0":
            is_jfif = True
        elif marker not in _HARMLESS:
            return None
        at += 2 + length
    return None
