"""Weights of images by the frequency of their tags, so that common subjects do not dominate rare ones.

weights = weigh_images(collection, rows, config, captions)
"""

import functools
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy import ndarray

from data.collection.collection import Collection
from data.collection.tag_rows import NamedTags
from data.tags.captions import Captions
from utils.config.bounds import Factor, Positive, between
from utils.config.schema import Strict
from utils.formats.spelling import category_name, is_sentence, parse_tag


class TagWeightsConfig(Strict):
    """Weights of tags: (median / count) ** power within low and high, times the factor of the tag's category.

    The weight of an image is the mean over its tags, scaled to 1 on average.
    """

    power: between(float, 0, 4)
    low: Factor
    high: Positive
    factors: dict[Literal["general", "artist", "copyright", "character", "meta", "rating"], Factor]

    def weigh(self, counts: ndarray, factors: ndarray) -> ndarray:
        """Return the weight of each tag, float64 [T]; counts: its images; factors: for its category; both [T].

        The median is over tags with images.
        """
        seen = counts[counts > 0]
        median = np.median(seen) if len(seen) else 1.0
        return np.clip((median / np.maximum(counts, 1)) ** self.power, self.low, self.high) * factors


def read_tags(collection: Collection, captions: Captions) -> NamedTags:
    """Return the tags of each row, or those of its captions that are no sentences; each once, in any spelling."""
    parse = functools.cache(parse_tag)
    first = {}
    tags = []
    for number in range(len(collection)):
        row = collection.row(number)
        own = captions.of(number)
        split = [] if row.tags else map(own.split, own.read(row))
        found = row.tags or [tag for each in split if each and not is_sentence(each) for tag in each]
        joined = (own.keep_tokens_separator or "\0").join(found)
        parts = filter(str.strip, joined.split(own.keep_tokens_separator or "\0"))
        tags.append(list(dict.fromkeys(first.setdefault(parse(part), part) for part in parts)))
    return NamedTags.of(pa.chunked_array([tags], pa.list_(pa.string())))


def weigh_images(collection: Collection, rows: ndarray, config: TagWeightsConfig, captions: Captions) -> ndarray:
    """Return the weight of each image, float64 [N]: the mean over its tags that weigh anything, or 1 without any.

    Tags are counted in `rows`, whose images weigh 1 on average.
    """
    tags = read_tags(collection, captions)
    categories = (category_name(parse_tag(name).category or 0) for name in tags.names)
    factors = np.array([config.factors.get(category, 1.0) for category in categories])
    weights = config.weigh(tags.count(rows, len(tags.names)), factors)
    owners = tags.owners()
    values = weights[tags.ids]
    sizes = np.bincount(owners, values > 0, minlength=len(collection))
    sums = np.bincount(owners, values, minlength=len(collection))
    means = sums / np.maximum(sizes, 1)
    tagged = rows[sizes[rows] > 0]
    return np.where(sizes > 0, means / (means[tagged].mean() if len(tagged) else 1.0), 1.0)
