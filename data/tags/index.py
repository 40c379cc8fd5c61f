"""The tags of a collection as outputs of a vocabulary, made once and memory-mapped by every process.

index = index_tags(collection, vocabulary, rules, cache=Path("outputs/cache/tags"))
index.of_row(0), index.rating_known[0], index.tagged[rows]
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.collection import Collection
from data.tags.names import AMBIGUOUS_RATINGS, Tag, parse_rating, parse_tag
from data.tags.rules import TagRules
from utils.errors import UserError
from utils.io.files import read_json, write_atomically, write_json
from utils.ranks import distributed
from utils.vocabulary import GENERAL, RATING, Vocabulary

_ARRAYS = ("ids", "offsets", "rating_known", "tagged")
_REPORT = "report.json"  # written last: a folder that has it is complete
_SHOWN = 5  # dropped tags that a report names
_NOT_THERE = "tags that are not in the vocabulary"
_CHUNK_ROWS = 2**17
_ABSENT, _UNKNOWN, _AMBIGUOUS = -1, -2, -3  # instead of an output


@dataclass(frozen=True, eq=False)
class TagRows:
    """The tags of rows as numbers: ids int32 [N], row after row, and offsets int64 [rows + 1]."""

    ids: np.ndarray
    offsets: np.ndarray

    def of_row(self, row: int) -> np.ndarray:
        """Return the ids of a row, int32 [n]."""
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def count(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Return how often some rows have each of `width` ids, int64 [width]."""
        chosen, counts = np.zeros(len(self.offsets) - 1, bool), np.zeros(width, np.int64)
        chosen[rows] = True
        for start in range(0, len(chosen), _CHUNK_ROWS):
            offsets = self.offsets[start : start + _CHUNK_ROWS + 1]
            has = np.repeat(chosen[start : start + _CHUNK_ROWS], np.diff(offsets))
            counts += np.bincount(self.ids[offsets[0] : offsets[-1]][has], minlength=width)
        return counts


@dataclass(frozen=True, eq=False)
class TagIndex(TagRows):
    """The outputs of each row, ascending, and what is known of it.

    rating_known: bool [rows], whether its ids have a rating. tagged: bool [rows], whether they have any other tag.
    report: numbers of rows and tags, and of what was dropped, by reason. folder: of the memory-mapped arrays; the index
    is pickled by it, so that a worker maps them itself.
    """

    rating_known: np.ndarray
    tagged: np.ndarray
    report: dict[str, Any]
    folder: Path | None = None

    @classmethod
    def open(cls, folder: Path) -> "TagIndex":
        """Map the files of a folder. Raises UserError (`data.root`) where it is damaged."""
        try:
            arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS]
            return cls(*arrays, read_json(folder / _REPORT), folder)
        except (OSError, ValueError) as error:
            raise UserError(
                f"data.root: the index {str(folder)!r} cannot be read ({error}); delete it, and it will be made again"
            ) from error

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        """Leave the arrays out."""
        return TagIndex.open, (self.folder,)


class NoKnownTag(UserError):
    """No image has a tag of the vocabulary."""


def index_tags(collection: Collection, vocabulary: Vocabulary, rules: TagRules, cache: Path) -> TagIndex:
    """Return the collection's tags as outputs of the vocabulary; made on rank 0 where `cache` lacks them.

    Raises UserError (`data.root`, `<key>rating_s`) as `map_tags` does, and NoKnownTag.
    """

    def make() -> str:
        folder = cache / f"{collection.fingerprint}-{vocabulary.hash}-{rules.hash}"
        if not (folder / _REPORT).is_file():
            found = map_tags(collection.table, vocabulary, rules)
            _refuse_empty(collection, vocabulary, found)
            for name in _ARRAYS:
                _write_array(folder / f"{name}.npy", getattr(found, name))
            write_json(folder / _REPORT, found.report)
        return str(folder)

    return TagIndex.open(Path(distributed.rank_zero_call(make)))


