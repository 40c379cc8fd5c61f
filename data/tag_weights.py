"""Weights of images by how frequent their tags are, so that a collection's common subjects do not drown the rare ones.

weights = weigh_images(read_tags(collection, captions), rows, config)       # 1 on average
facts = find_tag_facts(collection, rows, config, captions)       # what a task needs that weighs anew while it trains
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from data.captions import CaptionConfig
from data.collection import Collection
from data.tags.index import TagRows
from data.tags.names import parse_tag
from utils.config.bounds import Count, Factor, Positive
from utils.config.schema import Strict
from utils.errors import UserError
from utils.vocabulary import CATEGORIES

_CHUNK_ROWS = 2**17


class TagWeightsConfig(Strict):
    """Weights of tags: (median / count) ** power within low and high, times the factor of the tag's category.

    combine: the mean over an image's tags. Images weigh 1 on average. reestimate_steps: null counts the tags of the
    collection once; a number counts those that training has shown, and weighs anew by them after so many steps.
    """

    power: Annotated[float, Field(ge=0, le=4)]
    low: Factor
    high: Positive
    combine: Literal["mean", "geometric_mean"]
    factors: dict[Literal["general", "artist", "copyright", "character", "meta", "rating"], Factor]
    reestimate_steps: Count | None

    @model_validator(mode="after")
    def _can_weigh_anew(self) -> Self:
        if self.reestimate_steps is not None and self.combine == "geometric_mean":
            raise ValueError(
                "task.tag_weights.combine: geometric_mean, and with task.tag_weights.reestimate_steps only the weights "
                "of mean keep an average of 1; set combine=mean, or reestimate_steps=null"
            )
        return self


@dataclass(frozen=True, eq=False)
class ImageTags(TagRows):
    """The tags of all rows; ids are places in `names`."""

    names: list[str]

    def factors(self, config: TagWeightsConfig) -> np.ndarray:
        """Return the factor of each tag's category, float64 [T]."""
        return class_factors([parse_tag(name).category or 0 for name in self.names], config.factors)


def read_tags(collection: Collection, captions: CaptionConfig) -> ImageTags:
    """Return the tags of a collection, or of its captions where a row has none."""
    views = map(collection.view, range(len(collection)))
    tags = [view.tags or captions.split(captions.read(view)) for view in views]
    encoded = pa.array([tag for row in tags for tag in row], pa.string()).dictionary_encode()
    return ImageTags(encoded.indices.to_numpy(), np.cumsum([0, *map(len, tags)]), encoded.dictionary.to_pylist())


def weigh_images(tags: ImageTags, rows: np.ndarray, config: TagWeightsConfig) -> np.ndarray:
    """Return the weight of each row of a collection, float64; counts are those of `rows`."""
    weights = apply_rule(tags.count(rows, len(tags.names)), tags.factors(config), config)
    return normalise(weigh_rows(tags.ids, tags.offsets, weights, config.combine), rows)


def apply_rule(counts: np.ndarray, factors: np.ndarray, config: TagWeightsConfig) -> np.ndarray:
    """Return each tag's weight, float64 [T], as the configuration has it."""
    return weigh_tags(counts, factors, power=config.power, low=config.low, high=config.high)


def find_tag_facts(
    collection: Collection, rows: np.ndarray, config: TagWeightsConfig, captions: CaptionConfig
) -> dict[str, list[float]]:
    """Return counts, factors and shares [T] of the tags of some rows; the weights' mean is that of the tags by shares.

    Raises UserError (`task.tag_weights.reestimate_steps`) where no caption has a tag of its row.
    """
    tags = read_tags(collection, captions)
    if not any(any(find_shown(tags, row, captions.read(collection.view(row)), captions)) for row in rows.tolist()):
        raise UserError(
            f"task.tag_weights.reestimate_steps: {config.reestimate_steps} counts the tags in captions, and of "
            f"{len(rows):,} none has a tag of its image; set task.captions.source=tags, or reestimate_steps=null"
        )
    factors = tags.factors(config)
    owners = np.repeat(np.arange(len(collection)), np.diff(tags.offsets))
    counted = np.isin(owners, rows) & (factors[tags.ids] > 0)
    ids, owners = tags.ids[counted], owners[counted]
    sizes = np.bincount(owners, minlength=len(collection))
    shares = np.bincount(ids, 1 / sizes[owners], minlength=len(factors)) / max(np.count_nonzero(sizes), 1)
    return {
        "counts": tags.count(rows, len(tags.names)).tolist(),
        "factors": factors.tolist(),
        "shares": shares.tolist(),
    }


def find_shown(tags: ImageTags, row: int, caption: str, captions: CaptionConfig) -> list[bool]:
    """Return which tags of a row are in its caption."""
    return captions.find_tags(caption, [tags.names[tag] for tag in tags.of_row(row)])


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
