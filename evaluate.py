"""Measure weights on a collection's validation split: exact on any number of ranks.

    python evaluate.py run_dir=RUN weights=best                                    a run, on its own data
    python evaluate.py run_dir=RUN weights=last data=image_folder data.root=PATH   its last weights, on other data
    python evaluate.py weights=FILE data=image_folder data.root=PATH               a weight file of ours
    python evaluate.py weights=FILE model=convnextv2_tiny augment=randaugment data=image_folder data.root=PATH
                                                                                   a released file (docs/weights.md)
    python evaluate.py weights=timm model=timm model.name=resnet18.a1_in1k data=image_folder data.root=PATH
    python evaluate.py job=arena models=[RUN,FILE,FOLDER] data=image_folder data.root=PATH
                                                                                   taggers, ours and others', compared

Writes metrics.json, report.html, tables/evaluate_*.csv and plots/evaluate_*.png into the run folder, or below
outputs/evaluate/, in a folder for each file and collection. The arena writes arena.json, report.html, tables and plots.
"""

import utils.config.help  # noqa: F401, I001 (answers --help before the slow imports)

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, model_validator

from data.config import AugmentConfig, DataConfig
from data.image_data import ImageData
from engine.config import MachineConfig
from engine.run import start_machine
from engine.runtime import Runtime
from engine.task import Report
from engine.tasks.arena import Arena, ArenaConfig
from engine.tasks.foreign import DROPPED, ForeignSource, check_average, rebuild_foreign
from engine.tasks.kind import Rebuilt, Setup, Targets
from engine.tasks.kinds import FOREIGN
from engine.tasks.rebuild import read_run_data, rebuild_task
from models.config import ModelConfig
from utils.config.bounds import BatchSize
from utils.config.entry_point import Job, entry_point
from utils.config.schema import PathText, Strict
from utils.io.files import output_errors, write_json
from utils.io.result_folder import open_result_folder
from utils.io.safe_text import Lines
from utils.io.weights import WEIGHT_NAMES, choose_weights
from utils.ranks import distributed
from utils.record.figures import show_figures
from utils.record.html_page import FILE as PAGE
from utils.record.html_page import write_page
from utils.record.logging import get_logger
from utils.record.progress import track
from utils.record.report_files import write_report
from utils.text_table import show_rows
from utils.thresholds import FILE as THRESHOLDS
from utils.thresholds import write_thresholds

log = get_logger(__name__)

_RESULTS = Path("outputs/evaluate")  # without a run
_DRY_RUN = "dry run: nothing is measured"


def _as_list(value: Any) -> Any:
    """Return one path, with brackets or without, as a list: on a command line, only a comma makes one of paths."""
    return [value.removeprefix("[").removesuffix("]")] if isinstance(value, str) else value


class EvaluateConfig(Strict):
    """`weights` is best, best_raw, last, ema, a file, or `timm`; `output` a JSON file (null: metrics.json).
    `calibrate` also writes the thresholds of a tagger. `job` arena compares `models` on `data`, as `arena` says.

    Without `run_dir`, `data` must be given; `model` and `augment` too where the file is not ours.
    """

    job: Literal["weights", "arena"]
    models: Annotated[list[PathText] | None, BeforeValidator(_as_list)]
    run_dir: PathText | None
    weights: PathText
    init_weights: Literal["model", "ema"]
    output: PathText | None
    model: ModelConfig | None
    data: DataConfig | None
    augment: AugmentConfig | None
    batch_size: BatchSize
    calibrate: bool
    calibration: Targets
    arena: ArenaConfig
    dry_run: bool
    runtime: MachineConfig

    @model_validator(mode="after")
    def _says_what_to_measure(self) -> Self:
        if self.job == "arena":
            return self._is_an_arena()
        if self.models is not None:
            raise ValueError("models: are read by job=arena, not by job=weights; add job=arena, or remove models")
        if self.run_dir is None and self.weights in WEIGHT_NAMES:
            raise ValueError(
                f"run_dir: must be given, because weights={self.weights} is one of a run's; add run_dir=RUN, or "
                "weights=FILE"
            )
        if self.run_dir is None and self.data is None:
            raise ValueError("data: must be given where there is no run_dir; add data=image_folder data.root=PATH")
        if self.run_dir is not None and self.model is not None:
            raise ValueError("model: the run states its own; remove model, or run_dir and give weights=FILE")
        check_average(self.init_weights, self.model)
        if self.model is None and (self.augment is not None or self.weights == "timm"):
            raise ValueError(
                "model: must be given with augment and with weights=timm; a weight file of ours states both itself"
            )
        return self

    def _is_an_arena(self) -> Self:
        for key in ("models", "data"):
            if not getattr(self, key):
                raise ValueError(f"{key}: job=arena needs models=[RUN,FOLDER] and data=image_folder data.root=PATH")
        for key in ("run_dir", "model", "augment", "calibrate"):
            if getattr(self, key):
                raise ValueError(f"{key}: job=arena measures models as they are; remove {key}, or set job=weights")
        return self


