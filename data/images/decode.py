"""Decode the bytes of an image file to the same pixels as Pillow, but plain JPEGs faster.

Pillow opens every file, so formats, limits and error messages do not depend on the decoder. simplejpeg then decodes
grey and RGB JPEGs without warnings; Pillow decodes everything else.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy import ndarray
from PIL import Image

from data.images.convert import UPRIGHT, convert, load_upright, read_orientation
from data.images.open import REMARK, decoder_versions, open_image
from data.images.resize import resize
from utils.errors import UserError
from utils.formats.background import DEFAULT, background_rgb
from utils.record.logging import log

_RULES = 5  # version of conversion and resizing; increment it to invalidate cached images


@functools.cache
def _say_once(remark: str) -> None:
    """Log a remark about an image once in a process."""
    log.warning("%s; prepare.py job=check lists such files", remark)


@dataclass(frozen=True)
class Decoder:
    """Decode the first frame of an image to 8 bits, upright, RGB (3 channels) or grey (1).

    Applies EXIF rotation, puts transparent images on `background`, scales 16-bit grey to 8 bits, converts CMYK, and
    takes the largest image of an icon. max_pixels: larger images are refused from their header. shortest_px: reduce
    images with a longer shorter side to it; a JPEG is decoded at 1/2, 1/4 or 1/8 scale if that suffices.
    Raises UserError (`model.in_channels`).
    """

    channels: int
    max_pixels: int
    background: Any = DEFAULT
    shortest_px: int | None = None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UserError(f"model.in_channels: {self.channels}; images have 1 channel (grey) or 3 (RGB): set 1 or 3")

    def identity(self) -> str:
        """Return everything except the content that pixels and refusals depend on, for cache keys."""
        shrunk = f"shorter side {self.shortest_px}" if self.shortest_px else "whole"
        return (
            f"{_RULES}: {decoder_versions()}; {self.channels} channels; on {background_rgb(self.background)}; "
            f"up to {self.max_pixels} pixels; {shrunk}"
        )

    def __call__(self, content: bytes, name: str) -> ndarray:
        """Return the pixels of a file's bytes, uint8 [H, W, channels]; name: for messages.

        Raises UnreadableImage: empty, cut off, damaged, not an image, too large, unsupported.
        """
        with open_image(content, name, self.max_pixels) as image:
            if REMARK in image.info:
                _say_once(image.info[REMARK])
            return self._decode(image)

    def _decode(self, image: Image.Image) -> ndarray:
        """Decode an opened image."""
        whole = image.size
        if self.shortest_px is not None:
            image.draft(None, (self.shortest_px, self.shortest_px))  # sets the scale of a JPEG
        scaled = image.size != whole  # before loading, which may change the size from the header
        pixels = self._decode_jpeg(image)
        if pixels is None:
            pixels = convert(load_upright(image), self.channels, background_rgb(self.background))
        short, long = sorted(whole if scaled else pixels.shape[:2])
        if self.shortest_px is None or short <= self.shortest_px:
            return pixels
        size_hw = (self.shortest_px, int(self.shortest_px * long / short))  # the rule of torchvision
        return resize(pixels, size_hw if pixels.shape[0] <= pixels.shape[1] else size_hw[::-1], "bilinear")

    def _decode_jpeg(self, image: Image.Image) -> ndarray | None:
        """Return the pixels of a plain JPEG at the scale of the opened image, or None if Pillow must decode it."""
        if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
            return None
        height = image.height
        width = image.width
        grey = image.mode == "L" and self.channels == 1
        # A buffer with the size from the header: libjpeg refuses a file in which it finds a larger image.
        room = np.empty((height, width, 1 if grey else 3), np.uint8)
        try:
            pixels = simplejpeg.decode_jpeg(
                image.fp.getvalue(), "GRAY" if grey else "RGB", min_height=height, min_width=width, buffer=room
            )
        except ValueError:  # damage that Pillow may accept, or unknown kinds
            return None
        if pixels.shape[:2] != (height, width):
            return None
        turn = UPRIGHT.get(read_orientation(image))
        if turn is None and pixels.shape[2] == self.channels:
            return pixels
        picture = Image.fromarray(pixels[..., 0] if grey else pixels)
        return convert(picture if turn is None else picture.transpose(turn), self.channels, None)
