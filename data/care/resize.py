"""Write a smaller copy of an image file, with its metadata."""

import shutil
import struct
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.pixels import read_size

_WRITTEN = ("JPEG", "PNG", "WEBP")
_METADATA = ("exif", "icc_profile", "xmp", "dpi", "comment")
# What Pillow raises for images that it cannot read, and ValueError for those that are not shrunk.
UNFIT = (OSError, SyntaxError, ValueError, struct.error, MemoryError, Image.DecompressionBombError)


class Shrink(NamedTuple):
    """What a smaller copy is to be. quality: of JPEG and WebP. max_pixels: an image of more is not decoded."""

    longest_px: int
    quality: int
    max_pixels: int

    def is_for(self, file: Path) -> bool:
        """Return whether a side of an image is longer. Raises UNFIT where the image cannot be read or shrunk."""
        width, height = read_size(file)
        if max(width, height) > self.longest_px and width * height > self.max_pixels:
            raise ValueError(f"more than {self.max_pixels:,} pixels (data.max_pixels)")
        return max(width, height) > self.longest_px

    def write(self, file: Path, target: Path) -> None:
        """Write the copy, with the same metadata and time of change. Raises UNFIT."""
        with Image.open(file, formats=_WRITTEN) as image:
            name = image.format
            if name not in _WRITTEN or getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{name} of several frames")
            options = {key: image.info[key] for key in _METADATA if key in image.info}
            if name == "PNG":
                options["pnginfo"] = PngInfo()
                for key, text in image.text.items():
                    options["pnginfo"].add_text(key, text)
            else:
                options["quality"] = self.quality
            is_wide = image.mode.startswith("I")  # grey of 16 bits
            if (mode := _smooth_mode(image)) != image.mode:  # else a JPEG would be decoded at its full size
                image = image.convert(mode)
            image.thumbnail((self.longest_px, self.longest_px), Image.Resampling.LANCZOS, reducing_gap=3.0)
            image = image.convert("I;16") if is_wide else image
            image.save(target, format=name, **options)
        shutil.copystat(file, target)


def _smooth_mode(image: Image.Image) -> str:
    """Return the mode in which an image is resized smoothly."""
    if "transparency" in image.info or image.mode == "PA":
        return "RGBA"
    if image.mode.startswith("I"):
        return "I"
    return {"P": "RGB", "1": "L"}.get(image.mode, image.mode)
