"""What an image file's header says of it: size and transparency."""

import os

from PIL import Image

from data.image_formats import DEFAULT_MAX_PIXELS, formats_of, open_image, read_file
from data.image_pixels import is_transparent, read_orientation


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
