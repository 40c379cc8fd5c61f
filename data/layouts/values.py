"""One rule for a value: every reader gives the same text for a label, a tag, a caption and a rating.

    read_label(" cat\xa0")               "cat"
    read_label(1.0), read_label(True)    "1", "True"
    read_tags("['red hat', 'sky']")      ("red hat", "sky")

Each function returns None for no value, and raises ValueError for one of another type.
"""

import functools
import json
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import Table

from data.layouts.table import TAG_LISTS, TYPES
from utils.formats.spelling import clean, read_list, split_tags

RULES = 1  # increment it when a value is read as another one: every index is made again
_MARKS = ",，\n;|"  # between the tags of a text: the first one that a column has, else blanks
_PLAIN = r"^[!-%'-Z\\^-~]([ -%'-~]*[!-%'-~])?$"  # of one line of ASCII, without an entity, and no list
_CACHED = 2**16  # values of a column
_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))\.0+")
_WANTED = {
    "label": "one text or one number (data.columns={tags: NAME} reads lists as tags)",
    "tags": "a list of texts, or one text",
    "caption": "a text, or a list of texts",
    "rating": "a text, or a whole number of at most 3",
}


def read_label(value: Any) -> str | None:
    """Return a text on one line; a whole number without a point, and a truth value as Python writes it.

    -1 is none, as Hugging Face has it. A JSON object of one value, such as VIA's {"class": "cat"}, is this value.
    """
    if isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError):
            [value] = json.loads(value).values()
    listed = read_list(value) if isinstance(value, str) else None
    text = _without_point(" ".join(_write("label", value if listed is None else listed).split()))
    return None if text in ("", "-1") else text


def read_rating(value: Any) -> str | None:
    """Return a text, or a number from 0 to 3."""
    text = read_label(value)
    return text if isinstance(value, str) or text in (None, *"0123") else refuse_value("rating", value)


def read_tags(value: Any) -> tuple[str, ...] | None:
    """Return the texts of a list without repetitions. A text is split at commas and lines, or else at blanks."""
    if value is None:
        return None
    if isinstance(value, str):
        value = _split(value, next(filter(value.__contains__, ",，\n"), " "))
    items = value if isinstance(value, list) else [value]
    return join_equal(_write("tags", item) for item in items)


def read_caption(value: Any) -> str | None:
    """Return a text. The texts of a list become lines."""
    texts = read_list(value) if isinstance(value, str) else value
    if isinstance(texts, list):
        lines = [" ".join(_write("caption", text).split()) for text in texts]
        return "\n".join(filter(None, lines)) or None
    return "\n".join(map(str.strip, _write("caption", value).splitlines())) or None


READ = {
    "tags": read_tags,
    "caption": read_caption,
    "unknown_tags": lambda value: read_tags(value) or None,
    "rating": read_rating,
    "label": read_label,
}
FIELDS = tuple(READ)


def join_equal(texts: Iterable[str]) -> tuple[str, ...]:
    """Return texts without blank and repeated ones, in their order; interned, because collections repeat tags."""
    return tuple(dict.fromkeys(sys.intern(text) for text in map(clean, texts) if text))


def read_column(field: str, table: Table, name: str, rows: Sequence[int]) -> pa.ChunkedArray:
    """Return a column of a table as a field of READ. Raises ValueError with the number of the row in `rows`."""
    read = _open_reader(field, table, name)
    chunks = []
    first = 0
    for chunk in table[name].chunks:
        if _is_tidy(field, chunk):
            chunks.append(chunk.cast(TYPES[field]))
        else:
            values = []
            for number, value in enumerate(chunk.to_pylist(), start=first):
                try:
                    values.append(read(value))
                except ValueError as error:
                    raise ValueError(f"row {rows[number]} has {error}") from None
            chunks.append(pa.array(values, TYPES[field]))
        first += len(chunk)
    return pa.chunked_array(chunks, TYPES[field])


def _open_reader(field: str, table: Table, name: str) -> Callable[[Any], Any]:
    """Return the reader of a column's values, which names numbers of classes, and splits tags at one mark."""
    names = _class_names(table.schema, name)
    column = table.column(name)
    is_nested = pa.types.is_nested(column.type)
    mark = None if field not in TAG_LISTS or is_nested else _find_mark(column)

    def read(value: Any) -> Any:
        if mark and isinstance(value, str):
            value = _split(value, mark)
        elif names:
            value = [names.get(item, item) for item in value] if isinstance(value, list) else names.get(value, value)
        return READ[field](value)

    return read if is_nested else functools.lru_cache(_CACHED)(read)


def _class_names(schema: pa.Schema, name: str) -> dict[int, str]:
    """Return the names of a column's classes, or of classes in lists, in the schema that `datasets` writes."""
    with suppress(KeyError, TypeError, ValueError):
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][name]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
        return dict(enumerate(map(str, feature["names"])))
    return {}


def _find_mark(column: pa.ChunkedArray | pa.Array) -> str:
    """Return the mark between the tags of a column: the first of _MARKS that any text has, else a blank."""
    texts = pc.replace_substring_regex(column.cast(pa.string()), r"&#?\w+;", "")
    return next((mark for mark in _MARKS if pc.any(pc.match_substring(texts, mark)).as_py()), " ")


def _split(text: str, mark: str) -> list[Any]:
    text = clean(text)
    listed = read_list(text)
    if listed is not None:
        return listed
    return text.split() if mark == " " else split_tags(text.replace(mark, ","))


def _is_tidy(field: str, chunk: pa.Array) -> bool:
    """Return whether the rules change no value. Arrow finds this without a Python call for each value."""
    if field == "caption" and pa.types.is_string(chunk.type):
        return pc.all(pc.match_substring_regex(chunk, _PLAIN)).as_py() is not False
    if field not in TAG_LISTS or not re.match(r"(large_)?list<\w+: (large_)?string( not null)?>", str(chunk.type)):
        return False
    items = chunk.flatten().dictionary_encode()
    texts = items.dictionary.to_pylist()
    if items.null_count or not all(text and text == clean(text) for text in texts):
        return False
    places = pc.list_parent_indices(chunk).to_numpy() * len(texts) + items.indices.to_numpy()
    return bool(np.diff(np.sort(places)).all())  # none is twice in a list


def _write(field: str, value: Any) -> str:
    """Return a text, a number or a truth value as a clean text; None and NaN become ""."""
    if isinstance(value, str):
        return clean(value)
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, list | tuple | dict | bytes):
        refuse_value(field, value)
    return _without_point(str(value))


def _without_point(text: str) -> str:
    number = _WHOLE.fullmatch(text)
    return number[1] if number else text


def refuse_value(field: str, value: Any) -> NoReturn:
    """Raise ValueError for a value of a wrong type."""
    raise ValueError(f"the {field} {reprlib.repr(value)}; write {_WANTED[field]}")
