"""Weights of images by the frequency of their tags: closed forms, a slow reference, the mean of 1."""

import numpy as np
import pytest

from data.tags.captions import Captions
from data.tags.tag_weights import TagWeightsConfig, read_tags, weigh_images
from tests.data.tags.test_captions import collection_of, config


def rule(**changes):
    return TagWeightsConfig(**{"power": 0.5, "low": 0.1, "high": 3.0, "factors": {}, **changes})


def test_a_tag_weighs_by_its_rarity_within_limits():
    counts = np.array([100, 400, 25, 1, 10**6, 0])  # of the tags that occur, 100 is the median
    assert rule().weigh(counts, np.ones(6)) == pytest.approx([1.0, 0.5, 2.0, 3.0, 0.1, 3.0])
    assert rule(power=0.0).weigh(counts, np.ones(6)).tolist() == [1.0] * 6


def test_an_image_weighs_the_mean_of_its_tags_and_the_images_one_on_average(tmp_path):
    """Only the first, second, fourth and last image count, and only tags that weigh anything."""
    rows = {"0.png": ["a"], "1.png": ["a", "b"], "2.png": ["a", "c"], "3.png": [], "4.png": ["meta:x"]}
    manifest = [{"path": name, "tags": tags} for name, tags in rows.items()]
    collection = collection_of(tmp_path, {"manifest.jsonl": manifest}, rows)
    captions = Captions(config(), collection)
    found = weigh_images(collection, np.array([0, 1, 3, 4]), rule(factors={"meta": 0.0}), captions)
    one, two = 0.5**0.5, (0.5**0.5 + 1) / 2  # of tags on two images, and on two images and on one
    assert found == pytest.approx(np.array([one, two, two, (one + two) / 2, (one + two) / 2]) * 2 / (one + two))


def test_tags_come_from_captions_where_there_are_none_but_not_from_sentences(tmp_path):
    lines = [{"tags": ["x"], "caption": "y"}, {"caption": "A cat, grey and old, sleeps on the mat.\nhat, Long Hair"}]
    manifest = [{"path": f"{name}.png", **line} for name, line in zip("ab", lines)]
    collection = collection_of(tmp_path, {"manifest.jsonl": manifest}, ("a.png", "b.png"))
    tags = read_tags(collection, Captions(config(), collection))
    assert [[tags.names[tag] for tag in tags.of_row(row)] for row in (0, 1)] == [["x"], ["hat", "Long Hair"]]
