"""Weights of images by how frequent their tags are, so that a collection's common subjects do not drown the rare ones.

weights = weigh_images(collection, rows, config, captions)       # 1 on average
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from data.captions import CaptionConfig
from data.collection import Collection
from data.tags.names import parse_tag
from utils.config.bounds import Factor, Positive
from utils.config.schema import Strict
from utils.vocabulary import CATEGORIES

_CHUNK_ROWS = 2**17


class TagWeightsConfig(Strict):
    """Weights of tags: (median / count) ** power within low and high, times the factor of the tag's category.

    combine: the mean over an image's tags. Images weigh 1 on average.
    """

    power: Annotated[float, Field(ge=0, le=4)]
    low: Factor
    high: Positive
    combine: Literal["mean", "geometric_mean"]
    factors: dict[Literal["general", "artist", "copyright", "character", "meta", "rating"], Factor]


def weigh_images(
    collection: Collection, rows: np.ndarray, config: TagWeightsConfig | None, captions: CaptionConfig
) -> np.ndarray:
    """Return the weight of each row of a collection, float64; counts are those of `rows`, None weighs all alike."""
    if config is None:
        return np.ones(len(collection))
    views = map(collection.view, range(len(collection)))
    tags = [view.tags or captions.split(captions.read(view)) for view in views]
    offsets = np.cumsum([0, *map(len, tags)])
    encoded = pa.array([tag for row in tags for tag in row], pa.string()).dictionary_encode()
    ids, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    counted = np.concatenate([ids[offsets[row] : offsets[row + 1]] for row in rows])
    factors = class_factors([parse_tag(name).category or 0 for name in names], config.factors)
    weights = weigh_tags(
        np.bincount(counted, minlength=len(names)), factors, power=config.power, low=config.low, high=config.high
    )
    return normalise(weigh_rows(ids, offsets, weights, config.combine), rows)


def describe_weights(weights: np.ndarray) -> str:
    """Return the range of weights and the effective number of images in a line."""
    count = effective_sample_size(weights)
    return f"{weights.min():.2f} to {weights.max():.2f} by tags; as {count:,.0f} images of equal weight"


def class_factors(categories: Sequence[int], factors: Mapping[str, float]) -> np.ndarray:
    """Return each tag's factor, float64 [T], from those of classes by name (`character`); 1 where none is stated."""
    by_number = {CATEGORIES[name]: factor for name, factor in factors.items()}
    return np.array([by_number.get(category, 1.0) for category in categories])


def weigh_tags(counts: np.ndarray, factors: np.ndarray, *, power: float, low: float, high: float) -> np.ndarray:
    """Return each tag's weight, float64 [T]: (median / count) ** power within low and high, times its factor.

    counts: images that have the tag, int64 [T]; the median is that of tags with a count.
    """
    seen = counts[counts > 0]
    median = np.median(seen) if len(seen) else 1.0
    return np.clip((median / np.maximum(counts, 1)) ** power, low, high) * factors


def weigh_rows(
    ids: np.ndarray, offsets: np.ndarray, tag_weights: np.ndarray, combine: Literal["mean", "geometric_mean"]
) -> np.ndarray:
    """Return each row's weight, float64 [rows]: a mean over its tags; without tags, the mean of the rows that have any.

    ids: int32 [N], offsets: int64 [rows + 1], as in data/tags/index.py. Tags of weight 0 do not count.
    """
    geometric, counted, rows = combine == "geometric_mean", tag_weights > 0, len(offsets) - 1
    values = np.log(np.where(counted, tag_weights, 1.0)) if geometric else tag_weights
    sums, counts = np.zeros(rows), np.zeros(rows, np.int64)
    for start in range(0, rows, _CHUNK_ROWS):
        part = offsets[start : start + _CHUNK_ROWS + 1]
        chosen, size = ids[part[0] : part[-1]], len(part) - 1
        owners = np.repeat(np.arange(size), np.diff(part))
        sums[start : start + size] = np.bincount(owners, values[chosen], minlength=size)
        counts[start : start + size] = np.bincount(owners, counted[chosen], minlength=size)
    tagged = counts > 0
    weights = sums[tagged] / counts[tagged]
    weights = np.exp(weights) if geometric else weights
    found = np.full(rows, weights.mean() if len(weights) else 1.0)
    found[tagged] = weights
    return found


def normalise(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the weights scaled to a mean of 1 over `rows`, so that the learning rate keeps its meaning."""
    return weights / weights[rows].mean()


def effective_sample_size(weights: np.ndarray) -> float:
    """Return how many images of equal weight give a mean of the same variance: sum(w)**2 / sum(w**2)."""
    return float(weights.sum() ** 2 / np.square(weights).sum())
