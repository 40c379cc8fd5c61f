"""What networks make of one image, by name: classes, tags or features. A kind of training names one of them.

A new output is one entry of OUTPUTS: weight files, ONNX files and predictions follow it (docs/new_task.md). One whose
columns have names needs their key in the metadata that models/predictor.py checks, too.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.thresholds import DEFAULT, mcut
from utils.vocabulary import CHARACTER, RATING, category_name


class Columns(NamedTuple):
    """What the columns of an output are: names [K], and of tags the category of each, int64 [K].

    has_ratings: whether the ratings among tags mean anything; they do not where no training image had one.
    """

    names: Sequence[str]
    categories: np.ndarray
    has_ratings: bool = True


class RowOptions(NamedTuple):
    """What a user asks of a prediction.

    top: the classes of an image. thresholds: the least probability of each tag, [K] or of all of them; mcut: an image's
    own ones where these are higher. max_tags: the most probable tags of an image. order: of its tags.
    """

    top: int
    thresholds: np.ndarray
    mcut: bool = False
    max_tags: int | None = None
    order: Literal["score", "vocabulary", "characters_first"] = "score"


Row = dict[str, Any]


class Output(NamedTuple):
    """One kind of output.

    heads: the names of an exported file's outputs, in order; a prediction uses the last. make_row: from the values [K]
    of an image, and what their columns are, to what is written of it. names_key: the metadata key of the columns'
    names; None where they have none. activate: from logits [B, K] to probs; None where the outputs are used as they
    are. columns: of a CSV file; None where a row does not fit one.
    """

    heads: tuple[str, ...]
    make_row: Callable[[np.ndarray, Columns, RowOptions], Row]
    names_key: str | None = None
    activate: Callable[[Tensor], Tensor] | None = None
    columns: tuple[str, ...] | None = None


def _row_of_classes(values: np.ndarray, columns: Columns, options: RowOptions) -> Row:
    order = np.argsort(-values)[: options.top]
    classes = [{"class": columns.names[index], "prob": round(float(values[index]), 6)} for index in order]
    return {**classes[0], "top": classes}


def _row_of_tags(values: np.ndarray, columns: Columns, options: RowOptions) -> Row:
    """Return the tags in their order, their probabilities by category, and the most probable rating."""
    names, categories, has_ratings = columns
    least = np.maximum(options.thresholds, _cut(values, categories)) if options.mcut else options.thresholds
    found = np.flatnonzero((values >= least) & (categories != RATING))
    found = found[np.argsort(-values[found], kind="stable")][: options.max_tags]
    if options.order == "vocabulary":
        found = np.sort(found)
    elif options.order == "characters_first":
        found = found[np.argsort(categories[found] != CHARACTER, kind="stable")]
    row, probs = {}, {}
    if has_ratings and len(ratings := np.flatnonzero(categories == RATING)):
        best = ratings[values[ratings].argmax()]
        row = {"rating": names[best], "rating_prob": round(float(values[best]), 6)}
    for index in found.tolist():
        probs.setdefault(category_name(int(categories[index])), {})[names[index]] = round(float(values[index]), 6)
    return {**row, "tags": [names[index] for index in found.tolist()], "probs": probs}


def _cut(values: np.ndarray, categories: np.ndarray) -> np.ndarray:
    """Return the threshold by MCut of each tag [K], which is that of its category in this image."""
    least = np.full(len(values), DEFAULT, dtype=np.float32)
    for number in np.unique(categories):
        if (own := categories == number).sum() > 1:  # one probability has no gap
            least[own] = mcut(values[None, own])
    return least


def _row_of_features(values: np.ndarray, columns: Columns, options: RowOptions) -> Row:
    return {"features": values.astype(float).tolist()}


_softmax = partial(torch.softmax, dim=1)
OUTPUTS = {
    "classes": Output(("logits", "probs"), _row_of_classes, "class_names", _softmax, ("class", "prob")),
    "tags": Output(("logits", "probs"), _row_of_tags, "tag_names", torch.sigmoid, ("rating", "tags")),
    "features": Output(("features",), _row_of_features),
}
NAME_KEYS = frozenset(output.names_key for output in OUTPUTS.values() if output.names_key is not None)
