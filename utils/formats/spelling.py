"""The spelling of tags: from any text to the names in vocabularies, and back.

`split_tags` and `parse_tag` read what `write_tag` and `join_tags` write. A comma in a tag is written `\\,`.
"""

import ast
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import unescape
from typing import Any, NamedTuple

from utils.io.names import to_nfc

# Danbooru's category numbers.
CATEGORIES = {"general": 0, "artist": 1, "copyright": 3, "character": 4, "meta": 5, "rating": 9}
GENERAL = 0
CHARACTER = 4
RATING = 9
_CATEGORY_NAMES = {number: name for name, number in CATEGORIES.items()}
# The four ratings come first, in this order, with the tag ids of published taggers.
RATINGS = {"general": 9999999, "sensitive": 9999998, "questionable": 9999997, "explicit": 9999996}
# Names that keep their underscores. Source: deepghs/imgutils:imgutils/tagging/format.py.
KAOMOJI = frozenset(
    ("0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3")
    + ("6_9", ">_o", "@_@", "^_^", "o_o", "u_u", "x_x", "|_|", "||_||")
)
# The categories of Hydrus and e621 and ours: species are seen like general tags, lore and invalid tags are not.
_ELSEWHERE = {"creator": "artist", "series": "copyright", "contributor": "artist"}
_ELSEWHERE |= {"species": "general", "lore": "meta", "invalid": "meta"}
PREFIXES = CATEGORIES | {name: CATEGORIES[ours] for name, ours in _ELSEWHERE.items()}
AMBIGUOUS_RATINGS = ("s", "safe")  # sensitive on Danbooru since 2022; safe before, and on other boorus
_RATINGS = {text: name for number, name in enumerate(RATINGS) for text in (name, name[0], str(number)) if text != "s"}
_WEIGHTED = re.compile(r"\((.*[^\s(].*):\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*\)", re.DOTALL)  # not the kaomoji (:3)
_SPECIAL = re.compile(r"[(),]")
_ESCAPED = re.compile(r"\\([(),])")
# Controls but white space, halves of characters, and those without a width that editors and web pages leave behind.
_INVISIBLE = re.compile("[\0-\x08\x0e-\x1b\x7f\u200b\u2060\ufeff\ud800-\udfff]")
_ENTITY = re.compile(r"&(?:amp;)*(#?\w+;)")  # of HTML, escaped once or several times
_ITEM = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?"""
_LIST = re.compile(rf"\[\s*(?:(?:{_ITEM})(?:[\s,]+|(?=\])))*\]")
_LONG = 12  # words; a longer text is a sentence
_WRITTEN = {*CATEGORIES.values()} - {GENERAL}  # categories that a text names


class Tag(NamedTuple):
    """A name, and its category or None."""

    category: int | None
    name: str


def category_name(number: int) -> str:
    """Return a category's name, or its number if it has no name."""
    return _CATEGORY_NAMES.get(number, str(number))


def parse_tag(text: str) -> Tag:
    """Return a tag as vocabularies spell it; the name may be empty.

    Removes weights `(tag:1.2)`, escapes `\\(` and invisible characters, replaces spaces by underscores; lower case,
    Unicode form NFC.
    """
    text = clean(text).replace("，", ",")
    if text[:1] == "(" and (weighted := _WEIGHTED.fullmatch(text)):
        text = weighted[1]
    text = _ESCAPED.sub(r"\1", text).lower() if "\\" in text else text.lower()
    text = to_nfc(text)  # lower case may be another form
    prefix, colon, rest = text.partition(":")
    category = PREFIXES.get(prefix.strip()) if colon else None
    return Tag(category, "_".join((text if category is None else rest).split()))


def write_tag(tag: Tag, *, category: bool = True, spaces: bool = False, escape: bool = False) -> str:
    """Return a text that `parse_tag` reads as the tag; a general tag has no prefix unless its name needs one.

    category: write the category, such as `character:`. spaces, escape: see `TextConfig`.
    """
    name = tag.name
    if spaces and parse_tag(with_spaces(name)).name == name:
        name = with_spaces(name)
    if escape or parse_tag(name).name != tag.name:  # as in `(a:1)`, or a name with a backslash before these
        name = _SPECIAL.sub(r"\\\g<0>", name)
    else:
        name = name.replace(",", r"\,")
    has_prefix = category and tag.category in _WRITTEN
    if has_prefix or parse_tag(name).category is not None or read_list(name) is not None:
        return f"{category_name(tag.category or GENERAL)}:{name}"
    return name


def join_tags(words: Iterable[str], separator: str) -> str:
    """Join texts of tags, each once, in its first spelling.

    `split_tags` reads them if the separator is a comma or a line break.
    """
    first = {}
    for word in words:
        first.setdefault(parse_tag(word), f"{word} " if word.endswith("\\") else word)
    return separator.join(first.values())


def split_tags(text: str) -> list[str]:
    """Split a text into clean tags: a list (`read_list`), or pieces at lines and commas, but not at escaped ones."""
    pieces = read_list(text)
    pieces = re.split(r"(?<!\\)[,，]|\n", text) if pieces is None else map(str, pieces)
    return [*filter(None, map(clean, pieces))]


def read_list(text: str) -> list[Any] | None:
    """Return the texts and numbers of a list as Python, NumPy or JSON write it, `['red hat', 'sky']`; None without."""
    text = text.strip()
    if not _LIST.fullmatch(text):
        return None
    with suppress(ValueError):
        return json.loads(text)
    with suppress(SyntaxError):  # an escape that Python has not
        return [*map(ast.literal_eval, re.findall(_ITEM, text))]
    return None


def is_sentence(pieces: Sequence[str]) -> bool:
    """Return whether the pieces of a text between commas are a sentence and not tags.

    A sentence ends with a full stop and has at least four words, on average three in a piece, or two if it begins with
    a capital letter; or it ends with `!` or `?` and has four in a piece; or it has more than twelve. Quotation marks
    may stand behind its end.
    """
    words = sum(len(piece.split()) for piece in pieces)
    if words > _LONG * len(pieces):
        return True
    end = pieces[-1].rstrip("\"'”’»)")
    least = {".": 2 if pieces[0][0].isupper() else 3, "!": 4, "?": 4}.get(end[-1:], _LONG + 1)
    return words >= max(4, least * len(pieces)) and not end.endswith("..")


def clean(text: str) -> str:
    """Return a text in the Unicode form NFC, without entities of HTML, invisible characters, and blanks around it."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text.strip()
    before = None
    while text != before:
        before = text
        text = _ENTITY.sub(lambda found: unescape(f"&{found[1]}"), text)
        text = to_nfc(_INVISIBLE.sub("", text)).strip()
    return text


def parse_rating(text: str) -> str:
    """Return one of the four ratings; AMBIGUOUS_RATINGS and unknown texts are returned in lower case."""
    text = text.strip().lower().removeprefix("rating:").strip()
    return _RATINGS.get(text, text)


def with_spaces(name: str) -> str:
    """Replace the underscores of a name by spaces, except in kaomoji."""
    return name if name in KAOMOJI else name.replace("_", " ")
