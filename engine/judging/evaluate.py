"""The jobs of evaluate.py."""

import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

import torch

from engine.judging.arena import compare_taggers
from engine.judging.config import Compare, Evaluate, EvaluateConfig
from engine.judging.folds import judge_folds
from engine.judging.measured import Measured, choose_images, open_measured
from engine.judging.per_image import ImageRows
from engine.run.results import read_results
from engine.task import Report
from engine.update.runtime import start_machine
from utils.config.entry_point import Job
from utils.errors import UserError, about
from utils.formats.thresholds import PER_TAG, ThresholdTable, find_thresholds, thresholds_path, write_thresholds
from utils.io.files import (
    Values,
    canonical_json,
    output_errors,
    refuse_links_out,
    sha256_text,
    write_json,
)
from utils.io.safe_text import Lines, hide_secrets
from utils.io.weight_files import WEIGHT_NAMES, find_weights
from utils.ranks import distributed
from utils.record.figures import show_figure, show_name, show_rows
from utils.record.logging import log
from utils.record.report import write_html, write_report
from utils.record.run_reader import RunReader, run_of

_RESULTS = Path("outputs/evaluate")  # results that belong to no run
_IN_NAMES = ("last", "ema", "test", "train", "all", "folds")  # weights and splits whose results have names of their own
_DRY_RUN = "dry run: nothing is evaluated"


# -------------------------------------------------------------------------------------------------- 1. A weight file


def evaluate(job: Evaluate, config: EvaluateConfig) -> str:
    """Measure, and write the results: for the run's own images into the run folder, for other images into another."""
    path = job.find()
    images = choose_images(config.data, job.run_dir, job.split)
    folder = Path(job.output or job.run_dir or "")
    if job.output is None and (not images.is_own or job.weights not in WEIGHT_NAMES):
        parent = _RESULTS if job.run_dir is None else folder / "evaluate"
        name = f"{path.stem}-{Path(hide_secrets(images.data.root)).name}"
        source = {"weights": str(path.resolve()), "data": images.data.model_dump(mode="json"), "split": job.split}
        folder = result_folder(parent / name, source)
    refuse_links_out("output", folder)
    with about("weights"):
        opened = open_measured(path, job.model, images, job.split, config.runtime, config.batch_size)
    weights = opened.weights
    metadata = weights.metadata
    collection = opened.data.collection
    if job.calibrate and weights.kind.output not in ("tags", "classes"):
        raise UserError(f"calibrate: true is for taggers and classifiers; {path} has no thresholds")
    if (job.risk is None) == (job.calibrate and weights.kind.output == "classes"):
        raise UserError(
            f"risk: {job.risk}, but it is for calibrate=true of a classifier, which needs one, such as 0.05. "
            "The tags of an image are not independent, and a missing label counts as a wrong tag: for these, set "
            "calibration.precision, and predict with profile=high_precision"
        )
    if job.calibrate and opened.split != "val" and (images.is_own or opened.split == "test"):
        raise UserError(
            f"split: {opened.split} has images that were trained on, or are for tests; calibrate with split=val"
        )
    if config.dry_run:
        return _DRY_RUN
    started = time.perf_counter()
    image_rows = ImageRows(weights.task.describe_images) if job.per_image else None
    with torch.inference_mode(), opened.runtime.autocast():
        report, thresholds = _measure(job, opened, image_rows)
    seconds = round(time.perf_counter() - started, 3)
    other = "".join(f"_{part}" for part in (job.weights, job.split, job.folds and "folds") if part in _IN_NAMES)
    if image_rows is not None:
        root = collection.root.resolve() if isinstance(collection.root, Path) else hide_secrets(collection.root)
        table = folder / f"tables/images{other}.parquet"
        with output_errors("output", folder):
            image_rows.write(table, collection.table["path"], str(root))
        log.info("wrote %s", table)
    if not distributed.is_main():
        return _show(report)

    figures = {"weights": str(path), "weights_hash": metadata.get("weights_hash"), "split": opened.split}
    place = f"{job.folds} folds" if job.folds else opened.split.replace("val", "validation")
    if not images.is_own:
        figures["data"] = hide_secrets(str(collection.root))
        place = f"{Path(figures['data']).name}, {place}"
    measured = f"{place}: {report.scalars.get('samples', len(opened.rows)):,.0f} images"
    figures |= {"measured": measured, "step": metadata["step"], "seconds": seconds, **report.scalars}
    title = f"{path}, step {metadata['step']}, on {measured} of {collection.root}"
    write_results(folder / f"metrics{other}.json", title, figures, report, other)
    if thresholds is not None:
        beside = thresholds_path(path)
        with output_errors("weights", beside):
            write_thresholds(beside, thresholds, metadata["weights_hash"])
        log.info("wrote %s, which predict.py and export.py read", beside)
    return f"{measured}: {_show(report)}"


