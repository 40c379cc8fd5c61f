"""Encoded images in remote shards."""

from collections.abc import Iterable, Sequence

from data.collection.collection import Collection
from data.images.bytes import Shards
from data.layouts.remote import open_store
from data.stream.source import FileRange, UnreadableImage

NO_ANSWER = "the store did not return the bytes"


class RemoteShards(Shards):
    """Encoded images in remote shards; the images of a batch are requested together."""

    def __init__(self, collection: Collection) -> None:
        super().__init__(collection)
        self._root = open_store(self._root)[1]
        self._batch = {}

    def file_of(self, row: int) -> FileRange | None:
        """Return None."""

    def prefetch(self, rows: Iterable[int]) -> None:
        """Request the rows of a batch, which replace those of the previous batch."""
        rows = list(rows)
        self._batch = self._request(rows) if rows else {}

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row. Raises UnreadableImage if the store does not return it."""
        content = self._batch[row] if row in self._batch else self._request([row])[row]
        if isinstance(content, Exception):
            raise UnreadableImage(self.name_of(row), NO_ANSWER, f"{type(content).__name__}: {content}") from content
        return self.check(row, content)

    def _request(self, rows: Sequence[int]) -> dict[int, bytes | Exception]:
        """Return the bytes of each row, or the error of the store."""
        files = open_store(str(self.collection.root))[0]
        paths, starts, lengths = map(list, zip(*map(super().file_of, rows)))
        ends = [start + length for start, length in zip(starts, lengths)]
        try:
            contents = files.cat_ranges(paths, starts, ends, on_error="return")
        except Exception as error:  # each store raises other errors
            return dict.fromkeys(rows, error)
        return dict(zip(rows, contents))
