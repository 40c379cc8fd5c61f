"""Quantise an ONNX file to int8 with training images of a run, and compare both files on its validation images."""

from dataclasses import replace
from pathlib import Path

from data.collection.choose import spread
from engine.config import MACHINE
from engine.exports.config import WeightsChoice
from engine.judging.measured import choose_images, open_measured
from models.interop.onnx_int8 import to_int8


def quantise(choice: WeightsChoice, path: Path) -> str:
    """Replace the ONNX file of a run's weights by its int8 form, and return how both compare.

    Raises UserError (`data` without a run; `precision` if int8 is worse or no faster).
    """
    images = choose_images(None, choice.run_dir, "val")
    measured = open_measured(path, None, images, "val", MACHINE, batch_size=32)
    rows = spread(measured.data.collection.rows("train"), 256)
    training = replace(measured, rows=rows, split="train").loaders()["val"]
    metric = measured.weights.task.best_metric

    def score(file: Path) -> float:
        opened = open_measured(file, None, images, "val", MACHINE, batch_size=32)
        return opened.weights.task.evaluate(opened.loaders(), 0).scalars[metric]

    what = f"{metric} of {len(measured.rows):,} validation images"
    return to_int8(path, (batch["images"] for batch in training), score, what)
