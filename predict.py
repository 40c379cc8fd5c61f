"""Predict classes, tags or features of images, from a run, a weight file or an ONNX file.

    python predict.py weights=RUN input=PATH output=predictions.jsonl
    python predict.py weights=RUN/weights/last_weights.safetensors input=PATH output=predictions.csv top=1
    python predict.py weights=RUN/export/model.onnx input=image.png output=predictions.csv
    python predict.py weights=RUN input=PATH output=predictions.csv batch_size=16 workers=0 device=cpu
    python predict.py weights=RUN input=PATH output=predictions.jsonl dry_run=true     counts the images

`input` is an image or a folder, read with its subfolders. An image that cannot be read gets a row with the reason.
"""

import utils.config.help  # noqa: F401, I001 (answers --help before the slow imports)

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from data.image_data import load_files
from data.scan import IMAGE_SUFFIXES
from engine.config import MachineConfig
from engine.runtime import choose_device, choose_runtime
from engine.tasks.rebuild import load_predictor
from models.outputs import RowOptions
from models.predictor import Predictor
from utils.config.entry_point import Job, entry_point
from utils.config.schema import PathText, Strict
from utils.errors import UserError
from utils.io.files import output_errors, write_atomically
from utils.io.weights import find_weights
from utils.record.logging import get_logger
from utils.record.progress import track

log = get_logger(__name__)


class PredictConfig(Strict):
    """`weights` is a run folder or a file, `output` a .jsonl or .csv file; `top` of classes, `threshold` of tags."""

    weights: PathText
    input: PathText
    output: PathText
    top: Annotated[int, Field(ge=1)]
    threshold: Annotated[float, Field(ge=0, le=1)]
    batch_size: Annotated[int, Field(ge=1)]
    max_pixels: Annotated[int, Field(ge=1)]
    device: Literal["auto", "cpu", "cuda"]
    workers: Literal["auto"] | Annotated[int, Field(ge=0)]
    dry_run: bool

    def machine(self) -> MachineConfig:
        """Return the machine that predicts."""
        return MachineConfig(
            device=self.device, precision="fp32", channels_last=False, workers=self.workers, threads=None,
            deterministic=False, hang_timeout_sec=1800.0,
        )  # fmt: skip


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
    """Yield a row per image, in order: its path, and its prediction or an error."""
    loader, reasons = load_files(
        paths, predictor.preprocessing, choose_runtime(config.machine()), max_pixels=config.max_pixels,
        batch_size=config.batch_size,
    )  # fmt: skip
    options, left = RowOptions(config.top, config.threshold), iter(paths)
    for batch in loader:
        readable = batch["weight"] > 0
        predicted = iter(predictor.rows(batch["images"][readable], options) if readable.any() else ())
        for there, path in zip(readable.tolist(), left):
            yield {"path": str(path), **(next(predicted) if there else {"error": reasons.of[str(path)]})}


def write_rows(rows: Iterable[dict[str, Any]], path: Path, columns: list[str] | None) -> int:
    """Write each row when it comes, as CSV with these columns or as JSON lines; return how many hold an error."""
    errors = 0
    with open(path, "w", encoding="utf-8", newline="") as stream:
        if columns is not None:
            writer = csv.DictWriter(stream, columns, restval="", extrasaction="ignore")
            writer.writeheader()
        for row in rows:
            errors += "error" in row
            if columns is None:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                writer.writerow(row)
    return errors


@entry_point("predict", PredictConfig)
def main(config: PredictConfig, job: Job) -> str:
    """Predict."""
    # -------------------------------------------------------------------------------------------------- 1. The model
    output = Path(config.output)
    if output.suffix not in (".jsonl", ".csv"):
        raise UserError(f"output: {output} ends in {output.suffix!r}; name a .jsonl or .csv file")
    weights = find_weights(config.weights, "best", "weights")
    device = choose_device(config.device, "device")
    predictor = load_predictor(weights, torch.device("cpu" if config.dry_run else device))
    columns = None
    if output.suffix == ".csv":
        if predictor.output.columns is None:
            raise UserError(f"output: {weights} gives vectors, which CSV does not hold; name a .jsonl file")
        columns = ["path", *predictor.output.columns, "error"]

    # --------------------------------------------------------------------------------------------- 2. The predictions
    paths = find_images(config.input)
    if config.dry_run:
        return f"dry run: {len(paths)} images, nothing is predicted"
    rows = track(predict_all(predictor, paths, config), len(paths), "predicting")
    with output_errors("output", output):
        unreadable = write_atomically(output, lambda temporary: write_rows(rows, temporary, columns))
    log.info("wrote %s: %d images, %d unreadable", output, len(paths), unreadable)
    return f"{len(paths)} images"


if __name__ == "__main__":
    main()
