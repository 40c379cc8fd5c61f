"""What the tags of a collection mean, as its user states it: aliases, implications, and the rating `s`."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from data.config import TagRulesConfig
from data.tags.spelling import AMBIGUOUS_RATINGS, Tag, parse_rating, parse_tag
from utils.errors import UserError
from utils.io.files import canonical_json, sha256_text


@dataclass(frozen=True)
class TagRules:
    """How tags are read, beside their spelling.

    rating_s: what the ratings `s` and `safe` mean, sensitive or general; None where the collection has none.
    aliases: another name -> the tag that is meant. implications: a name -> tags that follow from it. key: what the
    configuration keys of these begin with, for messages.
    """

    rating_s: str | None
    aliases: Mapping[str, Tag]
    implications: Mapping[str, list[Tag]]
    key: str

    @cached_property
    def hash(self) -> str:
        """Return 16 hexadecimal digits of the rules."""
        return sha256_text(canonical_json([self.rating_s, self.aliases, self.implications]))[:16]

    def read(self, text: str) -> list[Tag]:
        """Return the tag that a text means, and all that follow from it, in one step or more."""
        found = [self.resolve(parse_tag(text))]
        for tag in found:
            for implied in map(self.resolve, self.implications.get(tag.name, ())):
                if all(implied.name != other.name for other in found):
                    found.append(implied)
        return found

    def resolve(self, tag: Tag) -> Tag:
        """Return the tag that is meant; its own category holds where no alias states one.

        Raises UserError (`<key>aliases`) for a circle of aliases.
        """
        seen = [tag.name]
        while (meant := self.aliases.get(tag.name)) is not None:
            tag = Tag(tag.category if meant.category is None else meant.category, meant.name)
            seen.append(tag.name)
            if seen.count(tag.name) > 1:
                raise UserError(f"{self.key}aliases: {' -> '.join(seen)} is a circle; remove one of these aliases")
        return tag

    def read_rating(self, text: str) -> str:
        """Return the rating that a text means, "" for none.

        Raises UserError (`<key>rating_s`) for `s` and `safe` where nothing says what they mean.
        """
        rating = parse_rating(text)
        if rating in AMBIGUOUS_RATINGS and self.rating_s is None:
            raise UserError(
                f"{self.key}rating_s: null, and images are rated {rating}; set sensitive (Danbooru since 2022) or "
                "general (Danbooru before, and other boorus)"
            )
        return self.rating_s if rating in AMBIGUOUS_RATINGS else rating


def read_rules(config: TagRulesConfig, key: str) -> TagRules:
    """Read the two CSV files of aliases (name, tag that is meant) and implications (tag, tag that follows).

    Raises UserError (`<key>aliases`, `<key>implications`) naming the file and the line that is wrong.
    """
    aliases = {name.name: meant for name, meant in _read_pairs(config.aliases, f"{key}aliases")}
    rules = TagRules(config.rating_s, aliases, {}, key)
    for name in aliases:
        rules.resolve(Tag(None, name))  # raises for a circle
    for tag, implied in _read_pairs(config.implications, f"{key}implications"):
        rules.implications.setdefault(rules.resolve(tag).name, []).append(implied)
    return rules


def _read_pairs(path: str | None, key: str) -> list[tuple[Tag, Tag]]:
    """Read a CSV file of two columns of tags; [] of None. Raises UserError (`key`)."""
    if path is None:
        return []
    pairs = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            for row in filter(None, reader):
                tags = [parse_tag(text) for text in row]
                if len(row) != 2 or not all(tag.name for tag in tags):
                    raise UserError(f"{key}: {path}, line {reader.line_num}: {row}; write two tags, as a,b")
                pairs.append(tuple(tags))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{key}: {path} cannot be read ({error}); give a CSV file of two columns, in UTF-8") from None
    return pairs
