"""What people keep beside an image, in their words: the texts and JSON records of boorus, captioners and Hydrus.

A tag of a known category is written with it, such as `character:hatsune_miku`; data/tags/spelling.py reads it.
"""

import itertools
import json
import re
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.vocabulary import CATEGORIES

_STATED = ("artist", "character", "copyright", "meta")  # written before the tag; a general tag is written bare
# The fields of a record that have tags of one category: Danbooru's texts, gallery-dl's lists.
CATEGORY_FIELDS = {f"{form}_{name}": name for form in ("tag_string", "tags") for name in CATEGORIES}
FIELDS = ("id", "md5", "rating", "caption", "tags", "tag_string", *CATEGORY_FIELDS)
_SEPARATORS = re.compile(r"[,\n]")


class Sidecar(NamedTuple):
    """What is known of an image beside its pixels; tags are None where nothing states them."""

    tags: tuple[str, ...] | None = None
    rating: str | None = None
    caption: str | None = None
    id: int | None = None

    def updated(self, newer: "Sidecar | None") -> "Sidecar":
        """Return it with what a newer one states."""
        return self if newer is None else Sidecar(*(a if b is None else b for a, b in zip(self, newer)))


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError for invalid JSON, and for half a surrogate pair, which UTF-8 cannot encode."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def parse_text(text: str, one_per_line: bool = False) -> Sidecar:
    """Read a text of tags separated by commas or lines, which is the caption too.

    one_per_line: in a text of several lines each is one tag, commas included, as Hydrus writes them.
    """
    caption = text.strip()
    pieces = caption.split("\n") if one_per_line and "\n" in caption else _SEPARATORS.split(caption)
    return Sidecar(_unique(pieces), None, caption or None)


def parse_record(where: str, record: dict[str, Any]) -> Sidecar:
    """Read the record of a booru, of gallery-dl or of our predecessor. Raises UserError (`data.root`) that says where.

    where: names the record, for messages.
    """
    found, rating = record.get("id"), record.get("rating")
    rating = str(rating) if type(rating) is int and 0 <= rating <= 3 else rating
    texts = {"rating": rating, "caption": record.get("caption")}
    for key, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise UserError(f"data.root: {key!r} in {where} is {value!r}; write a text, or leave it out")
        texts[key] = (value or "").strip() or None
    return Sidecar(
        _tags_of_record(where, record), **texts, id=found if type(found) is int and abs(found) < 2**63 else None
    )


def _tags_of_record(where: str, record: dict[str, Any]) -> tuple[str, ...] | None:
    """Return a record's tags, None without any: from `tags`, else `tag_string`, else the fields of categories.

    Categories: CATEGORY_FIELDS, or `tags` as an object of them.
    """
    whole = next((name for name in ("tags", "tag_string") if record.get(name) is not None), None)
    parts = [(category, name, record.get(name)) for name, category in CATEGORY_FIELDS.items()]
    if isinstance(record.get("tags"), dict):
        parts, whole = [(category, "tags", value) for category, value in record["tags"].items()], None
    words = {category: _words(where, name, value) for category, name, value in parts if value is not None}
    if whole is None and not words:
        return None
    written = {word: f"{category}:{word}" for category in _STATED for word in words.get(category, ())}
    every = itertools.chain(*words.values()) if whole is None else _words(where, whole, record[whole])
    return _unique(written.get(word, word) for word in every)


def _words(where: str, field: str, value: Any) -> list[str]:
    """Return the tags of a list or a text.

    Spaces separate the tags in the texts of boorus; commas do in a `tags` text that has one, as people write by hand.
    """
    if isinstance(value, str):
        return _SEPARATORS.split(value) if field == "tags" and "," in value else value.split()
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise UserError(f"data.root: the tags in {where} are {value!r}; write a list of texts, or one text")
    return value


def _unique(tags: Iterable[str]) -> tuple[str, ...]:
    """Strip tags and drop blank and repeated ones, keeping the order. Interned, for a collection repeats them."""
    return tuple(dict.fromkeys(sys.intern(tag.strip()) for tag in tags if tag.strip()))
