"""Build a vocabulary from the tags of a collection, or read one."""

from collections import Counter
from dataclasses import astuple
from pathlib import Path

import numpy as np

from data.collection.collection import Collection
from data.layouts.table import count_values, show_some
from data.tags.rules import TagRules, VocabularyConfig, read_rules
from data.tags.spellings import find_variants
from data.tags.tag_index import map_tags
from utils.errors import UserError, about
from utils.formats.spelling import CATEGORIES, CHARACTER, GENERAL, RATING, RATINGS, Tag, category_name, parse_tag
from utils.formats.vocabulary import Vocabulary, complete
from utils.io.files import readable
from utils.record.logging import log

_MAX_LENGTH = 255  # longer names are sentences
_SHOWN = 3  # tags in a message


def make_vocabulary(collection: Collection, config: VocabularyConfig, key: str) -> Vocabulary:
    """Return a vocabulary in the order of published taggers, and log the number of tags.

    The order: ratings, general, characters, other categories; each by descending count, then by name. Ratings are
    included if any image has one. Tags in `keep` are always included. In `ignore` and `keep`, a tag without a category
    matches its name in every category. key: prefix of the configuration keys.
    Raises UserError (`<key>...`) if a file cannot be read, ratings are ambiguous, or no tag is left.
    """
    collection.refuse_faults("tags", "rating")
    categories = {CATEGORIES[name] for name in config.categories}
    ignore, keep = (_read_names(getattr(config, name), key + name) for name in ("ignore", "keep"))

    def is_included(tag: Tag, count: int) -> bool:
        listed = {tag, Tag(None, tag.name)}
        fits = tag.category in categories and count >= config.min_count and len(tag.name) <= _MAX_LENGTH
        return tag.category != RATING and (bool(listed & keep) or (fits and not listed & ignore))

    found = count_tags(collection, read_rules(config, key))
    if variants := [",".join(pair) for pair in find_variants(found).items()]:
        log.warning(
            "%d tags differ from another one in spaces and hyphens alone and stay apart: %s. %saliases=FILE joins "
            "them: a CSV with these lines (prepare.py job=vocabulary writes it)",
            len(variants), show_some(variants), key,
        )  # fmt: skip
    chosen = [entry for entry in found if is_included(*entry)]
    if not chosen:
        most = [f"{tag.name!r} on {count:,}" for tag, count in found[len(RATINGS) :][:_SHOWN]]
        raise UserError(
            f"{key}min_count: no tag of {', '.join(config.categories)} is on {config.min_count} of the training "
            f"images of '{collection.root}' (found: {', '.join(most) or 'no tag'}); lower it, or give the "
            "images sidecars (docs/collections.md)"
        )
    order = {GENERAL: -2, CHARACTER: -1}
    chosen.sort(key=lambda entry: (order.get(entry[0].category, entry[0].category), -entry[1], entry[0].name))
    if any(count for _, count in found[: len(RATINGS)]):
        chosen = found[: len(RATINGS)] + chosen
    counts = Counter(category_name(tag.category) for tag, _ in chosen)
    kinds = ", ".join(f"{n:,} {name}" for name, n in counts.items())
    rule = f"those on at least {config.min_count} training images ({key}min_count)"
    log.info("%d of %d tags, %s: %s", len(chosen), sum(count > 0 for _, count in found), rule, kinds)
    return complete(chosen)


def append_vocabulary(known: Vocabulary, wanted: Vocabulary) -> Vocabulary:
    """Return `known`, followed by the tags that only `wanted` has, except ratings."""
    rows = [row for key, row in wanted.columns.items() if key not in known.spelled and key[0] != RATING]
    return Vocabulary(*(old + tuple(new[row] for row in rows) for old, new in zip(astuple(known), astuple(wanted))))


def count_tags(collection: Collection, rules: TagRules) -> list[tuple[Tag, int]]:
    """Return the four ratings and every tag, each with its number of training images, counting implied tags.

    Images of weight 0 do not count. Raises UserError (`<key>rating_s`) as `map_tags` does.
    """
    table = collection.table.select(["tags", "rating"]).take(collection.rows("train"))
    occurrences: Counter[Tag] = Counter()
    for text, count in count_values(table["tags"]).items():
        occurrences.update(dict.fromkeys(rules.read(text), count))
    ordered = [tag for tag, _ in occurrences.most_common() if tag.name and tag.category != RATING]
    tags = [tag for tag in ordered if tag.category is not None]
    named = {tag.name for tag in tags}
    tags += [Tag(GENERAL, tag.name) for tag in ordered if tag.name not in named]
    every = Vocabulary.of([*((RATING, name) for name in RATINGS), *tags])
    counts = np.bincount(map_tags(table, every, rules).ids, minlength=len(every))
    return list(zip(map(Tag._make, every.columns), counts.tolist()))


def _read_names(path: str | None, key: str) -> frozenset[Tag]:
    """Read a list of tags, one per line, without blank lines and lines that begin with `#`; empty for None.

    Raises UserError (`key`) if the file cannot be read.
    """
    if path is None:
        return frozenset()
    with about(key), readable(Path(path), "tag list"):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    return frozenset(parse_tag(line) for line in lines if line.strip() and not line.startswith("#"))
