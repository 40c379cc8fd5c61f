"""Make a vocabulary of the tags of a collection, or add its new tags to one that a tagger was trained on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc

from data.care.tool import Tool
from data.collection import Collection
from data.config import DataConfig, VocabularyConfig
from data.open import load_collection
from data.tags.index import map_tags
from data.tags.names import Tag, parse_tag
from data.tags.rules import TagRules, read_rules
from utils.config.schema import PathText
from utils.errors import UserError
from utils.io.files import output_errors
from utils.record.logging import get_logger
from utils.vocabulary import (
    CATEGORIES,
    CHARACTER,
    GENERAL,
    RATING,
    RATINGS,
    Vocabulary,
    category_name,
    read_vocabulary,
    write_vocabulary,
)

log = get_logger(__name__)

_MAX_LENGTH = 255  # of a name; longer ones are sentences
_SHOWN = 3  # tags that a message shows


class CollectVocabulary(Tool, VocabularyConfig):
    """Collect the tags of `data.root` into a vocabulary, the file `output`."""

    name: Literal["vocabulary"]
    output: PathText

    def run(self, data: DataConfig) -> str:
        """Write it. Raises UserError (`data.root`, `job`)."""
        made, report = make_vocabulary(load_collection(data), self, "job.")
        with output_errors("job.output", Path(self.output)):
            write_vocabulary(Path(self.output), made)
        log.info("wrote %s: %s", self.output, report)
        return f"{len(made)} tags"


def make_vocabulary(collection: Collection, wanted: VocabularyConfig, key: str) -> tuple[Vocabulary, str]:
    """Return the vocabulary that the configuration asks for, and a report of what was taken and dropped.

    key: what the configuration keys begin with. Raises UserError (`<key>...`) where a file cannot be read, ratings are
    ambiguous, or no tag is left.
    """
    rules = read_rules(wanted, key)
    found = count_tags(collection, rules)
    chosen, dropped = choose_tags(found, wanted, key)
    if not set(chosen.categories) - {RATING}:
        most = [f"{name!r} on {count:,}" for name, count in zip(found.names, found.counts)][len(RATINGS) :][:_SHOWN]
        raise UserError(
            f"{key}min_count: no tag of {', '.join(wanted.categories)} is on {wanted.min_count} of the training "
            f"images of {str(collection.root)!r} (found: {', '.join(most) or 'no tag'}); set a lower one, or give the "
            "images sidecars (docs/collections.md)"
        )
    base = None if wanted.append_to is None else read_vocabulary(Path(wanted.append_to), f"{key}append_to")
    made = chosen if base is None else append_tags(base, chosen)
    taken = ", ".join(f"{count:,} {name}" for name, count in Counter(map(category_name, made.categories)).items())
    unrated = "" if RATING in made.categories else "; no ratings, because no training image has one"
    new = "" if base is None else f", {len(made) - len(base):,} of them new"
    lost = "; ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "nothing"
    return made, f"{len(made):,} tags ({taken}){new}{unrated}; dropped: {lost}"


def count_tags(collection: Collection, rules: TagRules) -> Vocabulary:
    """Return the four ratings and every tag, each with the number of training images that have it, implied tags too.

    Images of weight 0 do not count. Raises UserError (`<key>rating_s`) as `map_tags` does.
    """
    table = collection.table.select(["tags", "rating", "split", "weight"])
    table = table.filter(pc.and_(pc.equal(table["split"], "train"), pc.greater(table["weight"], 0.0)))
    found: Counter[Tag] = Counter()
    for entry in pc.value_counts(pc.list_flatten(table["tags"])).to_pylist():
        found.update(dict.fromkeys(rules.read(entry["values"]), entry["counts"]))
    ordered = [tag for tag, _ in found.most_common() if tag.name and tag.category != RATING]
    tags = [tag for tag in ordered if tag.category is not None]
    stated = {tag.name for tag in tags}
    tags += [Tag(GENERAL, tag.name) for tag in ordered if tag.name not in stated]
    every = Vocabulary.of([*((RATING, name) for name in RATINGS), *tags])
    counts = np.bincount(map_tags(table, every, rules).ids, minlength=len(every))
    return replace(every, counts=tuple(counts.tolist()))


def choose_tags(found: Vocabulary, wanted: VocabularyConfig, key: str) -> tuple[Vocabulary, Counter[str]]:
    """Return the ratings and the chosen tags in the order of published taggers, and how many were dropped, by reason.

    The order: ratings, general, characters, the other categories; in each by descending count, then by name. Where no
    image has a rating, none is taken. A tag of `keep` is taken in any case. A tag of a list without a category is that
    of its name in any category.
    """
    categories = [CATEGORIES[name] for name in wanted.categories]
    ignore, keep = (_read_names(getattr(wanted, name), key + name) for name in ("ignore", "keep"))
    dropped: Counter[str] = Counter()
    ratings, chosen = [], []
    for tag, count in zip(map(Tag._make, found.columns), found.counts):
        listed = {tag, Tag(None, tag.name)}
        reasons = {
            f"longer than {_MAX_LENGTH} characters": len(tag.name) > _MAX_LENGTH,
            "of other categories": tag.category not in categories,
            "ignored": bool(listed & ignore),
            f"on fewer than {wanted.min_count} images": count < wanted.min_count,
        }
        if tag.category == RATING:
            ratings.append((tag, count))
        elif any(reasons.values()) and not listed & keep:
            dropped[next(reason for reason, holds in reasons.items() if holds)] += 1
        else:
            chosen.append((tag, count))
    order = {GENERAL: -2, CHARACTER: -1}
    chosen.sort(key=lambda entry: (order.get(entry[0].category, entry[0].category), -entry[1], entry[0].name))
    return _build([*ratings, *chosen] if any(count for _, count in ratings) else chosen), dropped


def append_tags(base: Vocabulary, chosen: Vocabulary) -> Vocabulary:
    """Return a vocabulary with the chosen tags that it lacks behind its own, which stay as they are; no rating.

    A general tag whose name has another category in `base` is not new: images may state no category.
    """
    names = {name for category, name in base.columns if category != RATING}
    added = [
        (tag, count)
        for tag, count in zip(map(Tag._make, chosen.columns), chosen.counts)
        if tag not in base.columns and tag.category != RATING and not (tag.category == GENERAL and tag.name in names)
    ]
    joined = zip(base.facts().values(), _build(added, start=len(base)).facts().values())
    return Vocabulary(*(tuple(first + second) for first, second in joined))


def _read_names(path: str | None, key: str) -> frozenset[Tag]:
    """Read a list of tags, one on each line, without blank lines and those that begin with `#`; none of None.

    Raises UserError (`key`) where the file cannot be read.
    """
    if path is None:
        return frozenset()
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path} cannot be read ({error}); give a text file in UTF-8, a tag on a line") from None
    return frozenset(parse_tag(line) for line in lines if line.strip() and not line.startswith("#"))


def _build(entries: Sequence[tuple[Tag, int]], start: int = 0) -> Vocabulary:
    """Build a vocabulary of tags and counts; the number of a tag that is no rating is its row, counted from `start`."""
    ids = [RATINGS[tag.name] if tag.category == RATING else row for row, (tag, _) in enumerate(entries, start)]
    made = Vocabulary.of(tag for tag, _ in entries)
    return replace(made, counts=tuple(count for _, count in entries), tag_ids=tuple(ids))
