"""A tagger's figures from histograms against torchmetrics and against all scores kept and sorted: seconds of the whole.

python bench/tag_metrics.py [quick]          (on an idle machine; about fifteen minutes and 5 GiB on two CPU cores)

Each side takes batches of logits and targets and returns the AP of each tag; ours also all other figures of a report.
torchmetrics' binned AP has 200 thresholds, its exact one keeps all scores. At full size the first would take an hour
and the second over ten gigabytes; there the other side sorts all scores, which is the least that exact AP takes.
`error` is the greatest difference of our AP to the exact one.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torchmetrics.classification import MultilabelAveragePrecision

from bench.measure import Comparison, run_bench
from engine.measures.tag_scores import TagScores
from engine.measures.tags import TagHistograms
from utils.vocabulary import Vocabulary

BATCH, POOL, THRESHOLDS, RARE, FREQUENT = 250, 8, 200, 3e-4, 0.05
SIZES, QUICK = ((5_000, 1_000), (50_000, 10_000)), ((1_000, 100), (2_000, 200))  # images, tags


class Batches:
    """Batches of a good tagger, with tags of 0.03 to 5 per cent: a pool of them, shifted a little each time."""

    def __init__(self, images, num_tags, device):
        generator = torch.Generator().manual_seed(0)
        share = torch.logspace(np.log10(RARE), np.log10(FREQUENT), num_tags)
        self.number, self.num_tags, self._pool = images // BATCH, num_tags, []
        for _ in range(POOL):
            targets = (torch.rand(BATCH, num_tags, generator=generator) < share).float()
            logits = share.logit() + torch.randn(BATCH, num_tags, generator=generator) + 3 * targets
            self._pool.append((logits.to(device), targets.to(device)))

    def __iter__(self):
        for number in range(self.number):
            logits, targets = self._pool[number % POOL]
            yield logits + 0.003 * (number // POOL), targets


def from_histograms(batches):
    """Return the AP of each tag, as ours."""
    measure = TagHistograms(batches.num_tags)
    for logits, targets in batches:
        measure.add(logits, targets, torch.ones(BATCH, dtype=torch.bool, device=logits.device))
    names = tuple(str(tag) for tag in range(batches.num_tags))
    zeros = (0,) * batches.num_tags
    scores = TagScores(measure.reduce(), Vocabulary(names, zeros, zeros, zeros))
    scores.scalars()
    return scores.ap


def by_torchmetrics(batches, thresholds):
    """Return the AP of each tag; thresholds: None is exact."""
    logits, _ = next(iter(batches))
    measure = MultilabelAveragePrecision(batches.num_tags, average=None, thresholds=thresholds).to(logits.device)
    for logits, targets in batches:
        measure.update(logits, targets.long())
    return measure.compute().cpu().numpy()


def by_sorting(batches, tags=500):
    """Return the AP of each tag, of all scores sorted; equal scores are in the order of the images."""
    columns = zip(*((logits, targets.bool()) for logits, targets in batches))
    logits, targets = (torch.cat(column) for column in columns)
    ranks, found = torch.arange(1, len(logits) + 1, device=logits.device)[:, None], []
    for scores, hits in zip(logits.split(tags, dim=1), targets.split(tags, dim=1)):
        hits = hits.gather(0, scores.argsort(dim=0, descending=True))
        found.append((hits.cumsum(0) / ranks * hits).sum(0) / hits.sum(0))
    return torch.cat(found).cpu().numpy()


def comparisons(device, quick):
    """Yield the two sizes."""
    others = (
        {
            "torchmetrics, binned": partial(by_torchmetrics, thresholds=THRESHOLDS),
            "torchmetrics, exact": partial(by_torchmetrics, thresholds=None),
        },
        {"all sorted": by_sorting},
    )
    for (images, num_tags), sides in zip(QUICK if quick else SIZES, others):
        batches = Batches(images, num_tags, device)
        error = np.nanmax(np.abs(from_histograms(batches) - by_sorting(batches)))  # and a warm-up
        turns = {name: partial(side, batches) for name, side in {"histograms": from_histograms, **sides}.items()}
        yield Comparison(f"{images:,} x {num_tags:,}", turns, warmup=0, facts={"error": float(error)})


if __name__ == "__main__":
    run_bench(comparisons, turns=3)
