"""Measure a run's weights on its validation split: exact on any number of ranks.

python evaluate.py run_dir=RUN weights=best

Writes metrics.json, tables/evaluate_*.csv and plots/evaluate_*.png into the run folder.
"""

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter

from data.config import DataConfig
from engine.config import MachineConfig
from engine.run import start_machine
from engine.tasks.rebuild import rebuild_task
from utils.config.entry_point import Job, entry_point
from utils.config.schema import Strict
from utils.io.files import output_errors, write_json
from utils.io.weights import choose_weights
from utils.ranks import distributed
from utils.record.logging import get_logger
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


@entry_point("evaluate", EvaluateConfig)
def main(config: EvaluateConfig, job: Job) -> str:
    """Evaluate."""
    # ------------------------------------------------------------------------------------------ 1. Ranks and machine
    runtime = start_machine(config.runtime)

    # --------------------------------------------------------------------------------- 2. The task with those weights
    run_dir = Path(config.run_dir)
    saved = read_run_config(run_dir)
    path = choose_weights(config.run_dir, config.weights)
    rebuilt = rebuild_task(path)
    task = rebuilt.task.to(runtime.device)
    if runtime.channels_last:
        task.to(memory_format=torch.channels_last)

    # ----------------------------------------------------------------------------------------------- 3. The run's data
    data = rebuilt.kind.open_data(
        TypeAdapter(DataConfig).validate_python(saved["data"]), rebuilt.setup.model, runtime,
        seed=saved["seed"], batch_size=config.batch_size, run_path=None,
    )  # fmt: skip
    loaders = rebuilt.kind.evaluation(data, rebuilt.setup, training=False)

    # ------------------------------------------------------------------------------------------------- 4. The result
    step = rebuilt.metadata["step"]
    with torch.inference_mode(), runtime.autocast():
        tracked = {name: track(loader, len(loader), f"evaluating {name}") for name, loader in loaders.items()}
        report = task.evaluate(tracked, step)
    if distributed.is_main():
        output = run_dir / "metrics.json" if config.output is None else Path(config.output)
        with output_errors("output", output):
            write_json(output, {"weights": str(path), "step": step, **report.scalars})
        write_report(run_dir, report.tables, report.images, prefix="evaluate_")
        log.info("wrote %s", output)
    line = "  ".join(f"{name}={value:.4f}" for name, value in report.scalars.items())
    log.info("%s", line)
    return line


if __name__ == "__main__":
    main()