def _measure(job: Evaluate, opened: Measured, image_rows: ImageRows | None) -> tuple[Report, ThresholdTable | None]:
    """Read the images once. Only rows at thresholds that the same command fits need a second pass."""
    weights = opened.weights
    if job.folds:
        return judge_folds(RunReader(Path(job.run_dir or "")), job.folds), None
    loaders = opened.loaders()
    is_tagger = weights.kind.output == "tags"
    if job.calibrate:
        leads = opened.data.collection.leads(opened.rows)
        promises = (job.calibration.precision, job.calibration.recall) if is_tagger else (job.risk,)
        report, table = weights.task.calibrate(loaders["val"], leads, *promises)
        report.tables["thresholds"] = [asdict(row) for row in table.rows if row.profile != PER_TAG]
        if image_rows is not None:
            deque(image_rows.watch(opened.loaders()["val"]), maxlen=0)
        return report, table
    if image_rows is not None:
        loaders["val"] = image_rows.watch(loaders["val"])
        if is_tagger:
            weights.task.use_thresholds(find_thresholds(None, weights.path, weights.metadata.get("weights_hash")))
    return weights.task.evaluate(loaders, weights.metadata["step"]), None


def result_folder(place: Path, source: Values) -> Path:
    """Return the folder for results of a source that is no run: `place`, with a hash of the source in the name."""
    return place.with_name(f"{place.name}-{sha256_text(canonical_json(source))[:8]}")


def write_results(file: Path, title: str, figures: Values, report: Report, other: str | None = None) -> None:
    """Write figures into a file, and tables, pictures and a page beside the file. other: suffix of an evaluation."""
    folder = file.parent
    with output_errors("output", file):
        write_json(file, figures)
    log.info("wrote %s", file)
    if other is not None:
        run = run_of(Path(figures["weights"]))
        results = read_results(folder if run is None else run.path, figures["weights_hash"])
        if len(results) > 1:
            rows = [
                {"figure": show_name(name)} | {title: show_figure(name, figures) for title, figures in results.items()}
                for name in report.scalars
            ]
            report.tables = {"measured": rows, **report.tables}
            log.info("%s", Lines(show_rows(rows)))
    with output_errors("output", folder):
        images = report.draw()
        write_report(folder, report.tables, images, "" if other is None else f"evaluate{other}_")
        if report.tables:
            page = folder / f"report{other or ''}.html"
            write_html(page, title, report.scalars, report.tables, images)
            log.info("wrote %s", page)


def _show(report: Report) -> str:
    return "  ".join(f"{name}={show_figure(name, report.scalars)}" for name in report.scalars)


# -------------------------------------------------------------------------------------------- 2. Taggers, compared


def compare(job: Compare, config: EvaluateConfig) -> str:
    """Measure the models, and return the line of the best model."""
    with about("models"):
        paths = [find_weights(name, "best", onnx_first=True) for name in job.models]
        images = choose_images(config.data, None, job.split)
        opened = [open_measured(path, None, images, job.split, config.runtime, config.batch_size) for path in paths]
    if config.dry_run:
        return _DRY_RUN
    with torch.inference_mode():
        report = compare_taggers(dict(zip(job.models, opened)), job)
    rows = report.tables["arena"]
    if distributed.is_main():
        source = config.model_dump(mode="json", include={"job", "data"})
        folder = Path(job.output or result_folder(_RESULTS / "arena", source))
        refuse_links_out("output", folder)
        log.info("%s", Lines(show_rows(rows)))
        figures = {**report.scalars, "data": images.data.model_dump(mode="json"), "models": rows}
        write_results(folder / "arena.json", f"Taggers on {images.data.root}", figures, report)
        if job.output is None:
            log.info("view.py shows images of both answers: /compare?taggers=%s", folder.name)
    return f"{rows[0]['model']}  mAP={rows[0]['mAP']:.4f}"


_JOBS = {"evaluate": evaluate, "compare": compare}


def run(config: EvaluateConfig, job: Job) -> str:
    """Run the job."""
    start_machine(config.runtime)
    return _JOBS[config.job.name](config.job, config)
