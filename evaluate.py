"""Evaluate weights on a collection's validation split, or another one, exactly on any number of ranks.

    python evaluate.py run_dir=RUN weights=best                                    a run, on its own data
    python evaluate.py run_dir=RUN weights=last data=image_folder data.root=PATH   its last weights, on other data
    python evaluate.py weights=FILE data=image_folder data.root=PATH               a weight file of ours
    python evaluate.py run_dir=RUN split=train per_image=true                      a row for each training image
    python evaluate.py run_dir=RUN grid=true                                       all its kept weights, side by side
    python evaluate.py models=[RUN,FILE,FOLDER] data=image_folder data.root=PATH
                                                                                   taggers, ours and others', compared

Weights from elsewhere are evaluated as a run: finetune.py init_from=FILE task.head=kept loop.total_steps=0.

Writes metrics.json, report.html, tables/evaluate_*.csv and plots/evaluate_*.png into the run folder, or for a file into
a folder in outputs/evaluate/; with another split, metrics_SPLIT.json and so on. per_image=true adds
tables/images.parquet. A comparison of taggers writes arena.json, report.html, tables and plots, one of kept weights
grid.json, report.html, tables/grid.csv and for SDXL plots/grid.png.
"""

from utils.start import begin

begin(__doc__)

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data.config import DataConfig
from data.open import Data, describe_collection, load_collection
from engine.config import MachineConfig
from engine.exports.weights import MovedBase, load_predictor, open_weights
from engine.judging.arena import Arena, ArenaConfig
from engine.judging.grid import list_weights, to_part, to_report
from engine.judging.per_image import write_images
from engine.task import Report
from engine.update.runtime import Runtime, choose_trained, start_machine
from utils.config.bounds import BatchSize
from utils.config.entry_point import Job, entry_point
from utils.config.schema import PathList, PathText, Strict
from utils.errors import UserError, about
from utils.formats.thresholds import PER_TAG, find_thresholds, thresholds_path, write_thresholds
from utils.io.files import canonical_json, output_errors, refuse_links_out, sha256_text, write_json
from utils.io.journal import open_journal
from utils.io.safe_text import Lines, hide_secrets
from utils.io.weights import WEIGHT_NAMES, choose_weights, find_weights, read_weights
from utils.ranks import distributed
from utils.record.figures import show_cell, show_rows
from utils.record.logging import get_logger
from utils.record.progress import track
from utils.record.report import PAGE, write_page, write_report
from utils.record.run_reader import RunReader
from utils.record.tables import IMAGES

log = get_logger(__name__)

_RESULTS = Path("outputs/evaluate")  # results that belong to no run
_DRY_RUN = "dry run: nothing is evaluated"


class _Targets(Strict):
    """The precision and recall that the profiles high_precision and high_recall reach."""

    precision: Annotated[float, Field(gt=0, lt=1)]
    recall: Annotated[float, Field(gt=0, lt=1)]


class EvaluateConfig(Strict):
    """conf/evaluate.yaml, checked."""

    models: PathList | None  # taggers to compare on `data`, or None
    run_dir: PathText | Annotated[list[PathText], Field(min_length=1)] | None  # with grid, also several
    weights: PathText  # best, last or ema of `run_dir`, or a weight file
    grid: bool  # measure all kept weights
    output: PathText | None  # a JSON file
    model: MovedBase
    data: DataConfig | None  # None: the data of the run
    batch_size: BatchSize
    split: Literal["val", "train", "all"]
    per_image: bool  # also write a row for each image
    calibrate: bool  # also write a tagger's thresholds
    calibration: _Targets
    arena: ArenaConfig  # how `models` are compared
    dry_run: bool
    runtime: MachineConfig

    @model_validator(mode="after")
    def _says_what_to_measure(self) -> Self:
        if self.grid:
            single = {"models": self.models, "calibrate": self.calibrate, "per_image": self.per_image}
            single |= {"weights": self.weights != "best", "run_dir": self.run_dir is None}
            if wrong := next((key for key, value in single.items() if value), None):
                raise ValueError(f"{wrong}: grid=true measures all kept weights of run_dir=RUN; change one of the two")
        elif isinstance(self.run_dir, list):
            raise ValueError("run_dir: several runs are for grid=true; add it, or name one run")
        elif self.models is not None:
            if self.data is None:
                raise ValueError("data: must be given with models; add data=image_folder data.root=PATH")
            if self.run_dir or self.calibrate or self.per_image:
                key = "run_dir" if self.run_dir else "calibrate" if self.calibrate else "per_image"
                raise ValueError(f"{key}: cannot be combined with models; remove one of the two")
        elif self.calibrate and self.split != "val":
            raise ValueError(f"split: {self.split} has images that were trained on; calibrate with split=val")
        elif self.run_dir is None:
            if self.weights in WEIGHT_NAMES:
                raise ValueError(f"run_dir: must be given for weights={self.weights}; add run_dir=RUN, or weights=FILE")
            if self.data is None:
                raise ValueError("data: must be given without run_dir; add data=image_folder data.root=PATH")
        return self


