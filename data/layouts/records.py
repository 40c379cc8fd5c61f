"""Parse the texts and JSON records of boorus, captioning programs and Hydrus.

A tag with a known category gets it as a prefix, such as `character:hatsune_miku`, read by utils/formats/spelling.py.
"""

import codecs
import functools
import itertools
import re
import reprlib
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from data.layouts.unused import Unused
from utils.formats.spelling import PREFIXES, clean, is_sentence, split_tags
from utils.formats.vocabulary import CATEGORIES, GENERAL, RATING

# The fields with tags of one category: texts of Danbooru, lists of gallery-dl. Other boorus have further categories.
_CATEGORY_FIELD = re.compile(r"(?:tag_string|tags)_([a-z]+)")
_FIELDS = ("id", "md5", "label", "rating", "caption", "tags", "tag_string", "unknown_tags")


class Sidecar(NamedTuple):
    """The metadata of an image; None for unknown fields.

    caption: several captions are on a line each. unknown_tags: see data/tags/tag_index.py. sidecar_fault: a line
    `FIELD: REASON` for each field that cannot be read; the field `file` means all of them.
    """

    tags: tuple[str, ...] | None = None
    rating: str | None = None
    caption: str | None = None
    id: int | None = None
    label: str | None = None
    unknown_tags: tuple[str, ...] | None = None
    sidecar_fault: str | None = None

    def updated(self, newer: "Sidecar") -> "Sidecar":
        """Return a copy with the known fields of `newer`, and the faults of both."""
        known = Sidecar(*(a if b is None else b for a, b in zip(self, newer)))
        return known._replace(sidecar_fault="\n".join(filter(None, (self[-1], newer[-1]))) or None)


def decode(content: bytes) -> str:
    """Decode a text in UTF-8, or in UTF-16 with a byte order mark. Raises UnicodeDecodeError."""
    return content.decode(find_encoding(content)).replace("\r\n", "\n").replace("\r", "\n")


def find_encoding(start: bytes) -> str:
    """Return the encoding of a text by its first bytes."""
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def is_field(name: str) -> bool:
    """Return whether a field of a record is read."""
    return name in _FIELDS or _CATEGORY_FIELD.fullmatch(name) is not None


def parse_text(where: str, text: str, unused: Unused, one_per_line: bool = False) -> Sidecar:
    """Split a text into tags at commas and lines; each line is also a caption, and sentences are no tags.

    where: the position of the text, for messages. one_per_line: if the text has several lines, each is one tag, commas
    included, as written by Hydrus, and only sentences are captions.
    """
    caption, tags, sentences = clean(text), [], []
    one_per_line = one_per_line and "\n" in caption
    for line in caption.split("\n"):
        pieces = [line] * bool(line.strip()) if one_per_line else split_tags(line)
        if pieces and is_sentence(pieces):
            sentences.append(line.strip())
        else:
            long = {piece for piece in pieces if piece.count(" ") > 2 and is_sentence([piece])}
            sentences += long
            tags += [piece for piece in pieces if piece not in long] if long else pieces
    if sentences and tags:
        unused.add("texts with sentences among tags, which are captions and no tags", where)
    caption = "\n".join(sentences) if one_per_line else caption
    return Sidecar(_unique(tags) or None, None, caption or None)


def parse_record(where: str, record: dict[str, Any]) -> Sidecar:
    """Read a record of a booru, of gallery-dl or of our predecessor. A field that cannot be read is a fault.

    where: the position of the record, for faults.
    """
    number, values, faults = record.get("id"), {}, []
    for field, read in _READERS.items():
        try:
            values[field] = read(record)
        except ValueError as error:
            faults.append(f"{field}: {where} has {error}")
    number = number if type(number) is int and abs(number) < 2**63 else None
    return Sidecar(**values, id=number, sidecar_fault="\n".join(faults) or None)


def _read_tags(record: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the tags of a record, or None: from `tags`, else `tag_string`, else the fields of categories.

    Categories come from the names of fields, or from `tags` if it is an object.
    """
    whole = next((name for name in ("tags", "tag_string") if record.get(name) is not None), None)
    order = {name: number for number, name in enumerate(CATEGORIES)}
    fields = ((match[1], name, record[name]) for name in record if (match := _CATEGORY_FIELD.fullmatch(name)))
    parts = [part for part in fields if part[0] in order or isinstance(part[2], str | list)]
    parts.sort(key=lambda part: order.get(part[0], len(order)))
    if isinstance(record.get("tags"), dict):
        parts, whole = [(category, "tags", value) for category, value in record["tags"].items()], None
    words = {category: _words(name, value) for category, name, value in parts if value is not None}
    if whole is None and not words:
        return None
    named = [name for name in words if PREFIXES.get(name, GENERAL) not in (GENERAL, RATING)]  # others have no prefix
    prefixed = {word: f"{name}:{word}" for name in named for word in words[name]}
    every = itertools.chain(*words.values()) if whole is None else _words(whole, record[whole])
    return _unique(prefixed.get(word, word) for word in every)


def _words(field: str, value: Any) -> list[str]:
    """Return the tags of a list or a text.

    Texts of boorus separate tags by spaces. A text with a comma, as written by hand, is split at commas.
    """
    if isinstance(value, str):
        return split_tags(value) if field in ("tags", "unknown_tags") and "," in value else value.split()
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ValueError(f"the tags {reprlib.repr(value)}; write a list of texts, or one text")
    return value


def _read_value(field: str, largest: int, record: dict[str, Any]) -> str | None:
    """Return a field of one text, or of a number; a negative one, as of Hugging Face, is none."""
    value = record.get(field)
    if value is None or isinstance(value, str):
        return clean(value or "") or None
    if type(value) is int and value <= largest:
        return str(value) if value >= 0 else None
    raise ValueError(f"the {field} {reprlib.repr(value)}; write a text, or a whole number of at most {largest}")


def _read_caption(record: dict[str, Any]) -> str | None:
    """Return the caption of a record; several ones of a list on a line each."""
    caption = record.get("caption")
    if caption is None or isinstance(caption, str):
        return clean(caption or "") or None
    if isinstance(caption, list) and all(isinstance(text, str | None) for text in caption):
        return "\n".join(line for text in caption if (line := " ".join(clean(text or "").split()))) or None
    raise ValueError(f"the caption {reprlib.repr(caption)}; write a text, or a list of texts")


_READERS = {"tags": _read_tags, "caption": _read_caption}
_READERS["unknown_tags"] = lambda record: _unique(_words("unknown_tags", record.get("unknown_tags") or [])) or None
_READERS |= {name: functools.partial(_read_value, name, largest) for name, largest in (("rating", 3), ("label", 2**63))}
FIELDS = tuple(_READERS)


def _unique(tags: Iterable[str]) -> tuple[str, ...]:
    """Clean tags and remove blank and repeated ones, keeping the order. Interned, because collections repeat tags."""
    return tuple(dict.fromkeys(sys.intern(text) for tag in tags if (text := clean(tag))))
