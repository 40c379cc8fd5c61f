"""Predict classes, tags or features of images with a run, a weight file or an ONNX file.

    python predict.py weights=RUN input=PATH output=predictions.jsonl
    python predict.py weights=RUN/weights/last_weights.safetensors input=PATH output=predictions.csv top=1
    python predict.py weights=RUN/export/model.onnx input=image.png output=predictions.csv
    python predict.py weights=RUN input=FOLDER output=beside text.spaces=true            tags: a .txt beside each image
    python predict.py weights=RUN input=FOLDER like=image.png top=20 output=like.jsonl   the images most like one

`input` is an image, a folder with its subfolders, a pattern, a list of these, or `-` (paths from standard input). An
image that cannot be read gets a row with the reason.
"""

import utils.config.help  # noqa: F401, I001 (answers --help before the slow imports)

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from data.config import TextConfig
from data.open import load_files
from data.tools.predictions import (
    Images,
    Row,
    RowFile,
    Sidecars,
    find_excluded,
    find_images,
    join_tags,
    rank,
    read_embeddings,
    spell_tags,
    write_embeddings,
)
from engine.config import MachineConfig
from engine.exports.weights import load_predictor
from engine.runtime import choose_device, choose_runtime
from models.outputs import RowOptions
from models.predictor import Predictor
from utils.config.bounds import BatchSize, Count, Fraction, Pixels, Workers
from utils.config.entry_point import Job, entry_point
from utils.config.schema import PathText, Strict
from utils.errors import UserError, about
from utils.io.files import output_errors, sha256_file
from utils.io.weights import find_weights
from utils.record.logging import get_logger
from utils.record.progress import track
from utils.thresholds import DEFAULT, MCUT, MCUT_FLOOR, PER_TAG, find_thresholds
from utils.vocabulary import Vocabulary

log = get_logger(__name__)


class PredictConfig(Strict):
    """conf/predict.yaml, checked."""

    weights: PathText  # a run folder or a file
    input: PathText | Annotated[list[PathText], Field(min_length=1)]
    output: PathText  # a file, FOLDER/ or `beside`
    existing: Literal["skip", "append", "overwrite"] | None  # for images that have tags, or with skip a row
    like: PathText | None
    top: Count  # the number of classes, or with `like` of images
    threshold: Fraction | None  # for every tag; None: from `thresholds`, by `profile`
    thresholds: PathText | None
    profile: Literal["per_tag", "balanced", "high_precision", "high_recall", "mcut"]
    text: TextConfig
    batch_size: BatchSize
    max_pixels: Pixels
    device: Literal["auto", "cpu", "cuda"]
    workers: Literal["auto"] | Workers
    dry_run: bool

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.threshold is not None and (self.thresholds is not None or self.profile != PER_TAG):
            raise ValueError(
                f"threshold: {self.threshold:g} applies to every tag; remove it, or remove thresholds and profile"
            )
        return self


def choose_rows(config: PredictConfig, predictor: Predictor, weights: Path) -> RowOptions:
    """Return the options for rows. An excluded tag has an infinite threshold."""
    text, least = config.text, np.float32(0.0)
    if predictor.has_tags:
        least = np.broadcast_to(choose_thresholds(config, predictor, weights), len(predictor.names))
        if text.exclude:
            least = np.where(find_excluded(predictor.names, predictor.categories, text.exclude), np.inf, least)
    return RowOptions(config.top, least, config.profile == MCUT, text.max_tags, text.order)


def choose_thresholds(config: PredictConfig, predictor: Predictor, weights: Path) -> np.ndarray:
    """Return the threshold of each tag [T], or one for all. Raises UserError if `thresholds` or `profile` has none."""
    if config.threshold is not None or config.profile == MCUT:
        return np.float32(MCUT_FLOOR if config.threshold is None else config.threshold)
    table = find_thresholds(config.thresholds, weights, predictor.weights_hash)
    if table is not None:
        vocabulary = Vocabulary.of(zip(predictor.categories.tolist(), predictor.names))
        return np.array(table.of_tags(vocabulary, config.profile), dtype=np.float32)
    if config.profile != PER_TAG:
        raise UserError(
            f"profile: {config.profile} needs calibrated thresholds, and {config.weights} has none; fit them with "
            "evaluate.py calibrate=true, or give thresholds=FILE"
        )
    log.info("thresholds: %s", f"from {config.weights}" if predictor.thresholds else f"{DEFAULT}, not calibrated")
    return np.array(predictor.thresholds or DEFAULT, dtype=np.float32)


