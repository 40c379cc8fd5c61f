"""The tags of a collection as output numbers of a vocabulary, computed once and memory-mapped by every process.

index = index_tags(collection, vocabulary, rules, cache=Path("outputs/cache/tags"))
index.of_row(0), index.unknown_of(0), index.tagged[rows]

A label is positive, negative or unknown. Unknown are the ratings of an image without a rating, and what its
`unknown_tags` name: `hat`, the tags of a category (`character:*`) or all (`*`), except `-hat` or `-general:*`.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy import ndarray

from data.collection.collection import Collection
from data.collection.tag_rows import TagRows
from data.layouts.table import TAG_LISTS
from data.tags.rules import TagRules
from utils.errors import UserError, about
from utils.formats.spelling import GENERAL, RATING, Tag, parse_tag
from utils.formats.vocabulary import Vocabulary
from utils.io.files import sha256_text, write_atomically
from utils.io.memo import own_cache
from utils.ranks import distributed
from utils.record.logging import log

_VERSION = 7  # increment it when texts become other tags: every index is rebuilt
_SHOWN = 5  # examples in a message
_CHUNK_ROWS = 2**17
_ALL = ("*",)


@dataclass(frozen=True, eq=False)
class TagIndex(TagRows):
    """The output numbers of each row, ascending.

    tagged: bool [rows], whether a row has a tag other than a rating. unknown: int32 [rows], the number of its set of
    unknown outputs. set_ids, set_offsets: these sets, ragged.
    """

    tagged: ndarray
    unknown: ndarray
    set_ids: ndarray
    set_offsets: ndarray

    @classmethod
    def open(cls, file: Path) -> "TagIndex":
        """Memory-map the arrays of a file. Raises UserError (`data.root`) if it is damaged."""
        from utils.io.weights import read_tensors  # not above: who lists tags needs no torch

        with about("data.root"):
            return cls(**{name: tensor.numpy() for name, tensor in read_tensors(file).items()})

    def unknown_of(self, row: int) -> ndarray:
        """Return the outputs with an unknown label in a row, int32 [n]. Those that the row has too are known."""
        start, end = self.set_offsets[self.unknown[row] :][:2]
        return self.set_ids[start:end]

    def count_known(self, rows: ndarray, width: int) -> ndarray:
        """Count the images of `rows`, each once, that have a known label of each output, int64 [width]."""
        chosen = np.zeros(len(self.unknown), bool)
        sizes = np.diff(self.set_offsets)
        chosen[rows] = True
        owners = self.owners()
        ids = self.ids[chosen[owners]]
        owners = owners[chosen[owners]]
        members = np.repeat(np.arange(len(sizes)), sizes) * width + self.set_ids
        had = ids[np.isin(self.unknown[owners].astype(np.int64) * width + ids, members)]
        used = np.bincount(self.unknown[rows], minlength=len(sizes))
        absent = np.bincount(self.set_ids, np.repeat(used, sizes), width).astype(np.int64)
        return len(rows) - absent + np.bincount(had, minlength=width)

    def shares(self, rows: ndarray, width: int) -> list[float]:
        """Return how frequent each output is among the rows that have a tag and a known label of it, [width]."""
        rows = rows[self.tagged[rows]]
        return (self.count(rows, width) / np.maximum(self.count_known(rows, width), 1)).tolist()

    def describe(self, vocabulary: Vocabulary) -> str:
        """Describe in one line how many images have tags."""
        is_rating = np.asarray(vocabulary.categories) == RATING
        rows = len(self.tagged)
        tagged = self.tagged.sum()
        rated = is_rating[self.ids].sum()
        line = f"{tagged:,} of {rows:,} images have a tag of the vocabulary, {rated:,} a known rating"
        unknown = (rows - self.count_known(np.arange(rows), len(vocabulary)))[~is_rating].sum()
        return line + (f"; {unknown:,} labels of tags are unknown" if unknown else "")


def index_tags(
    collection: Collection, vocabulary: Vocabulary, rules: TagRules, cache: Path, spoken_of: Sequence[str] = _ALL
) -> TagIndex:
    """Return the tags of a collection as outputs of a vocabulary; rank 0 computes them if `cache` lacks them.

    spoken_of: see `map_tags`.
    Raises UserError (`data.root`, `<key>rating_s`) as `map_tags` does, or if no image has a tag of the vocabulary.
    """
    collection.refuse_faults(*TAG_LISTS, "rating")

    def make() -> Path:
        stated = sha256_text(f"{collection.fingerprint} {vocabulary.hash} {rules.hash} {_VERSION} {[*spoken_of]}")
        file = own_cache(cache) / f"{stated[:32]}.safetensors"
        with suppress(UserError, TypeError):  # missing or damaged
            TagIndex.open(file)
            return file
        index = map_tags(collection.table, vocabulary, rules, spoken_of)
        if not index.tagged.any():
            names = [name for category, name in vocabulary.columns if category != RATING]
            raise UserError(
                f"data.root: none of the {len(collection):,} images of '{collection.root}' has a tag of the "
                f"vocabulary ({len(names):,} tags, such as {', '.join(names[:_SHOWN])}); give them "
                "sidecars or a manifest (docs/collections.md), or choose another vocabulary"
            )
        import torch

        from utils.io.weights import write_tensors

        tensors = {name: torch.from_numpy(array) for name, array in vars(index).items()}
        write_atomically(file, lambda path: write_tensors(path, tensors))
        return file

    return TagIndex.open(distributed.rank_zero_call(make))


def map_tags(table: pa.Table, vocabulary: Vocabulary, rules: TagRules, spoken_of: Sequence[str] = _ALL) -> TagIndex:
    """Map the columns `tags`, `rating` and `unknown_tags` of a collection's table to outputs.

    The rating of a row is its `rating`, else its rating tag if it has exactly one, else unknown. A tag that no row
    has is unknown in all, unless `spoken_of`, in the form of `unknown_tags`, names it. Logs texts that are not in the
    vocabulary.
    Raises UserError (`<key>rating_s`) if images are rated `s` or `safe` and the rules do not define it.
    """
    mapper = _Mapper(vocabulary, rules)
    ids = array("i")
    lengths = []
    unknown = []
    tagged = []
    names = [name for name in (*TAG_LISTS, "rating") if name in table.column_names]
    for batch in table.select(names).to_batches(_CHUNK_ROWS):
        for row in batch.to_pylist():
            outputs, number, is_tagged = mapper.map_row(row["tags"], row["rating"], row.get("unknown_tags"))
            ids.extend(outputs)
            lengths.append(len(outputs))
            unknown.append(number)
            tagged.append(is_tagged)
    if mapper.foreign:
        texts = ", ".join(repr(text) for text, _ in mapper.foreign.most_common(_SHOWN))
        log.info("%s tags are not in the vocabulary, such as %s", f"{mapper.foreign.total():,}", texts)
    ids = np.array(ids, np.int32)
    never = np.flatnonzero((np.bincount(ids, minlength=len(vocabulary)) == 0) & ~mapper.find_named(spoken_of))
    sets = [np.union1d(members, never) for members in mapper.sets]
    offsets, set_offsets = (np.cumsum([0, *sizes]) for sizes in (lengths, map(len, sets)))
    set_ids = np.concatenate([np.zeros(0, np.int64), *sets]).astype(np.int32)
    return TagIndex(ids, offsets, np.array(tagged, bool), np.array(unknown, np.int32), set_ids, set_offsets)


class _Mapper:
    """Map rows to outputs of a vocabulary. Count the texts that the vocabulary lacks.

    sets: the distinct sets of unknown outputs, ascending.
    """

    def __init__(self, vocabulary: Vocabulary, rules: TagRules) -> None:
        self._columns = vocabulary.spelled
        self._rules = rules
        named = [key for key in vocabulary.spelled if key[0] != RATING]
        # The category of a name: general if it has one, else the category of its first output.
        self._categories = {name: category for category, name in reversed(named)}
        self._categories |= {name: category for category, name in named if category == GENERAL}
        self._category = np.asarray(vocabulary.categories)
        self._is_rating = (self._category == RATING).tolist()
        self._rating_of = cache(lambda text: self._find(Tag(RATING, text)))
        self._outputs_of = cache(lambda text: [n for tag in rules.read(text) if (n := self._find(tag)) >= 0])
        self._number_of = cache(self._add_set)
        self.foreign: Counter[str] = Counter()
        self.sets: list[ndarray] = []

    def map_row(self, tags: list[str], rating: str | None, unknown: list[str] | None) -> tuple[list[int], int, bool]:
        """Return the outputs of a row, ascending, the number of its set, and whether it has a tag beside a rating."""
        found = {text: self._outputs_of(text) for text in tags}
        self.foreign.update(text for text in tags if not found[text] and text.strip())
        outputs = set().union(*found.values())
        rated = {output for output in outputs if self._is_rating[output]}
        by_column = self._rating_of(rating or "")  # the column counts; without it, a single rating among the tags
        ratings = {by_column} if by_column >= 0 else rated if len(rated) == 1 else set()
        number = self._number_of(tuple(unknown or ()), bool(ratings))
        return sorted(outputs - rated | ratings), number, len(outputs) > len(rated)

    def _add_set(self, texts: tuple[str, ...], is_rated: bool) -> int:
        """Return the number of a new set: what the texts, and an unknown rating, leave unknown."""
        unknown = self.find_named(texts)
        unknown[self._is_rating] = not is_rated
        self.sets.append(np.flatnonzero(unknown))
        return len(self.sets) - 1

    def find_named(self, texts: Sequence[str]) -> ndarray:
        """Return which outputs the texts name, in the form of `unknown_tags`, bool [T]."""
        named = np.zeros(len(self._is_rating), bool)
        for text in sorted(texts, key=lambda text: text.startswith("-")):  # -hat after *
            tag = self._rules.resolve(parse_tag(text.removeprefix("-")))
            outputs = np.arange(len(named)) == self._find(tag)
            if tag.name == "*":
                outputs = (self._category == tag.category) | (tag.category is None)
            named[outputs] = not text.startswith("-")
            self.foreign.update([text] if not outputs.any() else [])
        return named

    def _find(self, tag: Tag) -> int:
        """Return the output of a tag, or -1. A tag without a category gets the category of its name."""
        if tag.category == RATING:
            name = self._rules.read_rating(tag.name) if any(self._is_rating) else None
            return self._columns.get((RATING, name), -1)
        category = self._categories.get(tag.name, GENERAL) if tag.category is None else tag.category
        return self._columns.get((category, tag.name), -1)
