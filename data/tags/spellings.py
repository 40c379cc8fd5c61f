"""Spellings of tags: which texts were read as one tag, and which tags differ in spaces and hyphens alone."""

import re
from collections.abc import Iterable, Mapping, Sequence

from data.layouts.table import show_some
from utils.formats.spelling import Tag, parse_tag
from utils.record.logging import get_logger

log = get_logger(__name__)

_SHOWN = 3  # spellings of a tag


def fold(name: str) -> str:
    """Return a name without its separators; itself if only signs are left, as of a kaomoji."""
    folded = re.sub("[_-]", "", name)
    return folded if re.search(r"\w", folded) else name


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


def say_spellings(texts: Iterable[str], variants: Mapping[str, str], key: str) -> None:
    """Log which texts were read as one tag, and which tags stay two. key: prefix of the configuration keys."""
    written: dict[str, list[str]] = {}
    for text in texts:
        written.setdefault(parse_tag(text).name, []).append(text)
    merged = [f"{name} ({_join(sorted(each))})" for name, each in sorted(written.items()) if len(each) > 1]
    if merged:
        log.info("%d tags are written in several ways and read as one: %s", len(merged), show_some(merged))
    if variants:
        log.warning(
            "%d tags differ from another one in spaces and hyphens alone and stay apart: %s. %saliases=FILE joins "
            "them: a CSV with a line such as %s (prepare.py job=vocabulary writes it)", len(variants),
            show_some([f"{alias} and {name}" for alias, name in variants.items()]), key,
            ",".join(next(iter(variants.items()))),
        )  # fmt: skip


def _join(texts: Sequence[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (", ..." if len(texts) > _SHOWN else "")
