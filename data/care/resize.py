"""Write a smaller copy of an image file: by Pillow, or in strips by libvips where memory would not hold it."""

import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.pixels import read_size
from utils.io.files import write_atomically

_WRITTEN = ("JPEG", "PNG", "WEBP")
_METADATA = ("exif", "icc_profile", "xmp", "dpi", "comment")
_STRIPS = Path(__file__).with_name("strips.py")
_BROKEN = (OSError, SyntaxError, ValueError, struct.error, MemoryError, Image.DecompressionBombError)


class Shrink(NamedTuple):
    """A file, its copy, and what the copy is to be.

    longest_px: of its longest side. quality: of JPEG and WebP. max_pixels: an image of more is not decoded as a whole.
    """

    file: Path
    target: Path
    longest_px: int
    quality: int
    max_pixels: int


class _Unfit(Exception):
    """An image that cannot be shrunk, and why."""


def read_longest(file: str) -> float:
    """Return the longest side that a header states; 0 where it cannot be read, infinity above Pillow's limit."""
    try:
        return max(read_size(file))
    except Image.DecompressionBombError:
        return math.inf
    except _BROKEN:
        return 0


def shrink_file(wanted: Shrink) -> str | None:
    """Write a copy with the same metadata and time of change, atomically; return why it cannot be, else None."""

    def write(temporary: Path) -> None:
        _find_writer(wanted)(wanted, temporary)
        shutil.copystat(wanted.file, temporary)

    try:
        write_atomically(wanted.target, write)
    except _Unfit as error:
        return str(error)
    except _BROKEN as error:
        return f"{type(error).__name__}: {error}"
    return None


def _find_writer(wanted: Shrink) -> Callable[[Shrink, Path], None]:
    try:
        width, height = read_size(wanted.file)
    except Image.DecompressionBombError:
        return _write_in_strips
    return _write_in_strips if width * height > wanted.max_pixels else _write_whole


def _write_whole(wanted: Shrink, target: Path) -> None:
    """Decode, resize and write an image by Pillow. Raises _Unfit, and what Pillow raises."""
    with Image.open(wanted.file, formats=_WRITTEN) as image:
        name = image.format
        if name not in _WRITTEN or getattr(image, "n_frames", 1) > 1:
            raise _Unfit(f"{name} of several frames")
        options = {key: image.info[key] for key in _METADATA if key in image.info}
        if name == "PNG":
            options["pnginfo"] = PngInfo()
            for key, text in image.text.items():
                options["pnginfo"].add_text(key, text)
        else:
            options["quality"] = wanted.quality
        is_wide = image.mode.startswith("I")  # grey of 16 bits
        if mode := _resizable(image):
            image = image.convert(mode)
        image.thumbnail((wanted.longest_px, wanted.longest_px), Image.Resampling.LANCZOS, reducing_gap=3.0)
        image = image.convert("I;16") if is_wide else image
        image.save(target, format=name, **options)


def _resizable(image: Image.Image) -> str | None:
    """Return the mode in which an image can be resized smoothly, None for its own."""
    if "transparency" in image.info or image.mode == "PA":
        return "RGBA"
    if image.mode.startswith("I"):
        return "I"
    return {"P": "RGB", "1": "L"}.get(image.mode)


def _write_in_strips(wanted: Shrink, target: Path) -> None:
    """Shrink an image within 512 MiB of memory, in a process of its own. Raises _Unfit."""
    if find_spec("pyvips") is None:
        raise _Unfit(f"more than {wanted.max_pixels:,} pixels, which needs pyvips: run `make install-care`")
    words = [str(wanted.file.absolute()), str(target.absolute()), str(wanted.longest_px), str(wanted.quality)]
    done = subprocess.run([sys.executable, str(_STRIPS), *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise _Unfit((done.stderr.strip().splitlines() or [f"libvips ended with status {done.returncode}"])[-1])
