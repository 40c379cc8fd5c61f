"""A tagger's vocabulary: selected_tags.csv, the format of published taggers.

    tag_id,name,category,count
    9999999,general,9,51234
    470575,1girl,0,44120

Row i, counted from 0 after the header, names output i. There is no padding and no row for unknown tags. Further
columns are ignored. Other taggers list their tags in .txt and .json files, too.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, TypeAdapter

from utils.config.bounds import between
from utils.formats.spelling import GENERAL, PREFIXES, RATING, RATINGS, Tag, category_name, parse_tag
from utils.io.files import Json, Values, readable, sha256_text
from utils.io.names import to_nfc
from utils.record.report import write_table

FILE = "selected_tags.csv"
FACTS = ("tag_names", "tag_categories", "tag_counts", "tag_ids")  # keys in metadata
_COLUMNS = {"tag_id": "tag_ids", "name": "tag_names", "category": "tag_categories", "count": "tag_counts"}
_TABLES = ("index_to_tag", "idx_to_tag", "id2label", "tag_to_index", "tag_to_idx", "tags")  # of another tagger's JSON
_AROUND = ("dataset_info", "tag_mapping")  # the dictionaries around them
_NO_TAGS = ("<pad>", "<unk>")
_FORMS = (
    "its form is none of these: a .txt with a tag on each line; a .json with a list of tags, a dictionary from tags to "
    "indices or from indices to tags, or entries with tag and category; the selected_tags.csv of prepare.py "
    "job=vocabulary"
)
_Name = Annotated[str, Field(pattern=r"^\S(.*\S)?$")]
_Number = between(int, 0, 2**63 - 1)


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

    @cached_property
    def spelled(self) -> dict[tuple[int, str], int]:
        """Return {(category, name in our spelling): output}."""
        # A name such as `meta:x` is no category.
        spell = {name: parse_tag(f"general:{name}").name for name in self.names}
        return {(category, spell[name]): output for (category, name), output in self.columns.items()}

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
        rows = [[to_nfc(row[column]) for column in _COLUMNS] for row in csv.DictReader(stream, delimiter=separator)]
    return read_facts(path, dict(zip(_COLUMNS.values(), zip(*rows))))


def complete(chosen: Sequence[tuple[Tag, int]]) -> Vocabulary:
    """Return the vocabulary of tags and their counts, with ids."""
    tags, counts = zip(*chosen)
    ids = tuple(RATINGS[tag.name] if tag.category == RATING else row for row, tag in enumerate(tags))
    return replace(Vocabulary.of(tags), counts=counts, tag_ids=ids)


def read_any_vocabulary(path: Path, *, is_exact: bool = False) -> Vocabulary:
    """Read the vocabulary of a run, selected_tags.csv, or the tags of a .txt or .json file, in our spelling.

    A .txt has a tag on each line; `_read_tags` has the forms of .json. The order is kept, without padding; if one tag
    is a rating, the four ratings come first. A bare tag is a general one. is_exact: a row for each output of a tagger,
    as it is. Raises UserError.
    """
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".json"):
        known = read_vocabulary(path)
        with readable(path, "vocabulary"):
            return known if is_exact else replace(known, names=tuple(name for _, name in known.spelled))
    with readable(path, "vocabulary", _FORMS):
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if suffix == ".json" else text.split("\n")
        read = [(parse_tag(tag), count or int(is_exact)) for tag, count in _read_tags(content) if tag.strip()]
        tags = [(Tag(tag.category or GENERAL, tag.name.removeprefix("rating_")), count) for tag, count in read]
        if not is_exact:
            others = [entry for entry in tags if entry[0].category != RATING]
            ratings = [(Tag(RATING, name), 1) for name in RATINGS if len(others) < len(tags)]
            tags = ratings + [entry for entry in others if entry[0].name not in _NO_TAGS]
        return complete(tags)


def _read_tags(content: Any) -> Iterator[tuple[str, int]]:
    """Yield the tags of a tagger in order, and their counts or 0. Raises various errors for an unknown form.

    content: a list, a dictionary from tags to indices or from indices to tags, or one that has such a table. An entry
    is a text, or a dictionary with `tag`, and perhaps `category`.
    """
    tables = content if isinstance(content, dict) else {}
    for name in _AROUND:
        tables = tables.get(name, tables)
    table = next((tables[name] for name in _TABLES if name in tables), content)
    if isinstance(table, dict):
        table = table if "0" in table else {str(index): tag for tag, index in table.items()}
        table = [table[str(index)] for index in range(len(table))]
    for row in table:
        row = row if isinstance(row, dict) else {"tag": row}
        tag = row["tag"]
        category = row.get("category") or tables.get("tag_to_category", {}).get(tag)
        count = tables.get("tag_frequencies", {}).get(tag, 0)
        category = category_name(category).lower() if category else ""
        yield f"{category if category in PREFIXES else 'meta'}:{tag}" if category else tag, count


def write_vocabulary(path: Path, vocabulary: Vocabulary, further: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Write selected_tags.csv atomically; further: columns after the four."""
    facts = vocabulary.facts()
    columns = {**{column: facts[name] for column, name in _COLUMNS.items()}, **(further or {})}
    write_table(path, [dict(zip(columns, row)) for row in zip(*columns.values())])
