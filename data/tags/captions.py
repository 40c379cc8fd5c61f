"""Captions for text to image: from a row's sidecars, manifest or predicted tags, and varied anew for each sample.

text = config.read(collection.row(row))                 # what the collection says of the image
config.vary_tags(text, generator)                       # what the network is told this time
"""

from typing import Annotated, Literal

import numpy as np
import pyarrow.compute as pc
import torch
from pydantic import Field

from data.collection.collection import Collection, Row
from data.layouts.table import show_some
from data.tags.spelling import parse_tag, with_spaces
from utils.config.bounds import CountOrZero, Fraction
from utils.config.schema import Strict
from utils.errors import UserError
from utils.record.logging import get_logger
from utils.vocabulary import RATING

log = get_logger(__name__)


class CaptionConfig(Strict):
    """How a row's text becomes the caption of a sample, in this order.

    source: the caption as it is, or the tags in words; the other one where a row lacks it. caption_dropout: the
    probability that a sample has no caption, and dropout_to what the network is given then: the embedding of the empty
    text, or zeros. The text is tags between separators (or lines): the first `keep_first` stay as they are; of the
    others each is dropped with probability `tag_dropout`, and `shuffle` puts them in a random order. prefix: put before
    every caption that is not dropped, with a separator.
    """

    source: Literal["caption", "tags"]
    separator: Annotated[str, Field(min_length=1)]
    keep_first: CountOrZero
    shuffle: bool
    tag_dropout: Fraction
    caption_dropout: Fraction
    dropout_to: Literal["empty", "zeros"]
    prefix: str

    @property
    def varies_tags(self) -> bool:
        """Whether a row has more than one caption."""
        return self.shuffle or self.tag_dropout > 0

    def read(self, row: Row) -> str:
        """Return a row's text, empty where it has none."""
        caption = (row.caption or "").strip()
        if caption and self.source == "caption":
            return caption
        return self.separator.join(filter(None, map(spell, row.tags or ()))) or caption

    def drops(self, generator: torch.Generator) -> bool:
        """Return whether a training sample has no caption."""
        return bool(torch.rand((), generator=generator) < self.caption_dropout)

    def vary_tags(self, text: str, generator: torch.Generator) -> str:
        """Return one of a row's captions, which is never dropped."""
        if not self.varies_tags:
            return self.complete(text)
        tags = self.split(text)
        first, others = tags[: self.keep_first], tags[self.keep_first :]
        is_kept = torch.rand(len(others), generator=generator) >= self.tag_dropout
        kept = torch.arange(len(others))[is_kept]
        if self.shuffle:
            kept = kept[torch.randperm(len(kept), generator=generator)]
        return self.complete(self.separator.join([*first, *(others[index] for index in kept.tolist())]))

    def split(self, text: str) -> list[str]:
        """Return the tags of a text."""
        pieces = text.replace("\n", self.separator).split(self.separator.strip() or self.separator)
        return [piece.strip() for piece in pieces if piece.strip()]

    def complete(self, text: str) -> str:
        """Return a text behind the prefix, for evaluation."""
        return self.separator.join(part for part in (self.prefix, text) if part)


def describe_captions(collection: Collection, rows: np.ndarray, config: CaptionConfig) -> str:
    """Return in a line where the captions of some rows come from; warn of empty ones by name.

    Raises UserError (`data.root`) where no row has a text.
    """
    table = collection.table
    has = {
        "caption": pc.not_equal(pc.utf8_trim_whitespace(table["caption"]), "").fill_null(False).to_numpy()[rows],
        "tags": pc.greater(pc.list_value_length(table["tags"]), 0).to_numpy()[rows],
    }
    other = "tags" if config.source == "caption" else "caption"
    counts = {config.source: has[config.source], other: has[other] & ~has[config.source]}
    counts["empty"] = ~(has["caption"] | has["tags"])
    if counts["empty"].all():
        raise UserError(
            f"data.root: none of the {len(rows):,} images of {str(collection.root)!r} has a caption or tags; give them "
            "sidecars or a manifest (docs/collections.md), or predict.py output=beside text.spaces=true writes tags"
        )
    if len(found := rows[counts["empty"]]):
        names = show_some([repr(collection.row(row).path) for row in found[:100].tolist()])
        log.warning("captions: %s images have neither a caption nor tags: %s", f"{len(found):,}", names)
    return "; ".join(f"{name} {chosen.sum():,}" for name, chosen in counts.items() if chosen.any())


def spell(text: str) -> str:
    """Return a tag in words: without its category, but for a rating."""
    category, name = parse_tag(text)
    return f"rating:{name}" if category == RATING else with_spaces(name)
