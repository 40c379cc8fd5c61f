"""Shrink a huge PNG or JPEG strip by strip, by libvips:  python data/care/strips.py FILE TARGET LONGEST_PX QUALITY

A process of its own: torch alone would take the memory that this saves, and libvips may crash on a damaged file. It
ends with status 0, or says on the last line of stderr why not.
"""

import sys

import pyvips

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


def shrink(file: str, target: str, longest_px: int, quality: int) -> str | None:
    """Write a file's smaller copy, with its metadata; return why not, None where it was done."""
    with open(file, "rb") as stream:
        head = stream.read(len(_PNG))
    if head != _PNG and not head.startswith(_JPEG):
        return "too many pixels for memory; only PNG and JPEG are read in strips"
    pyvips.block_untrusted_set(True)
    pyvips.concurrency_set(1)  # one such process per core may be at work
    load = pyvips.Image.pngload if head == _PNG else pyvips.Image.jpegload
    image = load(file, access="sequential")
    if max(image.width, image.height) <= longest_px:
        return "no side is longer"
    if image.get_typeof("interlaced"):
        return "interlaced or progressive, so that strips need all of it in memory; save it without"
    small = pyvips.Image.thumbnail(file, longest_px, height=longest_px, size="down", no_rotate=True)
    if head == _PNG:
        small.pngsave(target)
    else:
        small.jpegsave(target, Q=quality)
    return None


if __name__ == "__main__":
    try:
        sys.exit(shrink(*sys.argv[1:3], *map(int, sys.argv[3:])))
    except pyvips.Error as error:
        sys.exit(" ".join(str(error).split()))
