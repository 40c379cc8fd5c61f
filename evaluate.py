"""Measure a run's weights on its validation split: exact on any number of ranks.

python evaluate.py run_dir=RUN weights=best

Writes metrics.json, tables/evaluate_*.csv and plots/evaluate_*.png into the run folder.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter

from data.build import build_probe_loaders, load_collection, plain_loader
from data.collection import Collection
from data.config import AugmentConfig, DataConfig
from data.loader import Fields, UnreadableLog
from engine.config import MachineConfig
from engine.runtime import choose_device, choose_runtime
from engine.task import Task
from engine.tasks.classification import ClassificationTask, LabelFields
from engine.tasks.config import ClassificationTaskConfig, FCMAETaskConfig
from engine.tasks.fcmae import FCMAETask, MaskFields, patch_count
from models.config import ModelConfig
from models.weights import check_fit, load_into
from utils.config.entry_point import Job, entry_point
from utils.config.schema import Strict
from utils.errors import UserError
from utils.io.files import output_errors, write_json
from utils.io.weights import choose_weights, read_metadata, read_weights
from utils.ranks import distributed
from utils.record.logging import get_logger, setup_logging
from utils.record.progress import track
from utils.record.report_files import write_report
from utils.record.run_folder import read_run_config

log = get_logger(__name__)


class EvaluateConfig(Strict):
    """`weights` is best, last, ema or a file; `output` a JSON file (null: metrics.json in the run folder)."""

    run_dir: str
    weights: str
    output: str | None
    batch_size: Annotated[int, Field(ge=1)]
    runtime: MachineConfig


def rebuild_task(
    saved: dict[str, Any], metadata: dict[str, Any], augment: AugmentConfig, collection: Collection
) -> tuple[Task, Fields, Any]:
    """Return a run's task, what its loader adds to a sample, and the rows that it is measured on."""
    model = TypeAdapter(ModelConfig).validate_python(saved["model"])
    rows = collection.rows("val")
    match saved["task"]["name"]:
        case "classification":
            if "class_names" not in metadata:
                raise UserError("weights: the file names no classes; name weights of a fine-tuned run")
            class_names = metadata["class_names"]
            task = ClassificationTask(
                model,
                ClassificationTaskConfig.model_validate(saved["task"]),
                class_names=class_names,
                preprocessing=metadata["preprocessing"],
            )
            class_ids = collection.class_ids(class_names)
            return task, LabelFields(class_ids), rows[class_ids[rows] >= 0]
        case "fcmae":
            config = FCMAETaskConfig.model_validate(saved["task"])
            size_hw = augment.image_size_hw
            task = FCMAETask(model, config, image_size_hw=size_hw, mean=augment.mean, std=augment.std)
            return task, MaskFields(patch_count(model, config, size_hw), config.mask_ratio), rows
        case other:
            raise UserError(f"run_dir: the run's task is {other!r}; evaluate.py measures classification and fcmae")


@entry_point("evaluate", EvaluateConfig)
def main(config: EvaluateConfig, job: Job) -> str:
    """Evaluate."""
    # 1. Ranks and machine.
    world = distributed.init_process_group(choose_device(config.runtime.device), config.runtime.hang_timeout_sec)
    setup_logging(world.rank)
    runtime = choose_runtime(config.runtime)

    # 2. The run: its settings, its weights, its collection.
    run_dir = Path(config.run_dir)
    saved = read_run_config(run_dir)
    path = choose_weights(config.run_dir, config.weights)
    metadata = read_metadata(path, "weights")
    if "model" not in metadata:
        raise UserError(f"weights: {path} was not written by a run of Atelier; name best, last, ema or such a file")
    data = TypeAdapter(DataConfig).validate_python(saved["data"])
    augment = AugmentConfig.model_validate(saved["augment"])
    collection = load_collection(data)

    # 3. The task, as it was, with those weights.
    task, fields, rows = rebuild_task(saved, metadata, augment, collection)
    state, _ = read_weights(path, "weights", lambda shapes, _: check_fit(task.network, shapes, keep_head=True))
    load_into(task.network, state, keep_head=True)
    task.to(runtime.device).eval()
    if runtime.channels_last:
        task.to(memory_format=torch.channels_last)
    channels = saved["model"]["in_channels"]
    loader = plain_loader(
        collection, data, augment, fields, rows, channels=channels, seed=saved["seed"], batch_size=config.batch_size,
        runtime=runtime, unreadable=UnreadableLog(None),
    )  # fmt: skip

    loaders = {"val": loader}
    if isinstance(task, FCMAETask):
        loaders |= build_probe_loaders(
            collection, data, augment, LabelFields, task.probe, channels=channels, seed=saved["seed"],
            batch_size=config.batch_size, runtime=runtime, unreadable=loader.unreadable,
        )  # fmt: skip

    # 4. The figures.
    with torch.inference_mode(), runtime.autocast():
        tracked = {name: track(loader, len(loader), f"evaluating {name}") for name, loader in loaders.items()}
        report = task.evaluate(tracked, metadata.get("step", 0))
    if distributed.is_main():
        output = run_dir / "metrics.json" if config.output is None else Path(config.output)
        with output_errors("output", output):
            write_json(output, {"weights": str(path), "step": metadata.get("step"), **report.scalars})
        write_report(run_dir, report.tables, report.images, prefix="evaluate_")
        log.info("wrote %s", output)
    line = "  ".join(f"{name}={value:.4f}" for name, value in report.scalars.items())
    log.info("%s", line)
    return line


if __name__ == "__main__":
    main()
