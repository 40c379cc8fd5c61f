"""The main function of predict.py for images."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from shlex import quote

import numpy as np

from data.images.prepare import read_images
from data.tags.rules import TagRules, read_rules
from data.tools.form import Form, read_form
from data.tools.predictions import (
    Destination,
    Embeddings,
    ImageList,
    Predicted,
    Row,
    RowFile,
    Sidecars,
    embedding_rows,
    find_excluded,
    list_images,
    spell_tags,
)
from engine.config import MACHINE
from engine.exports.predictors import load_predictor
from engine.judging.config import PredictConfig
from models.outputs import RowOptions
from models.predictor import Predictor
from utils.config.entry_point import Job
from utils.errors import UserError, about
from utils.formats.spelling import CATEGORIES, join_tags
from utils.hardware import choose_device
from utils.io.files import sha256_file, sha256_text
from utils.io.journal import open_journal
from utils.io.weight_files import find_weights
from utils.ranks.processes import count_cores
from utils.record.logging import log
from utils.record.progress import track
from utils.start import open_name

Predict = Callable[[np.ndarray], Iterable[Row]]  # from images to their rows


def choose_rows(config: PredictConfig, predictor: Predictor, weights: Path) -> RowOptions:
    """Return the options for rows. An excluded tag has an infinite threshold."""
    text = config.text
    stated = config.thresholds
    file, by_category = (stated, {}) if isinstance(stated, str) else (None, stated.model_dump(exclude_none=True))
    thresholds = predictor.choose_thresholds(weights, config.profile, config.threshold, file)
    if predictor.output.has_tags:
        thresholds = np.broadcast_to(thresholds, len(predictor.names))
        for name, value in by_category.items():
            thresholds = np.where(predictor.categories == CATEGORIES[name], value, thresholds)
        if text.exclude:
            is_excluded = find_excluded(predictor.names, predictor.categories, text.exclude)
            thresholds = np.where(is_excluded, np.inf, thresholds)
    return predictor.options(config.top, thresholds, max_tags=text.max_tags, order=text.order)


def choose_destination(
    config: PredictConfig, predictor: Predictor, images: ImageList, weights: str, form: Form | None, options: RowOptions
) -> Destination:
    """Return the destination of the predictions. weights: the hash of the weights.

    Raises UserError (`output`, `existing`) if the destination does not suit the weights.
    """
    output = Path(config.output)
    columns = predictor.output.columns
    if output.suffix == ".npz":
        return Embeddings(output, weights)
    if config.output == "beside" or config.output.endswith("/") or output.is_dir():
        if not predictor.output.has_tags:
            raise UserError(f"output: {output} is for tags, but {config.weights[0]} is no tagger; name a .jsonl file")
        folder = None if config.output == "beside" else config.output
        return Sidecars(images, folder, replace=config.existing in ("append", "overwrite"))
    if config.existing == "append":
        raise UserError(f"existing: append is for .txt files, but {output} has rows; set skip or overwrite")
    if output.suffix == ".csv" and columns is None:
        raise UserError(f"output: {config.weights[0]} predicts vectors, which CSV cannot hold; name a .jsonl file")
    if form is not None:
        return RowFile(output, form.columns, keep=False, choose=form.fill)
    more = ["unsure"] if options.thresholds.any() and not predictor.output.has_tags else []
    choose = iter
    if config.sort is not None:
        from data.tools.sorting import sort_rows

        if "class" not in (columns or ()):
            raise UserError(f"sort: {config.weights[0]} predicts no classes; name a classifier")
        choose = partial(sort_rows, folder=Path(os.path.abspath(config.sort)), by=config.sort_by)
        more.append("sorted")
    return RowFile(output, ["path", *(columns or ()), *more, "error"], keep=config.existing == "skip", choose=choose)


def choose_paths(
    config: PredictConfig, images: ImageList, destination: Destination, known: Mapping[str, bool]
) -> list[Path]:
    """Return the images to predict. known: the paths of a killed call of this command, and whether the row counts.

    Raises UserError (`existing`) if other images have a result and `existing` is not set.
    """
    written = {path for path in images.paths if str(path) not in known and destination.has(str(path))}
    if written and config.existing is None:
        raise UserError(
            f"existing: null, but {len(written):,} of {len(images.paths):,} images already have tags, such as "
            f"{min(written)}; set skip, append or overwrite"
        )
    skipped = written if config.existing == "skip" else ()
    return [path for path in images.paths if not known.get(str(path)) and path not in skipped]


def predict_all(
    predictor: Predictor,
    paths: list[Path],
    config: PredictConfig,
    predict: Predict,
    destination: Destination,
    rules: TagRules,
) -> Iterator[list[Row]]:
    """Yield the rows of a batch: the path of an image, and the result of `predict` or an error; tags are one text.

    Rows have the order of `paths`. If the images of the first batches are removed, the other batches do not change.
    With existing=append, the tags follow those of the image.
    """
    threads = count_cores() if config.workers == "auto" else config.workers
    read = read_images(paths, predictor.preprocessing, config.max_pixels, threads)
    images = track(read, len(paths), "predicting")
    for start in range(0, len(paths), config.batch_size):
        batch = paths[start : start + config.batch_size]
        read = [*islice(images, len(batch))]
        readable = [image for image in read if not isinstance(image, str)]
        predicted = iter(predict(np.stack(readable)) if readable else ())
        rows = []
        for path, image in zip(map(str, batch), read):
            if isinstance(image, str):
                log.warning("unreadable image %s: %s", path, image)
                rows.append({"path": path, "error": image})
            else:
                rows.append({"path": path, **next(predicted)})
                if "tags" in (row := rows[-1]):
                    before = destination.tags(path) if config.existing == "append" else ()
                    row["tags"] = join_tags([*before, *spell_tags(row, config.text, rules)], config.text.separator)
        yield rows


def predict(config: PredictConfig, job: Job) -> str:
    """Predict images; return the line of the result."""
    # -------------------------------------------------------------------------------------------------- 1. The model
    if config.output is None:
        config = config.changed({"output": f"{config.sort}/predictions.csv"})
    device = choose_device(config.device, "device")
    with about("weights"):
        weights = find_weights(config.weights[0], "best", onnx_first=True)
        if weights.suffix != ".onnx":
            open_name("engine.update.runtime:choose_runtime")(MACHINE.changed({"device": config.device}))
        predictor = load_predictor(weights, "cpu" if config.dry_run else device)
    embeds = config.output.endswith(".npz")
    if config.dry_run and embeds:
        return "dry run: nothing is embedded"

    # --------------------------------------------------------------------------- 2. The images and the destination
    version = sha256_file(weights)
    rules = read_rules(config.text, "text.")
    images = list_images(config.input, "input")
    form = read_form(Path(config.form), images.paths, predictor.names) if config.form else None
    options = predictor.options(config.top, np.float32(0.0)) if embeds else choose_rows(config, predictor, weights)
    destination = choose_destination(config, predictor, images, version, form, options)
    if config.dry_run:
        return f"dry run: {len(choose_paths(config, images, destination, {}))} images, nothing is predicted"

    # --------------------------------------------------------------------------------------------- 3. The predictions
    settings = config.model_dump(mode="json", exclude={"input", "weights", "existing", "workers", "dry_run"})
    replaces = config.existing if config.existing in ("append", "overwrite") else None
    thresholds = sha256_text(repr(np.asarray(options.thresholds).tolist()))
    command = [version, settings, thresholds, rules.hash, replaces]  # all on which rows depend, except images
    folder = destination.folder
    with open_journal("output", folder or Path(config.output), command, is_folder=folder is not None) as journal:
        predicted = Predicted(journal, images.paths)
        paths = choose_paths(config, images, destination, predicted.known)
        make_rows = lambda images: predictor.rows(images, options)  # noqa: E731
        if embeds:
            make_rows = lambda images: embedding_rows(predictor.embed(images))  # noqa: E731
        if form is not None and form.has_probs:
            named = lambda probs: {"probs": dict(zip(predictor.names, probs))}  # noqa: E731
            make_rows = lambda images: map(named, predictor.predict(images).astype(float).round(6).tolist())  # noqa: E731
        predicted.write(predict_all(predictor, paths, config, make_rows, destination, rules), destination)
    written = "files beside the images" if config.output == "beside" else config.output
    if config.sort is not None:
        written += f" (to take the copies back: sh {quote(f'{config.sort}/undo.sh')})"
    present = len(images.paths) - len(paths)
    return f"wrote {written}: {len(paths)} images" + (f", {present} there already" if present else "")