def open_task(config: EvaluateConfig, runtime: Runtime) -> tuple[Path, Rebuilt, ImageData]:
    """Return the folder of the results, the task with the weights, and the data."""
    if config.model is not None:
        setup = Setup(config.model, FOREIGN.foreign, DROPPED)
        data = FOREIGN.pipeline.open(config.data, setup, runtime, seed=0, batch_size=config.batch_size)
        source = ForeignSource(config.weights, config.model, config.augment, config.init_weights)
        place = config.model.name if config.weights == "timm" else Path(config.weights).stem
        return _RESULTS / place, rebuild_foreign(source, data.collection), data
    saved = None if config.run_dir is None else read_run_data(Path(config.run_dir))
    path = choose_weights(config.run_dir or "", config.weights)
    folder = _RESULTS / path.stem if config.run_dir is None else Path(config.run_dir)
    rebuilt = rebuild_task(path)
    seed = 0 if saved is None else saved.seed
    pipeline, chosen = rebuilt.kind.pipeline, config.data or saved.data
    return folder, rebuilt, pipeline.open(chosen, rebuilt.setup, runtime, seed=seed, batch_size=config.batch_size)


def describe_source(config: EvaluateConfig, rebuilt: Rebuilt) -> dict[str, Any]:
    """Return what the results without a run are of, by which their folder is found again."""
    values = config.model_dump(mode="json", include={"init_weights", "model", "data", "augment"})
    return {"weights": str(Path(rebuilt.weights).resolve()), **values}


def compare_taggers(config: EvaluateConfig, runtime: Runtime) -> str:
    """Measure `models` on the tags that all of them know; returns the best one's line."""
    arena = Arena(config.models, config.data, config.arena, runtime, config.batch_size)
    if config.dry_run:
        return _DRY_RUN
    with torch.inference_mode(), runtime.autocast():
        report = arena.measure()
    rows = report.tables["arena"]
    if distributed.is_main():
        source, folder = config.model_dump(mode="json", include={"models", "data", "arena"}), _RESULTS / "arena"
        with output_errors("output", folder):
            folder = open_result_folder(folder, source)
        output = folder / "arena.json" if config.output is None else Path(config.output)
        log.info("%s", Lines(show_rows(rows)))
        write_results(folder, output, f"Arena: {config.data.root}", {**report.scalars, "models": rows}, report)
    return f"{rows[0]['model']}  mAP={rows[0]['mAP']:.4f}"


def write_results(
    folder: Path, output: Path, title: str, figures: Mapping[str, Any], report: Report, prefix: str = ""
) -> None:
    """Write the figures to `output`, and tables, pictures and a page of them into the folder."""
    with output_errors("output", output):
        write_json(output, figures)
    log.info("wrote %s", output)
    with output_errors("run_dir", folder):
        write_report(folder, report.tables, report.images, prefix)
        if report.tables:
            write_page(folder / PAGE, title, report.scalars, report.tables, report.images)
            log.info("wrote %s", folder / PAGE)


@entry_point("evaluate", EvaluateConfig)
def main(config: EvaluateConfig, job: Job) -> str:
    """Evaluate."""
    # ------------------------------------------------------------------------------------------ 1. Ranks and machine
    runtime = start_machine(config.runtime)
    if config.job == "arena":
        return compare_taggers(config, runtime)

    # --------------------------------------------------------------------- 2. The task with those weights, and the data
    folder, rebuilt, data = open_task(config, runtime)
    if config.dry_run:
        return _DRY_RUN
    if config.runtime.precision == "auto":
        runtime = runtime.as_trained(rebuilt.metadata.get("precision"))
    task = rebuilt.task.to(runtime.device)
    if runtime.channels_last:
        task.to(memory_format=torch.channels_last)

    loaders = rebuilt.kind.pipeline.evaluation(data, rebuilt.setup, training=False)

    # ------------------------------------------------------------------------------------------------- 3. The result
    step, started = rebuilt.metadata["step"], time.perf_counter()
    with torch.inference_mode(), runtime.autocast():
        tracked = {name: track(loader, len(loader), f"evaluating {name}") for name, loader in loaders.items()}
        report = task.evaluate(tracked, step)
        seconds = time.perf_counter() - started
        if config.calibrate:
            tracked = track(loaders["val"], len(loaders["val"]), "calibrating")
            found = rebuilt.kind.calibrate(task, tracked, config.calibration)
            report.tables |= found.report.tables
            report.images |= found.report.images
    if distributed.is_main():
        if config.run_dir is None:
            with output_errors("output", folder):
                folder = open_result_folder(folder, describe_source(config, rebuilt))
        output = folder / "metrics.json" if config.output is None else Path(config.output)
        title = f"{rebuilt.weights}, step {step}, on {data.collection.root}"
        figures = {"weights": rebuilt.weights, "step": step, "seconds": round(seconds, 3), **report.scalars}
        write_results(folder, output, title, figures, report, prefix="evaluate_")
        if config.calibrate:
            with output_errors("run_dir", folder):
                write_thresholds(folder / THRESHOLDS, found.thresholds)
            log.info("wrote %s, which predict.py and export.py read", folder / THRESHOLDS)
    line = show_figures(report.scalars)
    log.info("%s", line)
    return line


if __name__ == "__main__":
    main()
