"""The promise of a classifier holds as often as it says; what cannot be promised is refused with what would do."""

import numpy as np
import pytest
import torch
from scipy.stats import beta

from engine.measures.promise import find_edge, make_promise
from engine.measures.tags import BINS, TagCounts, edge_below
from tests.support import refuses
from utils.formats.thresholds import RISK

SHARE = 0.05


def pool(seed, skill, overconfidence, size=4000):
    """Return the counts of a network's images, [2, BINS]: wrong and right, by the probability that it states."""
    draw = np.random.default_rng(seed)
    right = draw.beta(skill, 1.0, size)
    logits = np.log(right / (1 - right)) * overconfidence
    counts = np.zeros((2, BINS), np.int64)
    np.add.at(counts, ((draw.random(size) < right).astype(int), edge_below(logits)), 1)
    return counts


def tails(counts):
    """Return the wrong and right answers of at least each edge."""
    return counts[:, ::-1].cumsum(1)[:, ::-1]


def counts_of(*levels):
    """Return counts [2, BINS] of (probability, wrong, right)."""
    counts = np.zeros((2, BINS), np.int64)
    for prob, *pair in levels:
        counts[:, edge_below(np.log(prob / (1 - prob)))] = pair
    return counts


def test_the_promise_is_kept_in_95_of_100_calibrations_and_the_usual_rule_is_not():
    """Eight networks, 200 calibrations each, on 200 to 2,000 images drawn from the network's pool."""
    draw = np.random.default_rng(0)
    made = broken = broken_naive = 0
    for seed, skill in enumerate((3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 24.0)):
        counts = pool(seed, skill, overconfidence=1 + seed % 3)
        wrong, right = tails(counts)
        for size in (200, 500, 1000, 2000) * 50:
            found = tails(draw.multinomial(size, counts.ravel() / counts.sum()).reshape(2, BINS))
            naive = np.flatnonzero((found.sum(0) > 0) & (found[0] <= SHARE * found.sum(0)))[0]
            broken_naive += wrong[naive] > SHARE * (wrong + right)[naive]
            try:
                edge = find_edge(*found, SHARE)
            except ValueError:
                continue
            made += 1
            broken += wrong[edge] > SHARE * (wrong + right)[edge]
    assert made > 1000 and broken <= 0.05 * made
    assert broken_naive > 0.4 * 1600


def test_thresholds_are_tested_from_strict_to_loose_by_the_exact_bound():
    counts = counts_of((0.99, 0, 110), (0.9, 12, 8), (0.6, 0, 300))
    assert tails(counts).sum(0)[find_edge(*tails(counts), SHARE)] == 110  # all 430 would pass, but 130 do not
    assert beta.ppf(0.95, 12 + 1, 430 - 12) < SHARE < beta.ppf(0.95, 12 + 1, 130 - 12)
    loose = counts_of((0.99, 0, 100), (0.9, 1, 99), (0.6, 30, 10))
    assert tails(loose).sum(0)[find_edge(*tails(loose), SHARE)] == 200


@pytest.mark.parametrize(
    "levels, message",
    [
        (
            [(0.99, 0, 58)],
            r"^risk: 0\.05 cannot be promised on 58 images: 58 of the 58 .*; about 100 .* risk=0\.06 can",
        ),
        ([(0.99, 40, 60)], r"on 100 images: 60 of the 100 most .* right; no number .*; risk=0\.49 can"),
        ([(0.99, 7, 0)], "0 of the 7 most probable answers are right; no number of such images in reach would do"),
        ([], "cannot be promised on 0 images"),
    ],
)
def test_what_cannot_be_promised_is_refused_with_what_would_do(levels, message):
    with refuses(message):
        find_edge(*tails(counts_of(*levels)), SHARE)


def test_the_table_has_the_promise():
    counts = counts_of((0.99, 2, 208), (0.3, 39, 1))
    (row,) = make_promise(TagCounts(torch.from_numpy(counts)[None], torch.empty(0), torch.empty(0)), SHARE).rows
    assert row.profile == RISK and row.support == 250 and "; 2 of 210 were" in row.note
    assert (row.precision, row.recall) == pytest.approx((208 / 210, 208 / 250), abs=1e-6)
    assert 0.3 < row.threshold < 0.99
