"""Build a vocabulary from the tags of a collection, or read the one of another tagger."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from data.collection.collection import Collection
from data.layouts.table import count_values
from data.tags.rules import Category, TagRules, TagRulesConfig, read_rules
from data.tags.tag_index import map_tags
from utils.config.bounds import Count
from utils.config.schema import PathText
from utils.errors import UserError, about
from utils.formats.spelling import PREFIXES, Tag, parse_tag
from utils.formats.vocabulary import (
    CATEGORIES,
    CHARACTER,
    GENERAL,
    RATING,
    RATINGS,
    Vocabulary,
    category_name,
    read_vocabulary,
)
from utils.io.files import read_json, readable
from utils.record.logging import get_logger

log = get_logger(__name__)

_MAX_LENGTH = 255  # longer names are sentences
_SHOWN = 3  # tags in a message
_PADDING = ("<PAD>", "<UNK>")


class VocabularyConfig(TagRulesConfig):
    """Which tags a vocabulary contains.

    min_count: minimum training images per tag. ignore, keep: text files with one tag per line.
    """

    min_count: Count
    categories: list[Category]
    ignore: PathText | None
    keep: PathText | None


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
    chosen = [entry for entry in found if is_included(*entry)]
    if not chosen:
        most = [f"{tag.name!r} on {count:,}" for tag, count in found[len(RATINGS) :][:_SHOWN]]
        raise UserError(
            f"{key}min_count: no tag of {', '.join(config.categories)} is on {config.min_count} of the training "
            f"images of {str(collection.root)!r} (found: {', '.join(most) or 'no tag'}); lower it, or give the "
            "images sidecars (docs/collections.md)"
        )
    order = {GENERAL: -2, CHARACTER: -1}
    chosen.sort(key=lambda entry: (order.get(entry[0].category, entry[0].category), -entry[1], entry[0].name))
    if any(count for _, count in found[: len(RATINGS)]):
        chosen = found[: len(RATINGS)] + chosen
    counts = Counter(category_name(tag.category) for tag, _ in chosen)
    log.info("%d of %d tags: %s", len(chosen), len(found), ", ".join(f"{n:,} {name}" for name, n in counts.items()))
    return _complete(chosen)


def _complete(chosen: list[tuple[Tag, int]]) -> Vocabulary:
    """Return the vocabulary of tags and their counts, with ids."""
    ids = [RATINGS[tag.name] if tag.category == RATING else row for row, (tag, _) in enumerate(chosen)]
    vocabulary = Vocabulary.of(tag for tag, _ in chosen)
    return replace(vocabulary, counts=tuple(count for _, count in chosen), tag_ids=tuple(ids))


def read_any_vocabulary(path: Path) -> Vocabulary:
    """Read the vocabulary of a run, selected_tags.csv, or the tags of another tagger in a .json or .txt file.

    Text: a tag on each line. JSON: {"0": {"tag": ..., "category": ...}} (tag_mapping.json), or index_to_tag or
    idx_to_tag, perhaps with tag_frequencies and tag_to_category (vocabulary.json). The order is kept, without padding;
    if one tag is a rating, the four ratings come first. Tags without a category are general. Raises UserError.
    """
    if path.suffix not in (".json", ".txt"):
        return read_vocabulary(path)
    with readable(path, "vocabulary"):
        lines = path.read_text(encoding="utf-8-sig").split("\n") if path.suffix == ".txt" else ()
        table = read_json(path) if path.suffix == ".json" else dict(enumerate(lines))
        tags = table.get("index_to_tag") or table.get("idx_to_tag") or table
        tags = [tags[index] for index in sorted(tags, key=int)]
        tags = [tag if isinstance(tag, dict) else {"tag": tag} for tag in tags]
        named = table.get("tag_to_category", {})
        counts = table.get("tag_frequencies", {})
        has_bare = RATINGS.keys() <= {tag["tag"] for tag in tags}  # ratings without a prefix
        found = list[tuple[Tag, int]]()
        is_rated = False
        for text, category in ((tag["tag"].strip(), tag.get("category") or named.get(tag["tag"])) for tag in tags):
            tag = parse_tag(text)
            number = tag.category or GENERAL
            if category is not None or (has_bare and text in RATINGS):
                number = PREFIXES.get((category or "rating").lower(), CATEGORIES["meta"])
            if number == RATING:
                is_rated = True
            elif tag.name and text not in _PADDING:
                found.append((Tag(number, tag.name), int(counts.get(text, 0))))
        found = [(Tag(RATING, name), 1) for name in RATINGS if is_rated] + found
        return _complete(found)


def count_tags(collection: Collection, rules: TagRules) -> list[tuple[Tag, int]]:
    """Return the four ratings and every tag, each with its number of training images, counting implied tags.

    Images of weight 0 do not count. Raises UserError (`<key>rating_s`) as `map_tags` does.
    """
    table = collection.table.select(["tags", "rating", "split", "weight"])
    table = table.filter(pc.and_(pc.equal(table["split"], "train"), pc.greater(table["weight"], 0.0)))
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
