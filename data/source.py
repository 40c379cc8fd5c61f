"""Where samples come from: a source gives the record of a row, a dictionary of tensors.

`ImageFiles` reads the image files of a collection. Another store (LMDB, shards, cached latents) is another source: it
decodes what it holds, and its records may have several tensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data.collection import Collection
from data.decode import decode_image, read_file
from utils.canvas import DEFAULT
from utils.errors import UserError

IMAGE = "image"  # the tensor of a record that views are made of
_BLANK_PX = 64  # side of the image that replaces an unreadable one

Record = dict[str, Tensor]


class Source(Protocol):
    """Give the records of a collection's rows. Picklable: loader workers open the store themselves.

    fingerprints: what must not change while a run is resumed, beside the collection; by configuration key.
    """

    fingerprints: Mapping[str, str]

    def read(self, row: int) -> Record:
        """Return a row's record. Raises UnreadableImage where that is not possible."""

    def blank(self, group: int) -> Record:
        """Return the record that replaces an unreadable one of a shape group; its weight is 0."""

    def name_of(self, row: int) -> str:
        """Return a row's name, for messages."""

    def file_of(self, row: int) -> Path | None:
        """Return the file that holds a row and no other, None where there is no such file."""


class ImageFiles:
    """The image files of a collection, as `image`, uint8 [channels, H, W]; refuses more than `max_pixels` undecoded.

    background: under transparent images (utils/canvas.py).
    """

    fingerprints: Mapping[str, str] = {}

    def __init__(self, collection: Collection, channels: int, max_pixels: int, background: Any = DEFAULT) -> None:
        if channels not in (1, 3):
            raise UserError(
                f"model.in_channels: {channels}; image files are read as 1 channel (grey) or 3 (RGB), so set 1 or 3"
            )
        self.collection, self.channels, self.max_pixels, self.background = collection, channels, max_pixels, background

    def read(self, row: int) -> Record:
        """Return the decoded image of the row's file."""
        content = read_file(self.file_of(row))
        pixels = decode_image(content, self.name_of(row), self.channels, self.max_pixels, self.background)
        return {IMAGE: torch.from_numpy(pixels).permute(2, 0, 1)}

    def blank(self, group: int) -> Record:
        """Return a black image."""
        return {IMAGE: torch.zeros(self.channels, _BLANK_PX, _BLANK_PX, dtype=torch.uint8)}

    def name_of(self, row: int) -> str:
        """Return the row's path."""
        return self.collection.view(row).path

    def file_of(self, row: int) -> Path:
        """Return the row's file."""
        return self.collection.absolute_path(row)
