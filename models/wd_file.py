"""Somebody else's tagger in the WD form: an ONNX file with selected_tags.csv beside it, as SmilingWolf publishes them.

The file states nothing but its graph. By convention, images are on white, in the middle of a square, resized to the
graph's side by bicubic, BGR from 0 to 255; the first output is probabilities, one for each row of the CSV file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.image_model import OnnxForm
from utils.errors import UserError
from utils.vocabulary import FILE, read_vocabulary


def read_wd_metadata(path: Path, inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, Any]:
    """Return the metadata that a file of ours would have, from the inputs and outputs that ONNX Runtime describes.

    Raises UserError where no selected_tags.csv lies beside the file, the graph is of another form, or the CSV
    file is of another tagger.
    """
    tags = path.with_name(FILE)
    if not tags.is_file():
        raise UserError(f"{path} was not exported by Atelier; use export.py, or put a WD tagger's {FILE} beside it")
    (taken, *others), given = inputs, outputs[0]
    batch, *sides = taken.shape
    is_square = len(sides) == 3 and isinstance(sides[0], int) and sides == [sides[0], sides[0], 3]
    if others or taken.type != "tensor(float)" or not is_square or (isinstance(batch, int) and batch != 1):
        raise UserError(
            f"{path} takes {[(value.type, value.shape) for value in inputs]} and gives {given.shape}; a tagger "
            "of the WD form takes one tensor(float) of [batch, side, side, 3], and gives [batch, tags] first"
        )
    vocabulary = read_vocabulary(tags)
    if len(given.shape) != 2 or given.shape[1] != len(vocabulary):
        raise UserError(
            f"{tags} has {len(vocabulary)} rows, and {path} gives {given.shape}; put the file "
            "beside it that it was published with"
        )
    preprocessing = {
        "image_size_hw": taken.shape[1:3], "pad": "square", "background": "white", "interpolation": "bicubic",
        "eval_resize": "squash", "eval_crop": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3, "channels": 3,
    }  # fmt: skip
    form = OnnxForm(input=taken.name, layout="NHWC", channels="BGR", std=1 / 255, outputs={given.name: "probs"})
    return {"output": "tags", "preprocessing": preprocessing, "form": form.model_dump(), **vocabulary.facts()}