class _RunData(BaseModel):
    """The keys of a run's configuration that evaluation reads."""

    model_config = ConfigDict(strict=True)

    data: DataConfig
    seed: int


def compare_taggers(config: EvaluateConfig, runtime: Runtime) -> str:
    """Evaluate `models` on the tags that all of them know. Return the line of the best one."""
    models = {}
    for name in config.models:
        with about("models"):
            models[name] = load_predictor(find_weights(name, "best", onnx_first=True), runtime.device)
    arena = Arena(models, config.data, config.arena, runtime, config.batch_size)
    if config.dry_run:
        return _DRY_RUN
    with torch.inference_mode(), runtime.autocast():
        report = arena.measure()
    rows = report.tables["arena"]
    if distributed.is_main():
        folder = result_folder("arena", **config.model_dump(mode="json", include={"models", "data", "arena"}))
        refuse_links_out("run_dir", folder)
        output = Path(config.output or folder / "arena.json")
        log.info("%s", Lines(show_rows(rows)))
        write_results(folder, output, f"Arena: {config.data.root}", {**report.scalars, "models": rows}, report)
    return f"{rows[0]['model']}  mAP={rows[0]['mAP']:.4f}"


def result_folder(name: str, **source: Any) -> Path:
    """Return the folder of results that belong to no run; the same source has the same folder."""
    return _RESULTS / f"{name}-{sha256_text(canonical_json(source))[:8]}"


def write_results(
    folder: Path, output: Path, title: str, figures: Mapping[str, Any], report: Report, prefix: str = ""
) -> None:
    """Write the figures to `output`, and tables, pictures and a report page into the folder."""
    with output_errors("output", output):
        write_json(output, figures)
    log.info("wrote %s", output)
    with output_errors("run_dir", folder):
        images = report.draw()
        write_report(folder, report.tables, images, prefix)
        if report.tables:
            write_page(folder / PAGE, title, report.scalars, report.tables, images)
            log.info("wrote %s", folder / PAGE)


