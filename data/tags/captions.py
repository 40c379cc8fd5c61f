"""Tags as people write them beside images; data/tags/records.py and data/tags/names.py read what is written here."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from data.config import TextConfig
from data.tags.names import Tag, parse_tag, with_spaces
from utils.record.logging import get_logger
from utils.vocabulary import RATING

log = get_logger(__name__)

_PARENTHESES = re.compile(r"[()]")


def find_excluded(names: Sequence[str], categories: Sequence[int], exclude: Sequence[str]) -> np.ndarray:
    """Return which tags are among those excluded, bool [T]; warns of texts that are none of them."""
    texts = {parse_tag(text): text for text in exclude}
    both = [{Tag(None, parse_tag(name).name), Tag(number, name)} for name, number in zip(names, categories)]
    if unknown := [text for tag, text in texts.items() if not any(tag in tags for tags in both)]:
        log.warning("text.exclude: not among the tags of these weights: %s", ", ".join(unknown))
    return np.array([not tags.isdisjoint(texts) for tags in both])


def spell_tags(names: Iterable[str], rating: str | None, config: TextConfig) -> list[str]:
    """Return names as they are written, with the rating where it is wanted."""
    words = [with_spaces(name) if config.spaces else name for name in names]
    if config.escape:
        words = [_PARENTHESES.sub(r"\\\g<0>", word) for word in words]
    if config.rating is None or rating is None:
        return words
    return [f"rating:{rating}", *words] if config.rating == "first" else [*words, f"rating:{rating}"]


def join_tags(words: Iterable[str], separator: str) -> str:
    """Join tags, each once, as its first text spells it."""
    first: dict[Tag | str, str] = {}
    for word in words:
        tag = parse_tag(word)
        first.setdefault(tag if tag.category == RATING else tag.name, word)
    return separator.join(first.values())
