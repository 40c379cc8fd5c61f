"""A tagger's vocabulary: selected_tags.csv, the format of published taggers.

    tag_id,name,category,count
    9999999,general,9,51234
    470575,1girl,0,44120

Row i, counted from 0 after the header, names output i. There is no padding and no row for unknown tags. Further
columns are ignored.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, TypeAdapter

from utils.io.files import Json, Values, readable, sha256_text
from utils.io.names import to_nfc
from utils.record.report import write_table

FILE = "selected_tags.csv"
FACTS = ("tag_names", "tag_categories", "tag_counts", "tag_ids")  # keys in metadata
_COLUMNS = {"tag_id": "tag_ids", "name": "tag_names", "category": "tag_categories", "count": "tag_counts"}
_Name = Annotated[str, Field(pattern=r"^\S(.*\S)?$")]
_Number = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Vocabulary:
    """A tagger's outputs in order: tag `names[i]` in `categories[i]`, on `counts[i]` training images.

    A name is unique within its category; a rating and a tag may share a name (`general` on some boards).
    """

    names: Annotated[tuple[_Name, ...], Field(min_length=1, alias="tag_names")]  # the aliases are `FACTS`
    categories: Annotated[tuple[_Number, ...], Field(alias="tag_categories")]
    counts: Annotated[tuple[_Number, ...], Field(alias="tag_counts")]
    tag_ids: tuple[_Number, ...]

    def __post_init__(self) -> None:
        """Raise ValueError if a tag lacks a value or occurs twice."""
        for name, values in self.facts().items():
            if len(values) != len(self):
                raise ValueError(f"{len(values)} {name} for {len(self)} tags")
        if len(self.columns) < len(self):
            (category, name), _ = Counter(zip(self.categories, self.names)).most_common(1)[0]
            raise ValueError(f"{name!r} of category {category} occurs more than once")

    @classmethod
    def of(cls, keys: Iterable[tuple[int, str]]) -> Self:
        """Return a vocabulary of (category, name) pairs, with zeros for counts and ids."""
        keys = list(keys)
        categories, names = zip(*keys) if keys else ((), ())
        zeros = (0,) * len(keys)
        return cls(names, categories, zeros, zeros)

    def __len__(self) -> int:
        """Return the number of outputs."""
        return len(self.names)

    @cached_property
    def hash(self) -> str:
        """Return 16 hexadecimal digits that identify the names and categories in their order."""
        return sha256_text("\n".join(f"{category} {name}" for category, name in zip(self.categories, self.names)))[:16]

    @cached_property
    def columns(self) -> dict[tuple[int, str], int]:
        """Return {(category, name): output}."""
        return {key: index for index, key in enumerate(zip(self.categories, self.names))}

    def of_category(self, category: int) -> np.ndarray:
        """Return the outputs in a category, int64 [n], ascending."""
        return np.flatnonzero(np.asarray(self.categories) == category)

    def facts(self) -> Json:
        """Return the vocabulary as metadata for a weight file."""
        return dict(zip(FACTS, map(list, (self.names, self.categories, self.counts, self.tag_ids))))


def vocabulary_of(metadata: Values) -> Vocabulary:
    """Return the vocabulary from metadata that `Vocabulary.facts` wrote."""
    return Vocabulary(*(tuple(metadata[name]) for name in FACTS))


def read_facts(path: Path, metadata: Values) -> Vocabulary:
    """Return the vocabulary from a file's metadata. Raises UserError, which names the first wrong value."""
    with readable(path, "tag"):
        return TypeAdapter(Vocabulary).validate_python(metadata)


def read_vocabulary(path: Path) -> Vocabulary:
    """Read selected_tags.csv; for a run folder, the file in it. Raises UserError, which names the first wrong value."""
    path = path / FILE if path.is_dir() else path
    advice = "prepare.py job=vocabulary writes one"
    with readable(path, "vocabulary", advice), open(path, encoding="utf-8-sig", newline="") as stream:
        separator = max(",;", key=stream.readline().count)
        stream.seek(0)
        read = csv.DictReader(stream, delimiter=separator)
        rows = [[to_nfc(row[column]) for column in _COLUMNS] for row in read]
    return read_facts(path, dict(zip(_COLUMNS.values(), zip(*rows))))


def write_vocabulary(path: Path, vocabulary: Vocabulary, further: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Write selected_tags.csv atomically; further: columns after the four."""
    facts = vocabulary.facts()
    columns = {**{column: facts[name] for column, name in _COLUMNS.items()}, **(further or {})}
    write_table(path, [dict(zip(columns, row)) for row in zip(*columns.values())])
