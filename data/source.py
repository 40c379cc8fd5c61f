"""Where samples come from: a source gives the bytes of a sample, a decoder makes an array of them.

`FileSource` and `ImageDecoder` read the image files of a collection. Another store (LMDB, shards, cached latents) is
another source, with a decoder for what it holds.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.collection import Collection
from data.decode import decode_image, read_file
from data.stream import Draw
from utils.errors import UserError

_BLANK_PX = 64  # side of the image that replaces an unreadable one


class Source(Protocol):
    """Give the bytes of samples. Picklable: loader workers open it themselves."""

    def read(self, draw: Draw) -> bytes:
        """Return a sample's bytes. Raises UnreadableImage where that is not possible."""

    def name_of(self, draw: Draw) -> str:
        """Return a sample's name, for messages."""

    def file_of(self, draw: Draw) -> Path | None:
        """Return the file that holds a sample, None where there is no file for it alone."""


class Decoder(Protocol):
    """Make an array of a sample's bytes. Picklable."""

    def __call__(self, content: bytes, name: str) -> Tensor:
        """Return [C, H, W] of any dtype and number of channels. Raises UnreadableImage where the bytes are not one."""

    def blank(self) -> Tensor:
        """Return the array that replaces a sample that cannot be read; its weight is 0."""


class FileSource:
    """The image files of a collection."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection

    def read(self, draw: Draw) -> bytes:
        """Return the bytes of the row's file."""
        return read_file(self._collection.absolute_path(draw.index))

    def name_of(self, draw: Draw) -> str:
        """Return the row's path."""
        return self._collection.view(draw.index).path

    def file_of(self, draw: Draw) -> Path:
        """Return the row's file."""
        return self._collection.absolute_path(draw.index)


class ImageDecoder:
    """Decode image files to uint8 [channels, H, W]; larger ones than `max_pixels` are refused undecoded."""

    def __init__(self, channels: int, max_pixels: int) -> None:
        if channels not in (1, 3):
            raise UserError(
                f"model.in_channels: {channels}; image files are read as 1 channel (grey) or 3 (RGB), so set 1 or 3"
            )
        self.channels, self.max_pixels = channels, max_pixels

    def __call__(self, content: bytes, name: str) -> Tensor:
        """Return the decoded image."""
        pixels: np.ndarray = decode_image(content, name, self.channels, self.max_pixels)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def blank(self) -> Tensor:
        """Return a black image."""
        return torch.zeros(self.channels, _BLANK_PX, _BLANK_PX, dtype=torch.uint8)
