"""Images to classes, from a run, a weight file or an ONNX file.

    python predict.py weights=RUN input=PATH output=predictions.jsonl
    python predict.py weights=RUN/export/model.onnx input=image.png output=predictions.csv

`input` is an image or a folder, read with its subfolders. An image that cannot be read gets a line with the reason.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from data.decode import UnreadableImage, read_image
from data.scan import IMAGE_SUFFIXES
from data.transforms import EvalTransform
from engine.runtime import choose_device
from models.predictor import Predictor, load_predictor
from utils.config.entry_point import Job, entry_point
from utils.config.schema import Strict
from utils.errors import UserError
from utils.io.files import output_errors, write_atomically
from utils.io.weights import find_weights
from utils.record.logging import get_logger
from utils.record.progress import track

log = get_logger(__name__)


class PredictConfig(Strict):
    """`weights` is a run folder or a file, `output` a .jsonl or .csv file."""

    weights: str
    input: str
    output: str
    top: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    max_pixels: Annotated[int, Field(ge=1)]
    device: Literal["auto", "cpu", "cuda"]


def find_images(source: str) -> list[Path]:
    """Return the image itself, or all images of a folder and its subfolders, sorted.

    Raises UserError (`input`) where there is none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"input: {path} does not exist; name an image or a folder")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not found:
        raise UserError(f"input: {path} holds no image; known endings: {', '.join(IMAGE_SUFFIXES)}")
    return found


def predict_all(predictor: Predictor, paths: list[Path], config: PredictConfig) -> Iterator[dict[str, Any]]:
    """Yield a row per image, in order: path, class and probability of the `top` classes, or an error."""
    settings = predictor.preprocessing
    transform = EvalTransform(settings["image_size_hw"], settings["eval_crop"], settings["interpolation"])
    for start in range(0, len(paths), config.batch_size):
        images, errors = [], {}
        for path in paths[start : start + config.batch_size]:
            try:
                pixels = read_image(path, settings["channels"], config.max_pixels)
                images.append(transform(torch.from_numpy(pixels).permute(2, 0, 1)))
            except UnreadableImage as error:
                errors[path] = error.reason
        probs = iter(predictor.probs(torch.stack(images)) if images else ())
        for path in paths[start : start + config.batch_size]:
            if path in errors:
                yield {"path": str(path), "error": errors[path]}
                continue
            row = next(probs)
            order = np.argsort(-row)[: config.top]
            classes = [{"class": predictor.class_names[k], "prob": round(float(row[k]), 6)} for k in order]
            yield {"path": str(path), **classes[0], "top": classes}


def write_rows(rows: list[dict[str, Any]], temporary: Path, ending: str) -> None:
    """Write rows as JSON lines, or as CSV with path, class, prob and error."""
    with open(temporary, "w", encoding="utf-8", newline="") as stream:
        if ending == ".jsonl":
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        writer = csv.DictWriter(stream, ["path", "class", "prob", "error"], restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@entry_point("predict", PredictConfig)
def main(config: PredictConfig, job: Job) -> str:
    """Predict."""
    output = Path(config.output)
    if output.suffix not in (".jsonl", ".csv"):
        raise UserError(f"output: {output} ends in {output.suffix!r}; name a .jsonl or .csv file")
    predictor = load_predictor(
        find_weights(config.weights, "best", "weights"), torch.device(choose_device(config.device))
    )
    paths = find_images(config.input)
    rows = list(track(predict_all(predictor, paths, config), len(paths), "predicting"))
    with output_errors("output", output):
        write_atomically(output, lambda temporary: write_rows(rows, temporary, output.suffix))
    failed = sum("error" in row for row in rows)
    log.info("wrote %s: %d images, %d unreadable", output, len(rows), failed)
    return f"{len(rows)} images"


if __name__ == "__main__":
    main()
