"""The tags of a collection as output numbers of a vocabulary, computed once and memory-mapped by every process.

index = index_tags(collection, vocabulary, rules, cache=Path("outputs/cache/tags"))
index.of_row(0), index.rating_known[0], index.tagged[rows]
"""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from data.collection.collection import Collection
from data.layouts.spelling import Tag
from data.tags.rules import TagRules
from utils.errors import UserError, about
from utils.io.files import write_atomically
from utils.io.weights import read_tensors, write_tensors
from utils.ranks import distributed
from utils.record.logging import get_logger
from utils.vocabulary import GENERAL, RATING, Vocabulary

log = get_logger(__name__)

_ARRAYS = ("ids", "offsets", "rating_known", "tagged")
_VERSION = 5  # increment it when texts become other tags: every index is rebuilt
_SHOWN = 5  # examples in a message
_CHUNK_ROWS = 2**17


@dataclass(frozen=True, eq=False)
class TagRows:
    """Ragged tag ids: `ids` int32 [N], row after row, and `offsets` int64 [rows + 1]."""

    ids: np.ndarray
    offsets: np.ndarray

    def of_row(self, row: int) -> np.ndarray:
        """Return the ids of a row, int32 [n]."""
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def owners(self) -> np.ndarray:
        """Return the row of each id, int64 [N]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def count(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Count each id over `rows`, int64 [width]."""
        chosen = np.zeros(len(self.offsets) - 1, bool)
        chosen[rows] = True
        return np.bincount(self.ids[np.repeat(chosen, np.diff(self.offsets))], minlength=width)


@dataclass(frozen=True, eq=False)
class TagIndex(TagRows):
    """The output numbers of each row, ascending.

    rating_known: bool [rows], whether a row has a rating. tagged: bool [rows], whether it has any other tag.
    """

    rating_known: np.ndarray
    tagged: np.ndarray

    @classmethod
    def open(cls, file: Path) -> "TagIndex":
        """Memory-map the arrays of a file. Raises UserError (`data.root`) if it is damaged."""
        with about("data.root"):
            tensors = read_tensors(file)
        return cls(*(tensors[name].numpy() for name in _ARRAYS))

    def describe(self) -> str:
        """Describe in one line how many images have tags."""
        rows, tagged, rated = len(self.tagged), self.tagged.sum(), self.rating_known.sum()
        return f"{tagged:,} of {rows:,} images have a tag of the vocabulary, {rated:,} a known rating"


class NoKnownTag(UserError):
    """No image has a tag of the vocabulary."""


def index_tags(collection: Collection, vocabulary: Vocabulary, rules: TagRules, cache: Path) -> TagIndex:
    """Return the tags of a collection as outputs of a vocabulary; rank 0 computes them if `cache` lacks them.

    Raises UserError (`data.root`, `<key>rating_s`) as `map_tags` does, and NoKnownTag.
    """

    collection.refuse_faults("tags", "rating")

    def make() -> Path:
        file = cache / f"{collection.fingerprint}-{vocabulary.hash}-{rules.hash}-{_VERSION}.safetensors"
        with suppress(UserError, KeyError):  # missing or damaged
            TagIndex.open(file)
            return file
        index = map_tags(collection.table, vocabulary, rules)
        if not index.tagged.any():
            names = [name for category, name in vocabulary.columns if category != RATING]
            raise NoKnownTag(
                f"data.root: none of the {len(collection):,} images of {str(collection.root)!r} has a tag of the "
                f"vocabulary ({len(names):,} tags, such as {', '.join(names[:_SHOWN])}); give them "
                "sidecars or a manifest (docs/collections.md), or choose another vocabulary"
            )
        tensors = {name: torch.from_numpy(getattr(index, name)) for name in _ARRAYS}
        write_atomically(file, lambda path: write_tensors(path, tensors))
        return file

    return TagIndex.open(distributed.rank_zero_call(make))


