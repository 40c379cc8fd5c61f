"""Parse the texts and JSON records of boorus, captioning programs and Hydrus.

A tag with a known category gets it as a prefix, such as `character:hatsune_miku`, which data/tags/spelling.py reads.
"""

import itertools
import json
import re
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.vocabulary import CATEGORIES

_PREFIXES = ("artist", "character", "copyright", "meta")  # general tags have no prefix
# The fields with tags of one category: texts of Danbooru, lists of gallery-dl.
CATEGORY_FIELDS = {f"{form}_{name}": name for form in ("tag_string", "tags") for name in CATEGORIES}
FIELDS = ("id", "md5", "rating", "caption", "tags", "tag_string", *CATEGORY_FIELDS)
_SEPARATORS = re.compile(r"[,\n]")


class Sidecar(NamedTuple):
    """The metadata of an image; None for unknown fields."""

    tags: tuple[str, ...] | None = None
    rating: str | None = None
    caption: str | None = None
    id: int | None = None

    def updated(self, newer: "Sidecar | None") -> "Sidecar":
        """Return a copy with the known fields of `newer`."""
        return self if newer is None else Sidecar(*(a if b is None else b for a, b in zip(self, newer)))


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError for invalid JSON, or for a lone surrogate, which UTF-8 cannot encode."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def parse_text(text: str, one_per_line: bool = False) -> Sidecar:
    """Split a text into tags at commas and lines; the text is also the caption.

    one_per_line: if the text has several lines, each line is one tag, commas included, as written by Hydrus.
    """
    caption = text.strip()
    pieces = caption.split("\n") if one_per_line and "\n" in caption else _SEPARATORS.split(caption)
    return Sidecar(_unique(pieces), None, caption or None)


def parse_record(where: str, record: dict[str, Any]) -> Sidecar:
    """Read a record of a booru, of gallery-dl or of our predecessor. Raises UserError (`data.root`) with `where`.

    where: the position of the record, for messages.
    """
    number, rating = record.get("id"), record.get("rating")
    rating = str(rating) if type(rating) is int and 0 <= rating <= 3 else rating
    texts = {"rating": rating, "caption": record.get("caption")}
    for key, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise UserError(f"data.root: {key!r} in {where} is {value!r}; write a text, or remove it")
        texts[key] = (value or "").strip() or None
    return Sidecar(
        _tags_of_record(where, record), **texts, id=number if type(number) is int and abs(number) < 2**63 else None
    )


def _tags_of_record(where: str, record: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the tags of a record, or None: from `tags`, else `tag_string`, else the fields of categories.

    Categories come from CATEGORY_FIELDS, or from `tags` if it is an object.
    """
    whole = next((name for name in ("tags", "tag_string") if record.get(name) is not None), None)
    parts = [(category, name, record.get(name)) for name, category in CATEGORY_FIELDS.items()]
    if isinstance(record.get("tags"), dict):
        parts, whole = [(category, "tags", value) for category, value in record["tags"].items()], None
    words = {category: _words(where, name, value) for category, name, value in parts if value is not None}
    if whole is None and not words:
        return None
    prefixed = {word: f"{category}:{word}" for category in _PREFIXES for word in words.get(category, ())}
    every = itertools.chain(*words.values()) if whole is None else _words(where, whole, record[whole])
    return _unique(prefixed.get(word, word) for word in every)


def _words(where: str, field: str, value: Any) -> list[str]:
    """Return the tags of a list or a text.

    Texts of boorus separate tags by spaces. A `tags` text with a comma, as written by hand, is split at commas.
    """
    if isinstance(value, str):
        return _SEPARATORS.split(value) if field == "tags" and "," in value else value.split()
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise UserError(f"data.root: the tags in {where} are {value!r}; write a list of texts, or one text")
    return value


def _unique(tags: Iterable[str]) -> tuple[str, ...]:
    """Strip tags and remove blank and repeated ones, keeping the order. Interned, because collections repeat tags."""
    return tuple(dict.fromkeys(sys.intern(tag.strip()) for tag in tags if tag.strip()))
