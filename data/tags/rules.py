"""The user's rules for tags: aliases, implications, and the meaning of the rating `s`."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal

from utils.config.bounds import Count, Name
from utils.config.schema import PathText, Strict
from utils.errors import UserError, about
from utils.formats.spelling import AMBIGUOUS_RATINGS, Tag, parse_rating, parse_tag
from utils.io.files import canonical_json, readable, sha256_text

_HEADER = ["antecedent_name", "consequent_name"]  # of the aliases and implications of Danbooru and e621
Category = Literal["general", "artist", "copyright", "character", "meta"]


class TagRulesConfig(Strict):
    """The meaning of the tags of a collection.

    rating_s: the meaning of the ratings s and safe; null if there are none. aliases, implications: CSV files with two
    columns.
    """

    rating_s: Literal["sensitive", "general"] | None
    aliases: PathText | None
    implications: PathText | None


class VocabularyConfig(TagRulesConfig):
    """Which tags a vocabulary contains.

    min_count: minimum training images per tag. ignore, keep: text files with one tag per line.
    """

    min_count: Count
    categories: list[Category]
    ignore: PathText | None
    keep: PathText | None


class TextConfig(Strict):
    """How predict.py writes the tags of an image.

    category_order, first_tags: what comes first; tags of other categories follow. max_tags: only the most probable
    tags; null: all. exclude: tags to skip, in any spelling. drop_implied, aliases: CSV files of two columns, read as
    for training. categories: write the category before a tag, such as `character:`. rating: position of the rating,
    such as `rating:general`; null: none. spaces: replace underscores, except in kaomoji. escape: write parentheses with
    a backslash.
    """

    order: Literal["score", "vocabulary"]
    category_order: list[Category]
    first_tags: list[str]
    drop_implied: PathText | None
    aliases: PathText | None
    categories: bool
    max_tags: Count | None
    exclude: list[str]
    rating: Literal["first", "last"] | None
    spaces: bool
    escape: bool
    separator: Name


@dataclass(frozen=True)
class TagRules:
    """How tags are read after spelling is normalised.

    rating_s: the meaning of the ratings `s` and `safe`, sensitive or general; None if the collection has none.
    aliases: name -> tag. implications: name -> implied tags. key: prefix of the configuration keys, for messages.
    """

    rating_s: str | None
    aliases: Mapping[str, Tag]
    implications: Mapping[str, list[Tag]]
    key: str

    @cached_property
    def hash(self) -> str:
        """Return a hash of the rules, 16 hexadecimal digits."""
        return sha256_text(canonical_json([self.rating_s, self.aliases, self.implications]))[:16]

    def read(self, text: str) -> list[Tag]:
        """Return the tag of a text, and all tags that it implies, directly or indirectly."""
        return self.expand(parse_tag(text))

    def expand(self, tag: Tag) -> list[Tag]:
        """Return a tag after its aliases, and all tags that it implies."""
        tags = [self.resolve(tag)]
        for tag in tags:
            for implied in map(self.resolve, self.implications.get(tag.name, ())):
                if all(implied.name != other.name for other in tags):
                    tags.append(implied)
        return tags

    def resolve(self, tag: Tag) -> Tag:
        """Replace aliases in a tag; it keeps its category unless an alias has one."""
        while target := self.aliases.get(tag.name):
            tag = Tag(tag.category if target.category is None else target.category, target.name)
        return tag

    def read_rating(self, text: str) -> str:
        """Return the rating of a text, or "".

        Raises UserError (`<key>rating_s`) for `s` and `safe` if `rating_s` is None.
        """
        rating = parse_rating(text)
        if rating in AMBIGUOUS_RATINGS and self.rating_s is None:
            raise UserError(
                f"{self.key}rating_s: null, but images are rated {rating}; set sensitive (Danbooru since 2022) or "
                "general (Danbooru before, and other boorus)"
            )
        return self.rating_s if rating in AMBIGUOUS_RATINGS else rating


def read_rules(config: TagRulesConfig | TextConfig, key: str) -> TagRules:
    """Read the CSV files of aliases (alias, tag) and of implications or `drop_implied` (tag, implied tag).

    Raises UserError (`<key>aliases`, `<key>implications`) that names the file and the wrong line.
    """
    name = "drop_implied" if isinstance(config, TextConfig) else "implications"
    aliases = {alias.name: target for alias, target in _read_pairs(config.aliases, f"{key}aliases")}
    rules = TagRules(getattr(config, "rating_s", None), aliases, {}, key)
    for tag, implied in _read_pairs(getattr(config, name), f"{key}{name}"):
        rules.implications.setdefault(rules.resolve(tag).name, []).append(implied)
    return rules


def _read_pairs(path: str | None, key: str) -> list[tuple[Tag, Tag]]:
    """Read a CSV file with two columns of tags; [] for None. Raises UserError (`key`), also for a circle."""
    if path is None:
        return []
    with about(key), readable(Path(path), "CSV"), open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        rows = [(reader.line_num, row) for row in reader if row not in ([], _HEADER)]
    pairs = []
    for line, row in rows:
        tags = tuple(map(parse_tag, row))
        if len(tags) != 2 or not all(tag.name for tag in tags):
            raise UserError(f"{key}: {path}, line {line}: {row}; write two tags, such as a,b")
        pairs.append(tags)
    graph = {}
    for tag, other in pairs:
        graph.setdefault(other.name, []).append(tag.name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise UserError(f"{key}: {path}: {' -> '.join(error.args[1])} is a circle; remove one of these lines") from None
    return pairs
