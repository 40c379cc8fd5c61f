"""Sources of samples: a source returns the record of a row, a dictionary of tensors.

Images and latents are sources, and so is a cache of images.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # who only reads bytes or headers needs no torch
    from torch import Tensor

IMAGE = "image"  # the name of the image in a record

Record = dict[str, "Tensor"]


class UnreadableImage(Exception):
    """An image that cannot be decoded: its path, the kind of fault, and details. Can be pickled."""

    def __init__(self, path: str, kind: str, detail: str) -> None:
        """Pass all arguments on, because pickling restores an exception from them."""
        super().__init__(path, kind, detail)
        self.path = path
        self.kind = kind
        self.reason = f"{kind} ({detail})"

    def __str__(self) -> str:
        """Return `path: kind (detail)`."""
        return f"{self.path}: {self.reason}"


class FileRange(NamedTuple):
    """A file or a byte range of it; length 0: from `offset` to the end."""

    path: str
    offset: int = 0
    length: int = 0


class Source:
    """The records of rows, also in forked processes. `read` and `blank` are required; the rest is optional."""

    def read(self, row: int, key: int = 0, group: int = 0) -> Record:
        """Return the record of a row. Raises UnreadableImage.

        key, group: of the draw, for sources with several records per row.
        """
        raise NotImplementedError

    def blank(self, group: int) -> Record:
        """Return the record that replaces an unreadable one, with the shape of a group; its weight is 0."""
        raise NotImplementedError

    def prefetch(self, rows: Iterable[int]) -> None:
        """Start to read the rows of a batch, if single reads are slow."""

    def readings(self) -> dict[str, float]:
        """Return metrics of the caches, by name."""
        return {}
