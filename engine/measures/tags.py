"""What a tagger's evaluation counts: for each tag two integer histograms of its logits, and its highest logits.

The histograms are of the samples without and with the tag. Their edges are thresholds at which all counts are exact,
0.35, 0.5 and 0.65 among them. The step is 0.0155 in logit from -10.9 to 5, where rare tags are decided, and eight times
that out to +-24.8: 1,296 bins. Even 4,000 bins cannot rank a rare tag's few best images, because two of them share a
bin (AP errs by up to 0.3), so the 256 highest logits of each tag are kept as they are.

Memory does not depend on the number of images: 11,648 bytes per tag, 1.2 GB for 100,000 tags. The error of AP against
scikit-learn's on 50,000 images, for tags of 1 to 20 positives, is 0.0001 to 0.0007 for spread logits and up to 0.004
where one or two bins hold nearly all, as of an untrained head.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils.ranks import distributed

_UNIT = math.log(0.65 / 0.35) / 40  # so that 0.35, 0.5 and 0.65 are edges
# In units: bins of one unit between the two inner bounds, of `_COARSE` units outside them.
_LOWEST, _FINE_FROM, _FINE_TO, _HIGHEST, _COARSE = -1600, -704, 320, 1600, 8
_UNITS = np.r_[_LOWEST:_FINE_FROM:_COARSE, _FINE_FROM:_FINE_TO, _FINE_TO:_HIGHEST:_COARSE]
EDGES = _UNITS * _UNIT  # [BINS] logits, ascending; the first bin also holds what is below, the last what is above
BINS = len(EDGES)
_KEPT = 256  # logits of each tag that are kept as they are
_TAGS = 1024  # tags that are worked on at once


def edge_below(logits: np.ndarray) -> np.ndarray:
    """Return the index of the greatest edge that is not above each logit; 0 below all edges."""
    return np.maximum(np.searchsorted(EDGES, np.asarray(logits) + 1e-9, side="right") - 1, 0)


def _bin_of(logits: Tensor) -> Tensor:
    """Return the bin of each logit, int64; arithmetic takes a tenth of the time of torch.bucketize."""
    units = logits / _UNIT
    fine = units.clamp(_FINE_FROM, _FINE_TO)
    steps = fine + (units.clamp_(_LOWEST, _HIGHEST - 1) - fine) / _COARSE
    return steps.floor_().to(torch.int64) - (_FINE_FROM + (_LOWEST - _FINE_FROM) // _COARSE)


@dataclass(frozen=True)
class TagCounts:
    """The counts of all ranks.

    histograms: int32 [T, 2, BINS], of samples without and with each tag. scores: [T, 256] float32, its highest logits,
    descending, -inf where there are fewer; hits: bool, whether the sample has the tag.
    """

    histograms: Tensor
    scores: Tensor
    hits: Tensor

    def tails(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield tags, true positives and predictions [C, BINS] int64 at each edge, of some tags at a time."""
        for start in range(0, len(self.histograms), _TAGS):
            own = slice(start, start + _TAGS)
            tails = self.histograms[own].flip(2).cumsum(2).flip(2)
            yield own, tails[:, 1], tails.sum(1)

    def at(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return true positives and predictions [T] at an edge of each tag's own; edges: [T] indices."""
        place = torch.from_numpy(edges).to(self.histograms.device)[:, None]
        found = [(tp.gather(1, place[own]), both.gather(1, place[own])) for own, tp, both in self.tails()]
        return tuple(torch.cat(column)[:, 0].cpu().numpy() for column in zip(*found))

    def average_precision(self) -> np.ndarray:
        """Return each tag's AP [T], as scikit-learn defines it; NaN for a tag without positives."""
        parts = zip(*(tensor.split(_TAGS) for tensor in (self.histograms, self.scores, self.hits)))
        return torch.cat([_average_precision(*part) for part in parts]).cpu().numpy()


def _average_precision(histograms: Tensor, scores: Tensor, hits: Tensor) -> Tensor:
    """Return the AP of some tags [C] float64.

    Exact above the lowest kept logit; positives and negatives that share a bin below it count as evenly mixed.
    """
    exact = scores > scores[:, -1:]  # the lowest may have equals that were not kept
    ranks = torch.arange(_KEPT, device=scores.device)
    last = F.pad(scores[:, 1:] != scores[:, :-1], (0, 1), value=True)  # of a run of equal scores, which is one point
    last = torch.where(last, ranks, _KEPT - 1).flip(1).cummin(1).values.flip(1)
    precision = (hits.cumsum(1).double() / (ranks + 1)).gather(1, last)
    area = (precision * (hits & exact)).sum(1)

    kept = _bin_of(scores) + BINS * hits
    rest = histograms.flatten(1).scatter_add(1, kept, -exact.int()).view_as(histograms).flip(2).double()
    above = rest.cumsum(2) - rest + torch.stack([(exact & ~hits).sum(1), (exact & hits).sum(1)], dim=1)[:, :, None]
    negatives, positives = rest.unbind(1)
    true = above[:, 1] + (positives + 1) / 2  # at the middle positive of a bin
    area += (positives * true / (true + above[:, 0] + negatives / 2)).sum(1)
    return area / histograms[:, 1].sum(1)


class TagHistograms:
    """Count a tagger's logits over batches and ranks."""

    def __init__(self, num_tags: int) -> None:
        self.num_tags = num_tags
        self._counts: Tensor | None = None  # [T, 2 * BINS]
        self._scores = self._hits = torch.empty(0)  # [T, _KEPT]

    def add(self, logits: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Take a batch: logits [B, T]; targets [B, T], 0, 1, or NaN where not known; valid [B] bool.

        A logit that is NaN counts as the lowest.
        """
        if self._counts is None:
            self._counts = torch.zeros(self.num_tags, 2 * BINS, dtype=torch.int32, device=logits.device)
            self._scores = logits.new_full((self.num_tags, _KEPT), -torch.inf, dtype=torch.float32)
            self._hits = torch.zeros_like(self._scores, dtype=torch.bool)
        for start in range(0, self.num_tags, _TAGS):
            own = slice(start, start + _TAGS)
            # [C, B]: a row's bins then stay in the processor's cache.
            scores, known = (tensor[:, own].T.float().contiguous() for tensor in (logits, targets))
            used, hits = valid & ~known.isnan(), known > 0.5
            scores = torch.where(used & ~scores.isnan(), scores, -torch.inf)
            self._counts[own].scatter_add_(1, _bin_of(scores) + BINS * hits, used.int())
            scores, hits = torch.cat([self._scores[own], scores], dim=1), torch.cat([self._hits[own], hits], dim=1)
            self._scores[own], order = scores.topk(_KEPT, dim=1, sorted=False)
            self._hits[own] = hits.gather(1, order)

    def reduce(self) -> TagCounts:
        """Return the counts of all ranks."""
        assert self._counts is not None, "no batch was added"
        counts, parts = distributed.all_reduce_sum(self._counts).view(self.num_tags, 2, BINS), []
        for own in zip(self._scores.split(_TAGS), self._hits.split(_TAGS)):
            gathered = (distributed.gather_rows(kept).view(-1, *kept.shape) for kept in own)  # [ranks, C, 256]
            scores, hits = (kept.transpose(0, 1).flatten(1) for kept in gathered)
            scores, order = scores.topk(_KEPT, dim=1)
            parts.append((scores, hits.gather(1, order)))
        return TagCounts(counts, *(torch.cat(column) for column in zip(*parts)))
