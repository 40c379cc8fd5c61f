"""Captions for text to image, read from sidecars or a manifest and varied for each sample.

texts = config.read(collection.row(row))    # the texts in the collection, one or several
caption, is_dropped = config.draw(texts, generator, config.arrange)    # of this sample
Captions(config, collection).of(row)    # the config of a row, where concepts have captions of their own
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal, Self

from numpy import ndarray

from data.collection.collection import Collection, Row
from data.layouts.table import has_value, show_some
from utils.config.bounds import CountOrZero, Fraction, Name
from utils.config.messages import ConfigError, validate
from utils.config.schema import Strict
from utils.errors import UserError
from utils.formats.emphasis import escape, read_emphasis
from utils.formats.spelling import RATING, is_sentence, parse_tag, split_tags, with_spaces
from utils.io.files import Values
from utils.record.logging import log

if TYPE_CHECKING:
    from torch import Generator


Vary = Callable[[str, "Generator"], str]  # from a text to a random caption
_SEPARATOR = ", "  # between tags
_COMMA = "\ue000"  # replaces a comma inside emphasis; a private character of Unicode
_LONGEST_TAG = 100  # characters; longer pieces are sentences
_STATED = 2_000  # tags in the header of a file


class CaptionConfig(Strict):
    """How the text of a row becomes the caption of a sample.

    source: the caption as it is, or the tags in words; a row without it uses the other. lines: use one of the lines of
    a caption at random (the first in evaluation), always the first, or all as one text. caption_dropout: probability
    that the caption is dropped. dropout_to: the input for a dropped caption: the embedding of the empty text, or zeros.
    The text is split into tags at commas, unless it is a sentence (`is_sentence`). The first `keep_first` tags
    stay; each other tag is dropped with probability `tag_dropout`, and `shuffle` permutes the rest.
    keep_tokens_separator: tags before it stay in front (`keep_first` is then not used), tags after a second one stay at
    the end; the separator is removed. prefix, suffix: texts around every caption that is kept, with a comma between, or
    none where a space is: "a photo of ". A caption with the prefix somewhere gets no second one.
    emphasis: brackets and BREAK are emphasis (utils/formats/emphasis.py); brackets of tags are not.
    """

    source: Literal["caption", "tags"]
    lines: Literal["one_of", "first", "join"]
    keep_first: CountOrZero
    shuffle: bool
    tag_dropout: Fraction
    keep_tokens_separator: Name | None
    caption_dropout: Fraction
    dropout_to: Literal["empty", "zeros"]
    prefix: str
    suffix: str
    emphasis: bool

    def for_concept(self, key: str, values: Values) -> Self:
        """Return the config with the values of a concept. Raises ValueError; key: where the values are."""
        for name in ("dropout_to", "emphasis"):
            if name in values:
                raise ValueError(f"{key}.{name}: all concepts have the same; set task.captions.{name}")
        try:
            return validate({**self.model_dump(), **values}, type(self)) if values else self
        except ConfigError as error:
            raise ValueError("; ".join(f"{key}.{line}" for line in error.args)) from None

    @property
    def varies_tags(self) -> bool:
        """Whether captions vary from sample to sample."""
        return self.shuffle or self.tag_dropout > 0

    def read(self, row: Row) -> list[str]:
        """Return the texts of a row, at least one, which may be empty. Only `lines=one_of` returns several."""
        lines = [line.strip() for line in (row.caption or "").split("\n") if line.strip()]
        if not lines or self.source == "tags":
            tags = _SEPARATOR.join(filter(None, map(self.spell, row.tags or ())))
            lines = [tags] if tags or not lines else lines
        if self.lines == "join":
            lines = [_SEPARATOR.join(lines)]
        return lines[:1] if self.lines == "first" else lines

    def draw(self, texts: list[str], generator: Generator | None, vary: Vary) -> tuple[str, bool]:
        """Return the caption of a sample from the texts of its row, and whether it is dropped ("").

        generator: None in evaluation, where the whole first text is the caption. vary: `arrange`, or a function that
        draws one of the variants in a cache.
        """
        if generator is None:
            return self.arrange(texts[0]), False
        import torch  # not above: the schemas need no torch

        if torch.rand((), generator=generator) < self.caption_dropout:
            return "", True
        text = texts[int(torch.randint(len(texts), (), generator=generator))] if len(texts) > 1 else texts[0]
        return vary(text, generator), False

    def arrange(self, text: str, generator: Generator | None = None) -> str:
        """Return the caption for the text of a row. It is random with a generator. It is never dropped as a whole."""
        generator = generator if self.varies_tags else None
        parts = text.split(self.keep_tokens_separator, 2) if self.keep_tokens_separator else [text]
        split = [self._split_marked(part) for part in parts]
        tags = [*itertools.chain(*split)]
        if generator is None or (tags and is_sentence(tags)):
            tags = [text] if len(parts) == 1 else tags
        else:
            first = self.keep_first if len(parts) == 1 else len(split[0])
            end = len(tags) - len(split[2]) if len(parts) == 3 else len(tags)
            tags[first:end] = self._vary(tags[first:end], generator)
        text = _SEPARATOR.join(tags)
        has_prefix = re.search(rf"(?<!\w){re.escape(self.prefix.strip())}(?!\w)", text, re.IGNORECASE)
        text = text if has_prefix else _join(self.prefix, text)
        return _join(text, self.suffix)

    def _vary(self, tags: list[str], generator: Generator) -> list[str]:
        """Return the tags that are not dropped, in a random order with `shuffle`."""
        import torch

        kept = (torch.rand(len(tags), generator=generator) >= self.tag_dropout).nonzero()[:, 0]
        if self.shuffle:
            kept = kept[torch.randperm(len(kept), generator=generator)]
        return [tags[index] for index in kept.tolist()]

    def split(self, text: str) -> list[str]:
        """Split a text into tags, without emphasis."""
        text = text.replace(self.keep_tokens_separator, _SEPARATOR) if self.keep_tokens_separator else text
        return split_tags(read_emphasis(text).plain if self.emphasis else text)

    def spell(self, tag: str) -> str:
        """Return a tag in words, as part of a caption."""
        return escape(spell(tag)) if self.emphasis else spell(tag)

    def _split_marked(self, text: str) -> list[str]:
        """Split a text into tags, but not within the brackets of emphasis."""
        for start, end in read_emphasis(text).spans if self.emphasis else ():
            text = text[:start] + text[start:end].replace(",", _COMMA) + text[end:]
        return [piece.replace(_COMMA, ",") for piece in split_tags(text)]


class Captions:
    """The rules for the captions of each row: `task.captions`, with the values of the row's concept."""

    def __init__(self, config: CaptionConfig, collection: Collection) -> None:
        keyed = ((f"data.concepts.{number}.captions", each) for number, each in enumerate(collection.concepts))
        self._configs = [config.for_concept(key, concept.captions) for key, concept in keyed] or [config]
        self._ids = collection.concept_ids()

    def of(self, row: int) -> CaptionConfig:
        """Return the rules of a row."""
        return self._configs[self._ids[row]]