def map_tags(table: pa.Table, vocabulary: Vocabulary, rules: TagRules) -> TagIndex:
    """Map the columns `tags` and `rating` of a collection's table to outputs.

    A row's rating is its `rating`, else its one tag of a rating; else it is unknown.
    Raises UserError (`<key>rating_s`) where rows are rated `s` or `safe` and the rules do not say what that means.
    """
    mapper = _Mapper(vocabulary, rules)
    parts = [mapper.map_rows(*chunk) for chunk in _chunks(table)]
    if mapper.ambiguous:
        raise UserError(
            f"{rules.key}rating_s: null, and {mapper.ambiguous:,} of {len(table):,} images are rated s or safe; set "
            "sensitive (Danbooru since 2022) or general (Danbooru before, and other boorus)"
        )
    ids, lengths, known, tagged = (np.concatenate(arrays) for arrays in zip(*parts))
    offsets = np.zeros(len(table) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    report = {
        "rows": len(table), "tagged": int(tagged.sum()), "rated": int(known.sum()), "tags": len(ids),
        "dropped": dict(mapper.dropped), "such_as": [text for text, _ in mapper.unknown.most_common(_SHOWN)],
    }  # fmt: skip
    return TagIndex(ids, offsets, known, tagged, report)


def describe_report(report: dict[str, Any]) -> str:
    """Return a report in a line."""
    such = {_NOT_THERE: f" (such as {', '.join(map(repr, report['such_as']))})"}
    dropped = [f"{count:,} {reason}{such.get(reason, '')}" for reason, count in report["dropped"].items()]
    return (
        f"{report['tagged']:,} of {report['rows']:,} images have one of the vocabulary, {report['rated']:,} a known "
        f"rating; dropped: {'; '.join(dropped) or 'nothing'}"
    )


class _Mapper:
    """Map rows to a vocabulary's outputs, each distinct text once, and count what is dropped."""

    def __init__(self, vocabulary: Vocabulary, rules: TagRules) -> None:
        self._columns, self._rules = vocabulary.columns, rules
        named = [key for key in vocabulary.columns if key[0] != RATING]
        # The category of a name: general before others, else that of its first output.
        self._categories = {name: category for category, name in reversed(named)}
        self._categories |= {name: category for category, name in named if category == GENERAL}
        self._is_rating = np.asarray(vocabulary.categories) == RATING
        self._known: dict[str, list[int]] = {}
        self.dropped: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.ambiguous = 0

    def map_rows(self, tags: pa.ListArray, ratings: pa.StringArray) -> tuple[np.ndarray, ...]:
        """Return ids int32 [n], and of each row the number of ids, whether its rating is known, and whether tagged."""
        rows, ids = self._map_tags(tags)
        is_rating = self._is_rating[ids]
        rating = self._choose_ratings(ratings, *_unique_pairs(rows[is_rating], ids[is_rating]))
        rows, ids = rows[~is_rating], ids[~is_rating]
        tagged, known = np.zeros(len(tags), bool), np.flatnonzero(rating >= 0)
        tagged[rows] = True
        rows, ids = _unique_pairs(np.concatenate([rows, known]), np.concatenate([ids, rating[known]]))
        has_none = tags.value_lengths().to_numpy() == 0
        self._count("images without tags", has_none.sum())
        self._count("images without a tag of the vocabulary", (~tagged & ~has_none).sum())
        if self._is_rating.any():
            self._count("ratings that are absent", (rating == _ABSENT).sum())
            self._count("ratings that are unknown", (rating == _UNKNOWN).sum())
        return ids.astype(np.int32), np.bincount(rows, minlength=len(tags)), rating >= 0, tagged

    def _map_tags(self, tags: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
        """Return the row and the output of each tag, row after row; with repetitions."""
        texts, codes = _encode(tags.flatten())
        found = [self._outputs(text) for text in texts]
        for text, outputs, count in zip(texts, found, np.bincount(codes, minlength=len(texts)).tolist()):
            if not outputs:
                self._count(_NOT_THERE if text.strip() else "tags that are blank", count)
                self.unknown[text] += count
            self.ambiguous += count if outputs == [_AMBIGUOUS] else 0
        outputs = pa.array(found, pa.list_(pa.int64())).take(pa.array(codes))  # of each tag
        row_of_tag = np.repeat(np.arange(len(tags)), tags.value_lengths().to_numpy())
        rows, ids = np.repeat(row_of_tag, outputs.value_lengths().to_numpy()), outputs.flatten().to_numpy()
        return rows[ids >= 0], ids[ids >= 0]

    def _choose_ratings(self, ratings: pa.StringArray, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the output of each row's rating, int64 [rows], or _ABSENT, _UNKNOWN or _AMBIGUOUS.

        rows, ids: the ratings among the tags; a row's only one counts where its column states none.
        """
        stated = self._map_ratings(ratings)
        from_tags = np.full(len(stated), _ABSENT)
        from_tags[rows] = ids
        from_tags[np.bincount(rows, minlength=len(stated)) > 1] = _UNKNOWN
        return np.where((stated >= 0) | (from_tags == _ABSENT), stated, from_tags)

    def _map_ratings(self, ratings: pa.StringArray) -> np.ndarray:
        """Return the output of each row's rating, int64 [rows], or _ABSENT, _UNKNOWN or _AMBIGUOUS."""
        texts, codes = _encode(ratings.fill_null(""))
        found = np.array([self._rating(text) for text in texts], np.int64)[codes]
        self.ambiguous += int((found == _AMBIGUOUS).sum())
        return found

    def _outputs(self, text: str) -> list[int]:
        """Return the outputs of a text: its tag's and those of the tags that follow from it."""
        if text not in self._known:
            tag = self._rules.resolve(parse_tag(text))
            found = [self._find(meant) for meant in (tag, *self._rules.implications.get(tag.name, ()))]
            self._known[text] = [output for output in found if output >= 0 or output == _AMBIGUOUS]
        return self._known[text]

    def _find(self, tag: Tag) -> int:
        """Return a tag's output, negative for none. Without a category it has that of its name in the vocabulary."""
        if tag.category == RATING:
            return self._rating(tag.name)
        category = self._categories.get(tag.name, GENERAL) if tag.category is None else tag.category
        return self._columns.get((category, tag.name), _UNKNOWN)

    def _rating(self, text: str) -> int:
        """Return the output of a rating, or _ABSENT, _UNKNOWN or _AMBIGUOUS."""
        rating = parse_rating(text)
        if rating in AMBIGUOUS_RATINGS:
            if self._rules.rating_s is None and self._is_rating.any():
                return _AMBIGUOUS
            rating = self._rules.rating_s
        return self._columns.get((RATING, rating), _UNKNOWN if rating else _ABSENT)

    def _count(self, reason: str, count: int) -> None:
        if count:
            self.dropped[reason] += int(count)


def _chunks(table: pa.Table) -> Iterable[tuple[pa.ListArray, pa.StringArray]]:
    """Yield the tags and ratings of some rows after another; at least once."""
    for start in range(0, max(len(table), 1), _CHUNK_ROWS):
        part = table.slice(start, _CHUNK_ROWS)
        yield part["tags"].combine_chunks(), part["rating"].combine_chunks()


def _encode(texts: pa.StringArray) -> tuple[list[str], np.ndarray]:
    """Return the distinct texts, and the position of each text among them."""
    encoded = texts.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()


def _unique_pairs(rows: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs sorted by row, then by id, each once."""
    order = np.lexsort((ids, rows))
    rows, ids = rows[order], ids[order]
    is_new = np.ones(len(rows), bool)
    is_new[1:] = (np.diff(rows) != 0) | (np.diff(ids) != 0)
    return rows[is_new], ids[is_new]


def _write_array(path: Path, array: np.ndarray) -> None:
    def write(file: Path) -> None:
        with open(file, "wb") as stream:
            np.lib.format.write_array(stream, array, allow_pickle=False)

    write_atomically(path, write)


def _refuse_empty(collection: Collection, vocabulary: Vocabulary, found: TagIndex) -> None:
    """Raise NoKnownTag where no row has a tag of the vocabulary."""
    if not found.tagged.any():
        names = [name for name, category in zip(vocabulary.names, vocabulary.categories) if category != RATING]
        such = f"their tags are such as {found.report['such_as']}" if found.report["such_as"] else "they have no tag"
        raise NoKnownTag(
            f"data.root: none of the {len(collection):,} images of {str(collection.root)!r} has a tag of the "
            f"vocabulary ({len(names):,} tags, such as {names[:_SHOWN]}); {such}. Give them sidecars or a manifest "
            "(docs/collections.md), or choose another vocabulary"
        )
