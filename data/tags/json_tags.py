"""Read the tags of another tagger's JSON file, such as vocabulary.json, tag_mapping.json or config.json.

["1girl", "blue_eyes"]                                  also [["1girl", 44120], ...]
{"1girl": 0, "blue_eyes": 1}, {"0": "1girl", "1": "blue_eyes"}
{"0": {"tag": "1girl", "category": "General", "count": 44120}}, {"1girl": {"index": 0, ...}}
{"idx_to_tag": {...}, "tag_to_category": {...}, "tag_frequencies": {...}}    such a table in any dictionary
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, Field, TypeAdapter

from utils.formats.spelling import PREFIXES, Tag, parse_tag
from utils.formats.vocabulary import CATEGORIES, RATING, RATINGS
from utils.io.files import read_json

# The names of tables; the first that a file has is read.
_ORDERS = (
    "index_to_tag idx_to_tag id_to_tag id2label tag_to_index tag_to_idx tag_to_id label2id tags tag_names vocabulary "
    "vocab labels names"
)
_PADDING = ("<pad>", "<unk>")
_SHOWN = 80  # characters of a file in a message


class _Entry(BaseModel):
    tag: str = Field(validation_alias=AliasChoices("tag", "name", "label"))
    index: int | None = Field(None, validation_alias=AliasChoices("index", "idx", "id"))
    category: int | str | None = None
    count: int = Field(0, ge=0, validation_alias=AliasChoices("count", "frequency", "post_count"))


def read_json_tags(path: Path) -> list[tuple[Tag, int]]:
    """Return the tags in the order of the outputs, and their counts or 0. Raises ValueError for an unknown form."""
    content = read_json(path)
    tables = {"": content, **dict(_find_tables(content))}

    def find(names: str) -> Any:
        return next((tables[name] for name in names.split() if name in tables), {})

    try:
        entries = _list_entries(find(_ORDERS) or content)
        categories = TypeAdapter(dict[str, int | str]).validate_python(find("tag_to_category categories"))
        counts = TypeAdapter(dict[str, int]).validate_python(find("tag_frequencies tag_counts frequencies counts"))
    except (LookupError, TypeError, ValueError):  # pydantic's errors are ValueErrors
        raise ValueError(f"an unknown form: {json.dumps(content)[:_SHOWN]}") from None
    if RATINGS.keys() <= {entry.tag for entry in entries}:
        categories = {**dict.fromkeys(RATINGS, RATING), **categories}
    tags = []
    for entry in entries:
        tag = parse_tag(entry.tag)
        category = entry.category if entry.category is not None else categories.get(entry.tag, tag.category)
        if isinstance(category, str):
            category = PREFIXES.get(category.lower(), CATEGORIES["meta"])
        tags.append((Tag(category, tag.name), entry.count or counts.get(entry.tag, 0)))
    return [(tag, count) for tag, count in tags if tag.name not in _PADDING]


def _find_tables(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield the lists and dictionaries in a dictionary, at any depth, with their names."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, list | dict):
            yield name, value
            yield from _find_tables(value)


def _list_entries(table: Any) -> list[_Entry]:
    """Return the entries of a table in the order of the outputs. Raises ValueError, TypeError."""
    if not isinstance(table, dict):
        return [_read_entry(row) for row in table]
    if all(map(str.isdecimal, table)):
        return [_read_entry(table[key]) for key in sorted(table, key=int)]
    rows = {tag: row if isinstance(row, dict) else {"index": row} for tag, row in table.items()}
    entries = [_read_entry({"tag": tag, **row}) for tag, row in rows.items()]
    by_index = {entry.index: entry for entry in entries}
    return [by_index[index] for index in range(len(entries))]


def _read_entry(row: Any) -> _Entry:
    if isinstance(row, list):
        row = dict(zip(("tag", "count"), row, strict=True))
    return _Entry.model_validate(row if isinstance(row, dict) else {"tag": row})
