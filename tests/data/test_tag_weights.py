"""Weights of images by the frequency of their tags: closed forms, a slow reference, the mean of 1."""

import numpy as np
import pytest

import data.tag_weights
from data.tag_weights import class_factors, effective_sample_size, normalise, weigh_rows, weigh_tags

RULES = {"power": 0.5, "low": 0.1, "high": 3.0}


def csr(rows):
    return np.concatenate([np.array(row, np.int32) for row in rows]), np.cumsum([0, *map(len, rows)])


def test_a_tag_weighs_by_its_rarity_within_limits():
    counts = np.array([100, 400, 25, 1, 10**6, 0])  # of the tags that occur, 100 is the median
    weights = weigh_tags(counts, np.ones(6), **RULES)
    assert weights == pytest.approx([1.0, 0.5, 2.0, 3.0, 0.1, 3.0])
    assert weigh_tags(counts, np.ones(6), power=0.0, low=0.1, high=3.0).tolist() == [1.0] * 6


def test_factors_are_by_class():
    assert class_factors([0, 4, 9, 4], {"character": 1.5, "rating": 0.0}).tolist() == [1.0, 1.5, 0.0, 1.5]
    assert weigh_tags(np.array([4, 4]), np.array([1.0, 1.5]), **RULES).tolist() == [1.0, 1.5]


@pytest.mark.parametrize("combine", ["mean", "geometric_mean"])
def test_rows_equal_a_slow_reference(combine, monkeypatch):
    monkeypatch.setattr(data.tag_weights, "_CHUNK_ROWS", 7)
    generator = np.random.default_rng(0)
    rows = [np.flatnonzero(generator.random(20) < 0.2) for _ in range(50)] + [[], [3]]
    tags = generator.uniform(0.1, 3.0, 20)
    tags[[3, 5]] = 0.0  # left out by a factor
    kept = [[tags[tag] for tag in row if tags[tag]] for row in rows]
    of = {"mean": np.mean, "geometric_mean": lambda values: np.exp(np.mean(np.log(values)))}[combine]
    expected = np.array([of(row) if row else np.nan for row in kept])
    expected[np.isnan(expected)] = np.nanmean(expected)
    found = weigh_rows(*csr(rows), tags, combine)
    assert found == pytest.approx(expected) and len(found) == 52


def test_rows_without_any_tag_weigh_the_same():
    assert weigh_rows(*csr([[], []]), np.ones(3), "mean").tolist() == [1.0, 1.0]


def test_the_mean_over_the_rows_is_1():
    weights, rows = np.random.default_rng(0).uniform(0.1, 3.0, 100), np.arange(0, 100, 3)
    found = normalise(weights, rows)
    assert found[rows].mean() == pytest.approx(1.0) and found / found[0] == pytest.approx(weights / weights[0])


def test_effective_sample_size():
    assert effective_sample_size(np.full(10, 0.3)) == pytest.approx(10)
    assert effective_sample_size(np.array([1.0, 0.0, 0.0])) == 1
    assert effective_sample_size(np.array([3.0, 1.0])) == pytest.approx(1.6)
