"""Which tag a tagger gives in place of which: of eye colours, sizes, ratings."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.ranks import distributed
from utils.thresholds import DEFAULT_LOGIT
from utils.vocabulary import Vocabulary

_MOST_TAGS = 2048  # a square of counts of them is 17 MB; of 100,000 tags it would be 40 GB
_PAIRS = 100  # rows of the table


class TagConfusions:
    """Count, over batches and ranks, the images where a tag is missed and another is given wrongly.

    An image counts for the pair (a, b) where it has a and not b, and the probability of b reaches 0.35 while that of a
    does not. All pairs of the 2,048 tags with the most training images are counted, exactly; other tags are not.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._order = np.argsort(-np.asarray(vocabulary.counts), kind="stable")[:_MOST_TAGS]
        self._names = [vocabulary.names[index] for index in self._order]
        self._tags = self._counts = torch.empty(0)

    def add(self, logits: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Take a batch: logits [B, T]; targets [B, T], 0, 1, or NaN where not known; valid [B] bool."""
        if not len(self._counts):
            self._tags = torch.from_numpy(self._order).to(logits.device)
            # A last row and column count all images that miss a tag, and all that are given one wrongly.
            self._counts = torch.zeros((len(self._order) + 1,) * 2, dtype=torch.int32, device=logits.device)
        logits, targets = (tensor.index_select(1, self._tags) for tensor in (logits, targets))
        given, used = logits >= DEFAULT_LOGIT, valid[:, None]
        mistakes = (targets == 1) & ~given, (targets == 0) & given
        missed, wrong = (torch.cat([pairs & used, used], dim=1).float() for pairs in mistakes)
        with torch.autocast(logits.device.type, enabled=False):  # sums of ones are exact in float32 alone
            self._counts += (missed.T @ wrong).int()

    def reduce(self) -> list[dict[str, Any]]:
        """Return a row for each of the pairs that occur most beyond chance, over all ranks.

        by_chance: the images that would count if the two mistakes had nothing to do with each other; without it, the
        tags that are missed most and those that are given most would lead. share: of the images that miss the tag.
        """
        counts = distributed.all_reduce_sum(self._counts).cpu().numpy().astype(np.int64)
        pairs, missed, wrong = counts[:-1, :-1], counts[:-1, -1], counts[-1, :-1]
        chance = missed[:, None] * wrong / max(1, counts[-1, -1])
        tags, others = np.nonzero(pairs > chance)
        first = np.argsort(chance[tags, others] - pairs[tags, others], kind="stable")[:_PAIRS]
        return [
            {"tag": self._names[tag], "given": self._names[other], "images": int(pairs[tag, other]),
             "by_chance": float(chance[tag, other]), "share": float(pairs[tag, other] / missed[tag])}
            for tag, other in zip(tags[first], others[first])
        ]  # fmt: skip