def describe_captions(collection: Collection, rows: ndarray, config: CaptionConfig) -> str:
    """Describe in one line where the captions of `rows` come from; warn of images without one.

    Raises UserError (`data.root`) if no row has a text.
    """
    has = {name: has_value(collection.table[name])[rows] for name in ("caption", "tags")}
    other = "tags" if config.source == "caption" else "caption"
    collection.refuse_faults(config.source, rows=rows)
    collection.refuse_faults(other, rows=rows[~has[config.source]])
    is_empty = ~(has["caption"] | has["tags"])
    if is_empty.all() and not config.prefix:
        raise UserError(
            f"data.root: none of the {len(rows):,} images of '{collection.root}' has a caption or tags; for one "
            'subject or style set data.trigger="sks dog", words of your own that will call it; or give each image a '
            ".txt file with its caption (docs/lora.md), or write tags with predict.py output=beside text.spaces=true"
        )
    without = rows[is_empty]
    if len(without) and not config.prefix:
        names = show_some([repr(collection.row(row).path) for row in without[:100].tolist()])
        log.warning("captions: %s images have neither a caption nor tags: %s", f"{len(without):,}", names)
    counts = {config.source: has[config.source].sum(), other: (has[other] & ~has[config.source]).sum()}
    counts["the trigger alone" if config.prefix else "empty"] = is_empty.sum()
    return "; ".join(f"{name} {count:,}" for name, count in counts.items() if count)


def count_caption_tags(collection: Collection, rows: ndarray, captions: Captions) -> dict[str, dict[str, int]]:
    """Count the rows that have a tag in their captions, by the folder's name and tag; only the most frequent tags.

    A short caption without a comma counts as a tag, as in sd-scripts, whose files hold these counts.
    """
    counts = Counter[tuple[str, str]]()
    for index in rows.tolist():
        row = collection.row(index)
        config = captions.of(index)
        folder = PurePosixPath(row.path).parent.name or collection.root.name
        tags = itertools.chain.from_iterable(map(config.split, map(config.arrange, config.read(row))))
        short = dict.fromkeys((folder, tag.lower()) for tag in tags if len(tag) <= _LONGEST_TAG)
        counts.update(short.keys())
    found: dict[str, dict[str, int]] = {}
    for (folder, tag), count in counts.most_common(_STATED):
        found.setdefault(folder, {})[tag] = count
    return found


def _join(first: str, second: str) -> str:
    """Join two texts, by a comma where no space is between them."""
    is_apart = not first or not second or first.endswith(" ") or second.startswith(" ")
    return first + ("" if is_apart else _SEPARATOR) + second


def spell(text: str) -> str:
    """Return a tag in words; only a rating keeps its category."""
    category, name = parse_tag(text)
    return f"rating:{name}" if category == RATING else with_spaces(name)
