"""Spellings of tags that differ in underscores and hyphens alone, as 1girl and 1_girl."""

import re
from collections.abc import Iterable

from utils.formats.spelling import Tag


def fold(name: str) -> str:
    """Return a name without the underscores and hyphens between letters and digits; those of a kaomoji stay."""
    return re.sub(r"(?<=[^\W_])[_-](?=[^\W_])", "", name)


def find_variants(found: Iterable[tuple[Tag, int]]) -> dict[str, str]:
    """Return the most frequent name for each rarer one that differs in separators alone, as 1girl for 1_girl.

    found: the tags, and on how many images they are.
    """
    best: dict[str, str] = {}
    variants = {}
    for tag, count in sorted(found, key=lambda entry: -entry[1]):
        first = best.setdefault(fold(tag.name), tag.name)
        if first != tag.name and count:
            variants[tag.name] = first
    return variants
