"""What the tags of a collection mean, as its user states it: aliases, implications, and the rating `s`."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from data.config import TagRulesConfig
from data.tags.names import Tag, parse_tag
from utils.errors import UserError
from utils.io.files import canonical_json, sha256_text

_VERSION = 2  # of what tags are made of texts; a change makes every index again


@dataclass(frozen=True)
class TagRules:
    """How tags are read, beside their spelling.

    rating_s: what the ratings `s` and `safe` mean, sensitive or general; None where the collection has none.
    aliases: another name -> the tag that is meant. implications: a name -> all tags that follow from it. key: what the
    configuration keys of these begin with, for messages.
    """

    rating_s: str | None
    aliases: Mapping[str, Tag]
    implications: Mapping[str, tuple[Tag, ...]]
    key: str

    @cached_property
    def hash(self) -> str:
        """Return 16 hexadecimal digits of the rules."""
        return sha256_text(canonical_json([_VERSION, self.rating_s, self.aliases, self.implications]))[:16]

    def resolve(self, tag: Tag) -> Tag:
        """Return the tag that is meant; its own category holds where the alias states none."""
        meant = self.aliases.get(tag.name)
        return tag if meant is None else Tag(tag.category if meant.category is None else meant.category, meant.name)


def read_rules(config: TagRulesConfig, key: str) -> TagRules:
    """Read the two CSV files of aliases (name, tag that is meant) and implications (tag, tag that follows).

    Raises UserError (`<key>aliases`, `<key>implications`) naming the file and the line that is wrong.
    """
    rating_s, aliases, meant = config.rating_s, config.aliases, {}
    for line, (name, target) in _read_pairs(aliases, f"{key}aliases").items():
        if meant.setdefault(name.name, target).name != target.name:
            raise UserError(f"{key}aliases: {aliases}, line {line}: {name.name!r} is an alias of two tags; keep one")
    final = TagRules(rating_s, {name: _follow(name, meant, f"{key}aliases") for name in meant}, {}, key)
    direct: dict[str, list[Tag]] = {}
    for tag, implied in _read_pairs(config.implications, f"{key}implications").values():
        direct.setdefault(final.resolve(tag).name, []).append(final.resolve(implied))
    return TagRules(rating_s, final.aliases, {name: _closure(name, direct) for name in direct}, key)


def _follow(name: str, aliases: Mapping[str, Tag], key: str) -> Tag:
    """Return what a chain of aliases ends with. Raises UserError (`key`) for a circle."""
    seen = [name]
    while seen[-1] in aliases:
        if len(seen) > len(set(seen)):
            raise UserError(f"{key}: {' -> '.join(seen)} is a circle; remove one of these aliases")
        tag = aliases[seen[-1]]
        seen.append(tag.name)
    return tag


def _closure(name: str, direct: Mapping[str, list[Tag]]) -> tuple[Tag, ...]:
    """Return every tag that follows from a name, in one step or more; not the name itself."""
    found: dict[str, Tag] = {}
    stack = list(direct[name])
    while stack:
        tag = stack.pop()
        if tag.name not in found and tag.name != name:
            found[tag.name] = tag
            stack += direct.get(tag.name, [])
    return tuple(found.values())


def _read_pairs(path: str | None, key: str) -> dict[int, tuple[Tag, Tag]]:
    """Read a CSV file of two columns of tags, by line; {} of None. Raises UserError (`key`)."""
    if path is None:
        return {}
    pairs = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            for row in reader:
                tags = [parse_tag(text) for text in row]
                if row and (len(row) != 2 or not all(tag.name for tag in tags)):
                    raise UserError(f"{key}: {path}, line {reader.line_num}: {row}; write two tags, as a,b")
                if row:
                    pairs[reader.line_num] = (tags[0], tags[1])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{key}: {path} cannot be read ({error}); give a CSV file of two columns, in UTF-8") from None
    return pairs
