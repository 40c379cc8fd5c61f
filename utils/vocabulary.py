"""The vocabulary of a tagger is a file of the form that taggers are shipped with: selected_tags.csv.

    tag_id,name,category,count
    9999999,general,9,51234
    470575,1girl,0,44120

Row i, counted from 0 behind the header, names output i. There is no padding and no row for unknown tags. Further
columns are allowed, and not read here.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator

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
_COLUMNS = dict(zip(("name", "category", "count", "tag_id"), FACTS))
_SHOWN = 5  # names that a message shows
_Name = Annotated[str, Field(pattern=r"^\S(.*\S)?$")]
_Number = Annotated[int, Field(ge=0, lt=2**63)]


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
        return dict(zip(FACTS, map(list, (self.names, self.categories, self.counts, self.tag_ids))))


def vocabulary_of(metadata: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary that `Vocabulary.facts` put into metadata."""
    return Vocabulary(*(tuple(metadata[name]) for name in FACTS))


class _Facts(BaseModel):
    """The columns of a file, which may be a stranger's."""

    tag_names: Annotated[tuple[_Name, ...], Field(min_length=1)]
    tag_categories: tuple[_Number, ...]
    tag_counts: tuple[_Number, ...]
    tag_ids: tuple[_Number, ...]

    @model_validator(mode="after")
    def _has_a_row_for_each_tag(self) -> Self:
        for name in FACTS:
            if len(getattr(self, name)) != len(self.tag_names):
                raise ValueError(f"{len(getattr(self, name))} {name} for {len(self.tag_names)} tags")
        (category, name), count = Counter(zip(self.tag_categories, self.tag_names)).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{name!r} of category {category} is there more than once")
        return self


def check_facts(path: Path, metadata: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary of a file's metadata. Raises UserError that names the first wrong value."""
    try:
        return vocabulary_of(_Facts.model_validate(metadata).model_dump())
    except ValidationError as error:
        place, why = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise UserError(f"{path} has wrong tags ({place}: {why}); make the file again") from None


def read_facts(path: Path, metadata: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary of a weight file. Raises UserError that names the first wrong value, or another hash."""
    found = check_facts(path, metadata)
    if (stated := metadata.get("vocabulary_hash")) != found.hash:
        raise UserError(
            f"{path} has wrong tags (vocabulary_hash: {stated!r}, found {found.hash!r}); make the file again"
        )
    return found


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a selected_tags.csv. Raises UserError that names the first wrong value."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            rows = [[row[column] for column in _COLUMNS] for row in csv.DictReader(stream)]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; prepare.py job=vocabulary makes one") from None
    except (KeyError, ValueError, OSError, csv.Error) as error:
        raise UserError(
            f"{path} is no vocabulary ({error}); it needs the columns {', '.join(_COLUMNS)}, as prepare.py "
            "job=vocabulary writes them"
        ) from None
    return check_facts(path, dict(zip(_COLUMNS.values(), zip(*rows))))


def write_vocabulary(path: Path, vocabulary: Vocabulary, further: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Write a selected_tags.csv, atomically; further: more columns, behind the four."""
    columns = {
        "tag_id": vocabulary.tag_ids, "name": vocabulary.names, "category": vocabulary.categories,
        "count": vocabulary.counts, **(further or {}),
    }  # fmt: skip
    write_table(path, [dict(zip(columns, row)) for row in zip(*columns.values())])


def describe_difference(ours: Vocabulary, theirs: Vocabulary) -> str:
    """Return how two vocabularies differ, for messages: the outputs that one lacks, or their order."""
    first, second = (
        [name for _, name in sorted(a.columns.keys() - b.columns.keys())] for a, b in ((ours, theirs), (theirs, ours))
    )
    if not first and not second:
        return "the same tags in another order"
    return (
        f"{len(ours)} and {len(theirs)} tags; {len(first)} only in the first: {', '.join(first[:_SHOWN]) or 'none'}; "
        f"{len(second)} only in the second: {', '.join(second[:_SHOWN]) or 'none'}"
    )
