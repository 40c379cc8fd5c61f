"""Normalise the spelling of tags to the names in vocabularies."""

import re
import unicodedata
from typing import NamedTuple

from utils.vocabulary import CATEGORIES

# Names that keep their underscores. Source: deepghs/imgutils:imgutils/tagging/format.py.
KAOMOJI = frozenset(
    ("0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3")
    + ("6_9", ">_o", "@_@", "^_^", "o_o", "u_u", "x_x", "|_|", "||_||")
)
# Prefixes before a colon; creator and series are from Hydrus.
PREFIXES = {**CATEGORIES, "creator": CATEGORIES["artist"], "series": CATEGORIES["copyright"]}
_RATINGS = {
    **dict.fromkeys(("g", "general", "0"), "general"),
    **dict.fromkeys(("sensitive", "1"), "sensitive"),
    **dict.fromkeys(("q", "questionable", "2"), "questionable"),
    **dict.fromkeys(("e", "explicit", "3"), "explicit"),
}
AMBIGUOUS_RATINGS = ("s", "safe")  # sensitive on Danbooru since 2022; safe before, and on other boorus
_WEIGHTED = re.compile(r"\((.*):\s*[+-]?\d*\.?\d+\s*\)", re.DOTALL)
_ESCAPED = re.compile(r"\\([()])")


class Tag(NamedTuple):
    """A name, and its category or None."""

    category: int | None
    name: str


def parse_tag(text: str) -> Tag:
    """Return a tag as vocabularies spell it; the name may be empty.

    Removes weights `(tag:1.2)` and escapes `\\(`, replaces spaces by underscores; lower case, Unicode form NFC.
    """
    text = text.strip()
    if weighted := _WEIGHTED.fullmatch(text):
        text = weighted[1]
    text = unicodedata.normalize("NFC", _ESCAPED.sub(r"\1", text).lower())
    prefix, colon, rest = text.partition(":")
    category = PREFIXES.get(prefix.strip()) if colon else None
    return Tag(category, "_".join((text if category is None else rest).split()))


def parse_rating(text: str) -> str:
    """Return one of the four ratings; AMBIGUOUS_RATINGS and unknown texts are returned in lower case."""
    text = text.strip().lower().removeprefix("rating:").strip()
    return _RATINGS.get(text, text)


def with_spaces(name: str) -> str:
    """Replace the underscores of a name by spaces, except in kaomoji."""
    return name if name in KAOMOJI else name.replace("_", " ")
