"""What an image file's header and a trial decoding say of it: size, transparency, faults, and what may surprise."""

import functools
import os
import warnings
from typing import NamedTuple

from PIL import Image

from data.duplicates import perceptual_hash
from data.image_formats import DEFAULT_MAX_PIXELS, UnreadableImage, formats_of, open_image, read_file
from data.image_pixels import UPRIGHT, convert, is_transparent, load_upright, raw_mode, read_orientation
from utils.canvas import DEFAULT, background_rgb

_VARIANTS = {"MPO": "JPEG", "DIB": "BMP"}  # MPO: JPEGs with a preview or a second view behind the first


class Inspection(NamedTuple):
    """The findings for one file: `kind` and `reason` are None where it can be read; traits may surprise its owner.

    size_hw: of the upright image; None where it cannot be read, as all that follows. mode: Pillow's, of the file.
    orientation: EXIF's, 1 to 8. phash: of data/duplicates.py.
    """

    kind: str | None
    reason: str | None
    traits: tuple[str, ...]
    size_hw: tuple[int, int] | None = None
    mode: str | None = None
    orientation: int | None = None
    transparent: int | None = None
    phash: int | None = None


def has_alpha(path: str | os.PathLike[str]) -> bool:
    """Return whether an image file has an alpha channel or transparent colour, from its header; one that is not
    readable has none.
    """
    try:
        with Image.open(path, formats=formats_of(os.fspath(path))) as image:
            return is_transparent(image)
    except Exception:  # training reports it
        return False


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the width and height in the header of an image file that can be read; EXIF may yet turn it."""
    with Image.open(path, formats=formats_of(os.fspath(path))) as image:
        return image.size


def read_upright_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return what `upright_size` does of a file."""
    return upright_size(read_file(path), os.fspath(path))


def upright_size(content: bytes, name: str) -> tuple[int, int]:
    """Return the height and width that a `Decoder` gives, from the header; only of a PNG all is decoded.

    Raises UnreadableImage as it does, but for damaged pixels.
    """

    def size_of(image: Image.Image) -> tuple[int, int]:
        size_hw = image.height, image.width  # before EXIF is asked for: Pillow's TIFF reader turns on loading
        return size_hw if read_orientation(image) in (None, 1, 2, 3, 4) else size_hw[::-1]

    return open_image(content, name, DEFAULT_MAX_PIXELS, size_of)


def inspect_image(path: str | os.PathLike[str], max_pixels: int = DEFAULT_MAX_PIXELS) -> Inspection:
    """Decode a file and say why it cannot be read, or else what about it is converted, dropped or odd."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            name = os.fspath(path)
            find = functools.partial(_find_traits, name=name)
            found = open_image(read_file(path), name, max_pixels, find)
        except UnreadableImage as error:
            return Inspection(error.kind, error.reason, ())
    if any(issubclass(warning.category, UserWarning) for warning in said) and "broken metadata" not in found.traits:
        return found._replace(traits=(*found.traits, "broken metadata"))
    return found


def _find_traits(image: Image.Image, name: str) -> Inspection:
    """Decode an opened image and return its size, and what about it its owner may not expect."""
    raw, mode = raw_mode(image), image.mode
    turned = read_orientation(image) if image.format == "TIFF" else None  # which loading turns, and forgets
    upright, orientation = load_upright(image)
    pixels = convert(upright, 3, background_rgb(DEFAULT))
    found = {
        "several frames": _has_frames(image),
        "CMYK": image.mode == "CMYK",
        "16 bits per channel": image.mode.startswith("I") or ";16" in raw,
        "rotated by EXIF": turned in UPRIGHT or orientation in UPRIGHT,
        "transparent": is_transparent(image),
        "named as another format": _is_misnamed(image, name),
        "broken metadata": orientation is None,
    }
    traits = tuple(trait for trait, there in found.items() if there)
    size_hw, transparent = (upright.height, upright.width), int(found["transparent"])
    stated = turned or orientation
    return Inspection(
        None, None, traits, size_hw, mode, stated if stated in UPRIGHT else 1, transparent, perceptual_hash(pixels)
    )


def _has_frames(image: Image.Image) -> bool:
    """Tell whether a decoded image has more than one frame; one that breaks after the first has."""
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # any, as for pixels; the first frame, which is all that is read, was decoded
        return True


def _is_misnamed(image: Image.Image, name: str) -> bool:
    """Return whether the suffix of a file's name is that of another format."""
    stated = Image.EXTENSION.get(os.path.splitext(name)[1].lower(), image.format)
    return _VARIANTS.get(stated, stated) != _VARIANTS.get(image.format, image.format)
