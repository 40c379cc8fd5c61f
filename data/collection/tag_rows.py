"""The tags of rows as numbers."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray


@dataclass(frozen=True, eq=False)
class TagRows:
    """Ragged tag ids: `ids` int32 [N], row after row, and `offsets` int64 [rows + 1]."""

    ids: ndarray
    offsets: ndarray

    def of_row(self, row: int) -> ndarray:
        """Return the ids of a row, int32 [n]."""
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def owners(self) -> ndarray:
        """Return the row of each id, int64 [N]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def count(self, rows: ndarray, width: int) -> ndarray:
        """Count each id over `rows`, int64 [width]."""
        chosen = np.zeros(len(self.offsets) - 1, bool)
        chosen[rows] = True
        return np.bincount(self.ids[np.repeat(chosen, np.diff(self.offsets))], minlength=width)


@dataclass(frozen=True, eq=False)
class NamedTags(TagRows):
    """The tags of rows; ids are indices into `names`."""

    names: list[str]

    @classmethod
    def of(cls, lists: pa.ChunkedArray) -> Self:
        """Return the tags of a column of lists."""
        flat = pc.list_flatten(lists).dictionary_encode().unify_dictionaries().combine_chunks()
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
        return cls(flat.indices.to_numpy(), np.cumsum([0, *lengths]), flat.dictionary.to_pylist())