def map_tags(table: pa.Table, vocabulary: Vocabulary, rules: TagRules) -> TagIndex:
    """Map the columns `tags` and `rating` of a collection's table to outputs.

    The rating of a row is its `rating`, else its rating tag if it has exactly one, else unknown. Logs unknown tags.
    Raises UserError (`<key>rating_s`) if images are rated `s` or `safe` and the rules do not define it.
    """
    mapper, nothing = _Mapper(vocabulary, rules), np.zeros(0, np.int64)
    batches = table.select(["tags", "rating"]).to_batches(_CHUNK_ROWS)
    parts = [(nothing,) * 4, *map(mapper.map_rows, batches)]
    ids, lengths, known, tagged = map(np.concatenate, zip(*parts))
    if mapper.unknown:
        texts = ", ".join(repr(text) for text, _ in mapper.unknown.most_common(_SHOWN))
        log.info("%s tags are not in the vocabulary, such as %s", f"{mapper.unknown.total():,}", texts)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TagIndex(ids.astype(np.int32), offsets, known.astype(bool), tagged.astype(bool))


class _Mapper:
    """Map rows to outputs of a vocabulary, each distinct text once, and count unknown texts."""

    def __init__(self, vocabulary: Vocabulary, rules: TagRules) -> None:
        self._columns, self._rules = vocabulary.columns, rules
        named = [key for key in vocabulary.columns if key[0] != RATING]
        # The category of a name: general if it has one, else the category of its first output.
        self._categories = {name: category for category, name in reversed(named)}
        self._categories |= {name: category for category, name in named if category == GENERAL}
        self._is_rating = np.asarray(vocabulary.categories) == RATING
        self._outputs_of = cache(lambda text: [n for tag in rules.read(text) if (n := self._find(tag)) >= 0])
        self.unknown: Counter[str] = Counter()

    def map_rows(self, batch: pa.RecordBatch) -> tuple[np.ndarray, ...]:
        """Return ids [n], and for each row the number of ids, whether its rating is known, and whether it is tagged."""
        tags, ratings = batch.columns
        width, count = len(self._is_rating), len(batch)
        texts = tags.flatten().dictionary_encode()
        outputs_of_text = list(map(self._outputs_of, texts.dictionary.to_pylist()))
        uses = np.bincount(texts.indices.to_numpy(), minlength=len(outputs_of_text)).tolist()
        for text, outputs, used in zip(texts.dictionary.to_pylist(), outputs_of_text, uses):
            if not outputs and text.strip():
                self.unknown[text] += used
        outputs = pa.array(outputs_of_text, pa.list_(pa.int64())).take(texts.indices)
        rows = np.repeat(pc.list_parent_indices(tags).to_numpy(), outputs.value_lengths().to_numpy())
        pairs = np.unique(rows * width + outputs.flatten().to_numpy())

        # The rating column counts; without it, the rating among the tags, if there is exactly one.
        names = ratings.fill_null("").dictionary_encode()
        by_column = np.array([self._find(Tag(RATING, name)) for name in names.dictionary.to_pylist()], np.int64)
        by_column = by_column[names.indices.to_numpy()]
        rows, ids = np.divmod(pairs, width)
        is_rating, with_rating = self._is_rating[ids], np.flatnonzero(by_column >= 0)
        by_tag = (np.bincount(rows[is_rating], minlength=count) == 1) & (by_column < 0)
        pairs = np.concatenate([pairs[~is_rating | by_tag[rows]], with_rating * width + by_column[with_rating]])

        rows, ids = np.divmod(np.sort(pairs), width)
        rated = np.bincount(rows, self._is_rating[ids], count)
        lengths = np.bincount(rows, minlength=count)
        return ids, lengths, rated > 0, lengths > rated

    def _find(self, tag: Tag) -> int:
        """Return the output of a tag, or -1. A tag without a category gets the category of its name."""
        if tag.category == RATING:
            name = self._rules.read_rating(tag.name) if self._is_rating.any() else None
            return self._columns.get((RATING, name), -1)
        category = self._categories.get(tag.name, GENERAL) if tag.category is None else tag.category
        return self._columns.get((category, tag.name), -1)