def open_destination(
    config: PredictConfig, predictor: Predictor, images: Images
) -> tuple[RowFile | Sidecars, list[Path]]:
    """Return the destination of the predictions, and the images without predictions there.

    Raises UserError (`output`, `existing`) if the destination does not suit them, or if some exist and `existing` is
    not set.
    """
    output, columns = Path(config.output), predictor.output.columns
    if config.output == "beside" or config.output.endswith("/") or output.is_dir():
        if not predictor.has_tags:
            raise UserError(f"output: {output} is for tags, but {config.weights} is no tagger; name a .jsonl file")
        destination = Sidecars(images, None if config.output == "beside" else config.output)
    elif config.existing == "append":
        raise UserError(f"existing: append is for .txt files, but {output} has rows; set skip or overwrite")
    elif output.suffix == ".csv" and columns is None:
        raise UserError(f"output: {config.weights} predicts vectors, which CSV cannot hold; name a .jsonl file")
    else:
        destination = RowFile(output, ["path", *(columns or ()), "error"], keep=config.existing == "skip")
    done = {path for path in images.paths if destination.has(str(path))}
    if done and config.existing is None:
        raise UserError(
            f"existing: null, but {len(done):,} of {len(images.paths):,} images already have tags, such as "
            f"{min(done)}; set skip (to continue a command that was killed), append or overwrite"
        )
    return destination, [path for path in images.paths if path not in done or config.existing != "skip"]


def predict_all(
    predictor: Predictor, paths: list[Path], config: PredictConfig, predict: Callable[[Tensor], Iterable[Row]]
) -> Iterator[Row]:
    """Yield a row per image: its path, and the result of `predict` or an error.

    Rows are in the order of `paths`, but sorted by bucket for weights that were trained in buckets.
    """
    machine = MachineConfig(
        device=config.device, precision="fp32", channels_last=False, workers=config.workers, threads=None,
        deterministic=False, hang_timeout_sec=1800.0,
    )  # fmt: skip
    runtime = choose_runtime(machine)
    if not paths:
        return
    loader, reasons = load_files(
        paths, predictor.preprocessing, runtime, max_pixels=config.max_pixels, batch_size=config.batch_size
    )
    for batch in loader:
        readable = batch["weight"] > 0
        predicted = iter(predict(batch["images"][readable]) if readable.any() else ())
        for is_readable, index, key in zip(readable.tolist(), batch["sample_id"].tolist(), batch["key"].tolist()):
            path = str(paths[index])
            if is_readable:
                yield {"path": path, **next(predicted)}
            elif key:  # 0 for padding
                log.warning("unreadable image %s: %s", path, reasons[path])
                yield {"path": path, "error": reasons[path]}


def write_texts(rows: Iterable[Row], destination: RowFile | Sidecars, config: PredictConfig) -> Iterator[Row]:
    """Yield rows with their tags joined to a text; existing=append puts them after the image's present tags."""
    for row in rows:
        if "tags" in row:
            before = destination.tags(row["path"]) if config.existing == "append" else ()
            words = spell_tags(row["tags"], row.get("rating"), config.text)
            row["tags"] = join_tags([*before, *words], config.text.separator)
        yield row


def embed(key: str, predictor: Predictor, config: PredictConfig) -> tuple[list[str], np.ndarray]:
    """Return the paths and embeddings [N, D] of the readable images of `key`. Raises UserError if there are none."""
    paths = find_images(getattr(config, key), key).paths
    rows = predict_all(predictor, paths, config, lambda images: [{"vector": row} for row in predictor.embed(images)])
    readable = [row for row in track(rows, len(paths), "embedding") if "vector" in row]
    if not readable:
        reasons = "predict.py output=x.jsonl gives the reasons"
        raise UserError(f"{key}: {paths[0]} cannot be read, nor can any other image; {reasons}")
    return [row["path"] for row in readable], np.stack([row["vector"] for row in readable])


def search(config: PredictConfig, predictor: Predictor, weights: str) -> str:
    """Write the images' embeddings, or with `like` the most similar images. weights: the weights' hash."""
    output, source = Path(config.output), config.input
    likes = None if config.like is None else RowFile(output, ["path", "similarity"], keep=False)
    stored = isinstance(source, str) and source.endswith(".npz")
    paths, vectors = read_embeddings(Path(source), weights) if stored else embed("input", predictor, config)
    with output_errors("output", output):
        if likes is None:
            write_embeddings(output, paths, vectors, weights)
        else:
            likes.write(rank(paths, vectors, embed("like", predictor, config)[1][0], config.top))
    return f"wrote {output}: {len(paths)} images"


@entry_point("predict", PredictConfig)
def main(config: PredictConfig, job: Job) -> str:
    """Predict."""
    # -------------------------------------------------------------------------------------------------- 1. The model
    device = choose_device(config.device, "device")
    with about("weights"):
        weights = find_weights(config.weights, "best")
        predictor = load_predictor(weights, torch.device("cpu" if config.dry_run else device))
    if config.like is not None or config.output.endswith(".npz"):
        return "dry run: nothing is embedded" if config.dry_run else search(config, predictor, sha256_file(weights))

    # --------------------------------------------------------------------------- 2. The images and the destination
    options, images = choose_rows(config, predictor, weights), find_images(config.input, "input")
    destination, paths = open_destination(config, predictor, images)
    if config.dry_run:
        return f"dry run: {len(paths)} images, nothing is predicted"

    # --------------------------------------------------------------------------------------------- 3. The predictions
    rows = predict_all(predictor, paths, config, lambda images: predictor.rows(images, options))
    with output_errors("output", Path(config.output)):
        destination.write(write_texts(track(rows, len(paths), "predicting"), destination, config))
    written = "files beside the images" if config.output == "beside" else config.output
    return f"wrote {written}: {len(paths)} images, {len(images.paths) - len(paths)} there already"


if __name__ == "__main__":
    main()
