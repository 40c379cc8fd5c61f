"""What networks make of one image, by name: classes, tags or features. A kind of training names one of them.

A new output is one entry of OUTPUTS: weight files, ONNX files and predictions follow it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class RowOptions(NamedTuple):
    """What a user asks of a prediction. top: the classes of an image; threshold: the least probability of a tag."""

    top: int
    threshold: float


Row = dict[str, Any]


@dataclass(frozen=True)
class Output:
    """One kind of output.

    heads: the names of an exported file's outputs, in order; a prediction uses the last. make_row: from the values [K]
    of an image, and the names of its columns, to what is written of it. names_key: the metadata key of these names;
    None where the columns have none. activate: from logits [B, K] to probs; None where the outputs are used as they
    are. columns: of a CSV file; None where a row does not fit one.
    """

    heads: tuple[str, ...]
    make_row: Callable[[np.ndarray, Sequence[str], RowOptions], Row]
    names_key: str | None = None
    activate: Callable[[Tensor], Tensor] | None = None
    columns: tuple[str, ...] | None = None


def _row_of_classes(values: np.ndarray, names: Sequence[str], options: RowOptions) -> Row:
    order = np.argsort(-values)[: options.top]
    classes = [{"class": names[index], "prob": round(float(values[index]), 6)} for index in order]
    return {**classes[0], "top": classes}


def _row_of_tags(values: np.ndarray, names: Sequence[str], options: RowOptions) -> Row:
    order = [index for index in np.argsort(-values) if values[index] >= options.threshold]
    probs = {names[index]: round(float(values[index]), 6) for index in order}
    return {"tags": ", ".join(probs), "probs": probs}


def _row_of_features(values: np.ndarray, names: Sequence[str], options: RowOptions) -> Row:
    return {"features": [float(value) for value in values]}


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)


OUTPUTS = {
    "classes": Output(("logits", "probs"), _row_of_classes, "class_names", _softmax, ("class", "prob")),
    "tags": Output(("logits", "probs"), _row_of_tags, "tag_names", torch.sigmoid, ("tags",)),
    "features": Output(("features",), _row_of_features),
}
NAME_KEYS = frozenset(output.names_key for output in OUTPUTS.values() if output.names_key is not None)