def evaluate(config: EvaluateConfig, run: str | None, path: Path, folder: Path) -> Report | None:
    """Evaluate weights on `data`, or that of their run, and write the results. Return None for a dry run."""
    saved = None if run is None else RunReader(Path(run)).part(_RunData)
    with about("weights"):
        weights = open_weights(path, "evaluation", config.model)
    task, kind, setup, step = weights.task, weights.kind, weights.setup, weights.metadata["step"]
    runtime = choose_trained(config.runtime, weights.metadata.get("precision"))
    if config.calibrate and not hasattr(task, "calibrate"):
        name = weights.metadata["task"]["name"]
        raise UserError(f"calibrate: true fits a tagger's thresholds, but these weights are for the task {name!r}")
    thresholds = None
    if config.per_image and hasattr(task, "calibrate") and not config.calibrate:
        thresholds = find_thresholds(None, path, weights.metadata.get("weights_hash"))
    data_config, seed = config.data or saved.data, saved.seed if saved else 0
    collection = load_collection(data_config)
    images = kind.source(collection, data_config, setup, repeats=False)
    data = Data(collection, images, runtime, seed=seed, batch_size=config.batch_size, run_path=None)
    log.info("%s", describe_collection(collection))
    if config.dry_run:
        return None
    task.to(runtime.device)
    if runtime.channels_last:
        task.to(memory_format=torch.channels_last)
    rows = np.flatnonzero(collection.weights()) if config.split == "all" else collection.rows(config.split)
    loaders, started = kind.evaluation(data, setup, rows, training=False), time.perf_counter()
    if loaders["val"].samples == 0:
        raise UserError(
            f"split: {collection.root} has no image of split={config.split} that the task can use; set split=train, or "
            "name other data"
        )
    with torch.inference_mode(), runtime.autocast():
        tracked = {name: track(loader, len(loader), f"evaluating {name}") for name, loader in loaders.items()}
        report = task.evaluate(tracked, step)
        seconds = time.perf_counter() - started
        if config.calibrate:
            loader = track(loaders["val"], len(loaders["val"]), "calibrating")
            promises = config.calibration.precision, config.calibration.recall
            thresholds = task.calibrate(loader, collection.leads(rows), *promises)
            report.tables["thresholds"] = [asdict(row) for row in thresholds.rows if row.profile != PER_TAG]
        if config.per_image:
            if thresholds is not None:
                task.thresholds = np.float32(thresholds.of_tags(task.vocabulary, PER_TAG))
            loader = track(loaders["val"], len(loaders["val"]), "describing images")
            root = collection.root.resolve() if isinstance(collection.root, Path) else hide_secrets(collection.root)
            with output_errors("run_dir", folder):
                write_images(folder / IMAGES, loader, task.describe_images, collection.table["path"], str(root))
    if distributed.is_main() and not config.grid:
        source = {"weights": str(path), "weights_hash": weights.metadata.get("weights_hash"), "split": config.split}
        if saved is None or data_config != saved.data:
            source["data"] = hide_secrets(str(collection.root))
        figures = {**source, "step": step, "seconds": round(seconds, 3), **report.scalars}
        other = "" if config.split == "val" else f"_{config.split}"
        output = Path(config.output or folder / f"metrics{other}.json")
        title = f"{path}, step {step}, on {config.split} of {collection.root}"
        write_results(folder, output, title, figures, report, prefix=f"evaluate{other}_")
        if config.per_image:
            log.info("wrote %s", folder / IMAGES)
        if config.calibrate:
            beside = thresholds_path(path)
            with output_errors("weights", beside):
                write_thresholds(beside, thresholds, weights.metadata["weights_hash"])
            log.info("wrote %s, which predict.py and export.py read", beside)
    return report


def evaluate_grid(config: EvaluateConfig) -> str:
    """Evaluate the kept weights of runs, and write a row for each, and what each draws. A killed call goes on."""
    runs = [config.run_dir] if isinstance(config.run_dir, str) else config.run_dir
    files = list_weights(runs)
    folder = Path(runs[0]) if len(runs) == 1 else result_folder("grid", runs=runs)
    refuse_links_out("run_dir", folder)
    made_of = [config.model_dump(mode="json", exclude={"runtime", "batch_size", "output"})]
    made_of += [read_weights(path, shapes_only=True)[1]["weights_hash"] for _, _, path in files]
    made_of += [load_collection(config.data or RunReader(Path(run)).part(_RunData).data).fingerprint for run in runs]
    with open_journal("run_dir", folder / "grid", made_of) if distributed.is_main() else nullcontext() as journal:
        for run, step, path in files[distributed.rank_zero_call(lambda: len([*journal.parts()])) :]:
            report = evaluate(config, run, path, folder)
            if report is None:
                return _DRY_RUN
            if distributed.is_main():
                log.info("%s: %s", path, _show(report))
                journal.add(to_part(run, step, report))
        if distributed.is_main():
            report = to_report(journal.parts())
            title, figures = f"The kept weights of {', '.join(runs)}", {"weights": report.tables["grid"]}
            write_results(folder, Path(config.output or folder / "grid.json"), title, figures, report)
    return f"evaluated {len(files)} weight files"


def _show(report: Report) -> str:
    return "  ".join(f"{name}={show_cell(value)}" for name, value in report.scalars.items())


@entry_point("evaluate", EvaluateConfig)
def main(config: EvaluateConfig, job: Job) -> str:
    """Evaluate."""
    runtime = start_machine(config.runtime)
    if config.models is not None:
        return compare_taggers(config, runtime)
    if config.grid:
        return evaluate_grid(config)
    with about("weights"):
        path = choose_weights(config.run_dir or "", config.weights)
    folder = Path(config.run_dir or "")
    if config.run_dir is None:
        folder = result_folder(path.stem, weights=str(path.resolve()), data=config.data.model_dump(mode="json"))
    refuse_links_out("run_dir", folder)
    report = evaluate(config, config.run_dir, path, folder)
    return _DRY_RUN if report is None else _show(report)


if __name__ == "__main__":
    main()
