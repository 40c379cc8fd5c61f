"""Weights of images by the frequency of their tags: closed forms, a slow reference, the mean of 1."""

import numpy as np
import pytest

from data.tags.tag_weights import ImageTags, TagWeightsConfig, describe_weights, read_tags, weigh_images, weigh_rows
from tests.data.tags.test_captions import collection_of, config

NAMES = [f"tag_{number}" for number in range(20)]


def rule(**changes):
    return TagWeightsConfig(
        **{"power": 0.5, "low": 0.1, "high": 3.0, "factors": {}, "reestimate_steps": None, **changes}
    )


def tags_of(rows, names=NAMES):
    return ImageTags(np.concatenate([np.array(row, np.int32) for row in rows]), np.cumsum([0, *map(len, rows)]), names)


def test_a_tag_weighs_by_its_rarity_within_limits_and_by_its_category():
    counts = np.array([100, 400, 25, 1, 10**6, 0])  # of the tags that occur, 100 is the median
    assert rule().weigh(counts, np.ones(6)) == pytest.approx([1.0, 0.5, 2.0, 3.0, 0.1, 3.0])
    assert rule(power=0.0).weigh(counts, np.ones(6)).tolist() == [1.0] * 6
    tags = tags_of([[0, 1, 2, 3]], ["hat", "character:miku", "rating:e", "Character:rin"])
    factors = tags.factors(rule(factors={"character": 1.5, "rating": 0.0}))
    assert (
        factors.tolist() == [1.0, 1.5, 0.0, 1.5] and rule().weigh(np.full(4, 4), factors).tolist() == factors.tolist()
    )


def test_rows_equal_a_slow_reference_and_weigh_1_on_average():
    generator = np.random.default_rng(0)
    rows = [np.flatnonzero(generator.random(20) < 0.2) for _ in range(50)] + [[], [3]]
    weights = generator.uniform(0.1, 3.0, 20)
    weights[[3, 5]] = 0.0  # left out by a factor
    kept = [[weights[tag] for tag in row if weights[tag]] for row in rows]
    expected = np.array([np.mean(row) if row else np.nan for row in kept])
    expected[np.isnan(expected)] = np.nanmean(expected)
    assert weigh_rows(tags_of(rows), weights) == pytest.approx(expected)
    assert weigh_rows(tags_of([[], []]), np.ones(3)).tolist() == [1.0, 1.0]
    found, some = weigh_images(tags_of(rows), np.arange(0, 52, 3), rule()), np.arange(0, 52, 3)
    assert found[some].mean() == pytest.approx(1.0) and len(np.unique(found.round(6))) > 20


def test_the_effective_number_of_images_is_said():
    assert describe_weights(np.array([3.0, 1.0])).endswith("effective sample size 2")  # 16 / 10
    assert describe_weights(np.array([1.0, 0.0, 0.0])).startswith("0.00 to 1.00")


def test_tags_come_from_captions_where_there_are_none_but_not_from_sentences(tmp_path):
    lines = [{"tags": ["x"], "caption": "y"}, {"caption": "A cat, grey and old, sleeps on the mat.\nhat, Long Hair"}]
    manifest = [{"path": f"{name}.png", **line} for name, line in zip("ab", lines)]
    tags = read_tags(collection_of(tmp_path, {"manifest.jsonl": manifest}, ("a.png", "b.png")), config())
    assert [[tags.names[tag] for tag in tags.of_row(row)] for row in (0, 1)] == [["x"], ["hat", "Long Hair"]]
