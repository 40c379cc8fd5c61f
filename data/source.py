"""Where samples come from: a source gives the record of a row, a dictionary of tensors.

data/images.py has the source of images. Another store (cached latents) is another source: it decodes what it holds, and
its records may have several tensors.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

IMAGE = "image"  # the tensor of a record that views are made of

_GAP_BYTES, _JOINED_BYTES = 2**16, 2**23  # ranges as near as this are one request, up to a size

Key = TypeVar("Key")
Record = dict[str, Tensor]


class FileRange(NamedTuple):
    """A file, or `length` bytes of it; 0: all from `offset` on."""

    path: str
    offset: int = 0
    length: int = 0


def join_ranges(places: Mapping[Key, tuple[Any, int, int]]) -> list[list[Key]]:
    """Group the keys of (file, offset, length) that are near one another, in the order of the offsets."""
    groups: list[list[Key]] = []
    for key in sorted(places, key=places.__getitem__):
        file, offset, length = places[key]
        if groups:
            first, last = places[groups[-1][0]], places[groups[-1][-1]]
            is_near = offset - sum(last[1:]) <= _GAP_BYTES and offset + length - first[1] <= _JOINED_BYTES
            if file == first[0] and is_near:
                groups[-1].append(key)
                continue
        groups.append([key])
    return groups


class Contents(Protocol):
    """The encoded images of a collection's rows. Picklable: loader workers open the store themselves."""

    def read(self, row: int) -> bytes:
        """Return the bytes of a row's image file. Raises UnreadableImage."""

    def prefetch(self, rows: Iterable[int]) -> None:
        """Begin to read the rows of this batch and the next, where each would wait for an answer otherwise.

        rows: a source that need not begin anything does not iterate them, so caches filter them lazily.
        """

    def name_of(self, row: int) -> str:
        """Return a row's name, for messages."""

    def file_of(self, row: int) -> FileRange | None:
        """Return the part of a file that is worth reading ahead for a row, None for none."""

    def digest_of(self, row: int) -> bytes | None:
        """Return the SHA-256 of a row's content where it is known and the content cannot change, else None."""


class Source(Protocol):
    """Give the records of a collection's rows. Picklable: loader workers open the store themselves.

    fingerprints: what must not change while a run is resumed, beside the collection; by configuration key.
    """

    fingerprints: Mapping[str, str]

    def read(self, row: int) -> Record:
        """Return a row's record. Raises UnreadableImage where that is not possible."""

    def prefetch(self, rows: Iterable[int]) -> None:
        """Begin to read the rows of this batch and the next, where each would wait for an answer otherwise.

        rows: a source that need not begin anything does not iterate them, so caches filter them lazily.
        """

    def blank(self, group: int) -> Record:
        """Return the record that replaces an unreadable one of a shape group; its weight is 0."""

    def name_of(self, row: int) -> str:
        """Return a row's name, for messages."""

    def file_of(self, row: int) -> FileRange | None:
        """Return the part of a file that is worth reading ahead for a row, None for none."""

    def readings(self) -> Mapping[str, float]:
        """Return what the source's caches have counted so far, in this rank and its workers, by name."""
