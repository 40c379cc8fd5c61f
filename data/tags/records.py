"""What people keep beside an image, in their words: the texts and JSON records of boorus, captioners and Hydrus.

A tag of a known category is written with it, such as `character:hatsune_miku`; data/tags/names.py reads it.
"""

import json
import re
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.vocabulary import CATEGORIES

# Categories that are written before the tag; a general tag is written bare.
STATED = ("artist", "character", "copyright", "meta")
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
    return Sidecar(unique_tags(pieces), None, caption or None)


def parse_record(where: str, record: dict[str, Any]) -> Sidecar:
    """Read the record of a booru, of gallery-dl or of our predecessor. Raises UserError (`data.root`) that says where.

    where: names the record, for messages.
    """
    found, rating = record.get("id"), record.get("rating")
    rating = str(rating) if type(rating) is int and 0 <= rating <= 3 else rating
    is_id = isinstance(found, int) and not isinstance(found, bool) and abs(found) < 2**63
    return Sidecar(
        _tags_of_record(where, record),
        _text_of_record(where, "rating", rating),
        _text_of_record(where, "caption", record.get("caption")),
        found if is_id else None,
    )


def unique_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Strip tags and drop blank and repeated ones, keeping the order. Interned, for a collection repeats them."""
    return tuple(dict.fromkeys(sys.intern(tag.strip()) for tag in tags if tag.strip()))


def _text_of_record(where: str, key: str, value: Any) -> str | None:
    """Return a text of a record, None where it is null or blank."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"data.root: {key!r} in {where} is {value!r}; write a text, or leave it out")
    return (value or "").strip() or None


def _tags_of_record(where: str, record: dict[str, Any]) -> tuple[str, ...] | None:
    """Return a record's tags, None where it states none: from `tags`, else `tag_string`, else those of categories.

    Categories: `tag_string_artist` and so on, lists such as `tags_artist`, or `tags` as an object of them.
    """
    whole = next((record[key] for key in ("tags", "tag_string") if record.get(key) is not None), None)
    words: dict[str, list[str]] = {}
    for key, value in record.items():
        form, _, category = key.rpartition("_")
        if value is not None and (form == "tag_string" or (form == "tags" and category in CATEGORIES)):
            words.setdefault(category, _words(where, value, spaced=True))
    if whole is None and not words:
        return None
    if isinstance(whole, dict):
        words, whole = {name: _words(where, value, spaced=False) for name, value in whole.items()}, None
    written = {word: f"{name}:{word}" for name in STATED for word in words.get(name, ())}
    every = [word for group in words.values() for word in group]
    if whole is not None:
        every = _words(where, whole, spaced=record.get("tags") is None)
    return unique_tags(written.get(word, word) for word in every)


def _words(where: str, value: Any, spaced: bool) -> list[str]:
    """Return the tags of a list or a text; in a text that is not `spaced`, commas separate where there is one.

    Boorus separate with spaces; people who write JSON by hand use commas.
    """
    if isinstance(value, str):
        return value.split() if spaced or "," not in value else _SEPARATORS.split(value)
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise UserError(
            f"data.root: the tags in {where} are {value!r}; write a list of texts, or one text with spaces between "
            "the tags"
        )
    return value
