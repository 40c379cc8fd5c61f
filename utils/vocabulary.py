"""The vocabulary of a tagger is a file of the form that taggers are shipped with: selected_tags.csv.

    tag_id,name,category,count
    9999999,general,9,51234
    470575,1girl,0,44120

Row i, counted from 0 behind the header, names output i. There is no padding and no row for unknown tags. Further
columns are allowed, and not read here.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from utils.errors import UserError
from utils.io.files import sha256_text
from utils.record.report import write_table

# Danbooru's numbers of categories.
CATEGORIES = {"general": 0, "artist": 1, "copyright": 3, "character": 4, "meta": 5, "rating": 9}
GENERAL, CHARACTER, RATING = 0, 4, 9
_CATEGORY_NAMES = {number: name for name, number in CATEGORIES.items()}
# The four ratings come first, in this order, with the numbers that published taggers give them.
RATINGS = {"general": 9999999, "sensitive": 9999998, "questionable": 9999997, "explicit": 9999996}
FILE = "selected_tags.csv"
FACTS = ("tag_names", "tag_categories", "tag_counts", "tag_ids")  # in metadata
_SCHEMA = pa.schema([("tag_id", pa.int64()), ("name", pa.string()), ("category", pa.int64()), ("count", pa.int64())])
_SHOWN = 5  # names that a message shows


def category_name(number: int) -> str:
    """Return a category's name, or its number where it has none."""
    return _CATEGORY_NAMES.get(number, str(number))


@dataclass(frozen=True)
class Vocabulary:
    """The outputs of a tagger, in their order: `names[i]` of `categories[i]`, on `counts[i]` training images.

    A rating and a tag may share a name (`general` is both on some boards); a name is unique within its category.
    """

    names: tuple[str, ...]
    categories: tuple[int, ...]
    counts: tuple[int, ...]
    tag_ids: tuple[int, ...]

    @classmethod
    def of(cls, keys: Iterable[tuple[int, str]]) -> Self:
        """Return the tags of some (category, name), with counts and numbers of 0."""
        keys = list(keys)
        nothing = (0,) * len(keys)
        return cls(tuple(name for _, name in keys), tuple(category for category, _ in keys), nothing, nothing)

    def __len__(self) -> int:
        """Return the number of outputs."""
        return len(self.names)

    @cached_property
    def hash(self) -> str:
        """Return 16 hexadecimal digits of the names and categories in their order, which give outputs their meaning."""
        return sha256_text("\n".join(f"{category} {name}" for category, name in zip(self.categories, self.names)))[:16]

    @cached_property
    def columns(self) -> dict[tuple[int, str], int]:
        """Return the output of each (category, name)."""
        return {key: index for index, key in enumerate(zip(self.categories, self.names))}

    def of_category(self, category: int) -> np.ndarray:
        """Return the outputs of a category, int64 [n], ascending."""
        return np.flatnonzero(np.asarray(self.categories) == category)

    def facts(self) -> dict[str, Any]:
        """Return it as the metadata of a weight file."""
        columns = self.names, self.categories, self.counts, self.tag_ids
        return {name: list(column) for name, column in zip(FACTS, columns)}


def vocabulary_of(metadata: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary that `Vocabulary.facts` put into metadata."""
    return Vocabulary(*(tuple(metadata[name]) for name in FACTS))


def read_facts(path: Path, metadata: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary of a weight file, which may be a stranger's, from its metadata.

    Raises UserError that names the first wrong entry: a list of other values or another length, another hash.
    """
    wrong = f"{path} has wrong metadata"
    columns = [metadata.get(name) for name in FACTS]
    for name, column, kind in zip(FACTS, columns, (str, int, int, int)):
        if not isinstance(column, list) or len(column) != len(columns[0]):
            raise UserError(f"{wrong} ({name}: not a list as long as {FACTS[0]}); make the file again")
        if not all(type(value) is kind and (kind is str or 0 <= value < 2**63) for value in column):
            raise UserError(f"{wrong} ({name}: not all {kind.__name__}, of numbers from 0); make the file again")
    found = vocabulary_of(metadata)
    check_vocabulary(found, path)
    if (stated := metadata.get("vocabulary_hash")) != found.hash:
        raise UserError(f"{wrong} (vocabulary_hash: {stated!r}, of its tags {found.hash!r}); make the file again")
    return found


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a selected_tags.csv. Raises UserError that names the first wrong row."""
    try:
        table = arrow_csv.read_csv(
            path, convert_options=arrow_csv.ConvertOptions(column_types=_SCHEMA, include_columns=_SCHEMA.names,
                                                     strings_can_be_null=False),
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; prepare.py job=vocabulary makes one") from None
    except (pa.ArrowException, KeyError, OSError) as error:
        raise UserError(
            f"{path} is no vocabulary ({error}); it needs the columns {', '.join(_SCHEMA.names)}, as "
            "prepare.py job=vocabulary writes them"
        ) from None
    found = Vocabulary(*(tuple(table[name].to_pylist()) for name in ("name", "category", "count", "tag_id")))
    check_vocabulary(found, path)
    return found


def check_vocabulary(vocabulary: Vocabulary, path: Path) -> None:
    """Raise UserError where a row has no meaning or two mean the same."""
    if len(vocabulary) == 0:
        raise UserError(f"{path} has no tag")
    for row, (category, name) in enumerate(zip(vocabulary.categories, vocabulary.names)):
        if category is None or not name or name != name.strip() or "\n" in name:
            raise UserError(
                f"{path}, row {row}: name {name!r}, category {category}; each row needs a name and a category"
            )
    if len(vocabulary.columns) < len(vocabulary):
        keys = Counter(zip(vocabulary.categories, vocabulary.names))
        category, name = keys.most_common(1)[0][0]
        raise UserError(f"{path} has {name!r} of category {category} more than once; keep one of the rows")


def write_vocabulary(path: Path, vocabulary: Vocabulary, further: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Write a selected_tags.csv, atomically; further: more columns, behind the four."""
    columns = vocabulary.tag_ids, vocabulary.names, vocabulary.categories, vocabulary.counts, *(further or {}).values()
    names = [*_SCHEMA.names, *(further or {})]
    write_table(path, [dict(zip(names, row)) for row in zip(*columns)])


def describe_difference(ours: Vocabulary, theirs: Vocabulary) -> str:
    """Return how two vocabularies differ, for messages: the outputs that one lacks, or the first that moved."""
    only = [sorted(a.columns.keys() - b.columns.keys()) for a, b in ((ours, theirs), (theirs, ours))]
    if not only[0] and not only[1]:
        moved = next(i for i in range(len(ours)) if ours.names[i] != theirs.names[i])
        return f"the same tags in another order, from row {moved} on: {ours.names[moved]!r} and {theirs.names[moved]!r}"
    shown = [f"{len(keys)} ({', '.join(name for _, name in keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''})"
             for keys in only]  # fmt: skip
    return f"{len(ours)} and {len(theirs)} tags; only in the first: {shown[0]}; only in the second: {shown[1]}"
