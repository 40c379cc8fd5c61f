"""The outputs of networks for one image: classes, tags or features. Each kind of training names one of them.

A new output needs one entry in OUTPUTS, which weight files, ONNX files and predictions use (docs/new_task.md). If its
columns have names, models/predictor.py must also check their key in the metadata.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from utils.formats.spelling import RATING, category_name

if TYPE_CHECKING:
    from torch import Tensor


class RowOptions(NamedTuple):
    """The columns of an output, and the user's options for predictions."""

    names: Sequence[str]  # [K]
    categories: np.ndarray  # of tags, int64 [K]
    has_ratings: bool  # False if no training image had a rating, so that outputs for ratings mean nothing
    top: int  # classes per image
    thresholds: np.ndarray  # the least probability, per output [K] or for all; 0 for classes: rows are never unsure
    max_tags: int | None = None  # keep only the most probable tags of an image
    order: Literal["score", "vocabulary"] = "score"


Row = dict[str, Any]


class Output(NamedTuple):
    """One kind of output."""

    heads: tuple[str, ...]  # the outputs of an exported file, in order; predictions use the last
    make_row: Callable[[np.ndarray, RowOptions], Row]  # from an image's values [K] to its output row
    names_key: str | None = None  # the metadata key of the columns' names, or None without names
    activate: "Callable[[Tensor], Tensor] | None" = None  # from logits [B, K] to probs, or None for the identity
    columns: tuple[str, ...] | None = None  # of a CSV file, or None if a row does not fit a CSV file
    has_tags: bool = False  # rows have `tags`, which thresholds choose and .txt files can hold
    pipeline: str = "image-classification"  # the hub's name of the task


def _row_of_classes(values: np.ndarray, options: RowOptions) -> Row:
    order = np.argsort(-values)[: options.top]
    classes = [{"class": options.names[index], "prob": round(float(values[index]), 6)} for index in order]
    row = {**classes[0], "top": classes}
    if options.thresholds.any():
        row["unsure"] = not (values >= options.thresholds).any()
    return row


def _row_of_tags(values: np.ndarray, options: RowOptions) -> Row:
    """Return the tags in their order, their probabilities by category, and the most probable rating."""
    names, categories, has_ratings, *_ = options
    tags = np.flatnonzero((values >= options.thresholds) & (categories != RATING))
    tags = tags[np.argsort(-values[tags], kind="stable")][: options.max_tags]
    if options.order == "vocabulary":
        tags = np.sort(tags)
    row = {}
    probs = {}
    if has_ratings and len(ratings := np.flatnonzero(categories == RATING)):
        rated = {names[index]: round(float(values[index]), 6) for index in ratings.tolist()}
        best = max(rated, key=rated.__getitem__)
        row = {"rating": best, "rating_prob": rated[best], "rating_probs": rated}
    for index in tags.tolist():
        probs.setdefault(category_name(int(categories[index])), {})[names[index]] = round(float(values[index]), 6)
    return {**row, "tags": [names[index] for index in tags.tolist()], "probs": probs}


_PROBS = ("logits", "probs")
OUTPUTS = {
    "classes": Output(_PROBS, _row_of_classes, "class_names", lambda logits: logits.softmax(dim=1), ("class", "prob")),
    "tags": Output(_PROBS, _row_of_tags, "tag_names", lambda logits: logits.sigmoid(), ("rating", "tags"), True),
    "number": Output(("number",), lambda values, options: {"number": float(f"{values[0]:.7g}")}, columns=("number",)),
    "features": Output(
        ("features",),
        lambda values, options: {"features": values.astype(float).tolist()},
        pipeline="image-feature-extraction",
    ),
}
