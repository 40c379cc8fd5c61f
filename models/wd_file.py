"""Taggers in the WD form, as published by SmilingWolf: an ONNX file with selected_tags.csv in the same folder.

The file has only a graph. By convention, images are centred on a white square and resized to the graph's side with
bicubic interpolation; values are BGR from 0 to 255. The first output has one probability per row of the CSV file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.image_model import OnnxForm
from utils.errors import UserError
from utils.vocabulary import FILE, read_vocabulary


def read_wd_metadata(path: Path, inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, Any]:
    """Return the metadata that one of our files would have, from ONNX Runtime's description of inputs and outputs.

    Raises UserError if selected_tags.csv is missing or belongs to another tagger, or if the graph has another form.
    """
    tags = path.with_name(FILE)
    if not tags.is_file():
        raise UserError(f"{path} was not exported by Atelier; use export.py, or put a WD tagger's {FILE} beside it")
    (first, *others), output = inputs, outputs[0]
    batch, *sides = first.shape
    is_square = len(sides) == 3 and isinstance(sides[0], int) and sides == [sides[0], sides[0], 3]
    if others or first.type != "tensor(float)" or not is_square or (isinstance(batch, int) and batch != 1):
        raise UserError(
            f"{path} takes {[(value.type, value.shape) for value in inputs]} and returns {output.shape}; a tagger "
            "of the WD form takes one tensor(float) of [batch, side, side, 3], and returns [batch, tags] first"
        )
    vocabulary = read_vocabulary(tags)
    if len(output.shape) != 2 or output.shape[1] != len(vocabulary):
        raise UserError(
            f"{tags} has {len(vocabulary)} rows, but {path} returns {output.shape}; replace it with the "
            f"{FILE} that was published with the tagger"
        )
    preprocessing = {
        "image_size_hw": first.shape[1:3], "pad": "square", "background": "white", "interpolation": "bicubic",
        "eval_resize": "squash", "eval_crop": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3, "channels": 3,
    }  # fmt: skip
    form = OnnxForm(input=first.name, layout="NHWC", channels="BGR", std=1 / 255, outputs={output.name: "probs"})
    return {"output": "tags", "preprocessing": preprocessing, "form": form.model_dump(), **vocabulary.facts()}
