"""The `main` of every training script: from a checked configuration to a trained run."""

import shlex

from engine.config import TrainingConfig
from engine.run import build_task, run_path, run_training, start_ranks
from engine.tasks.kinds import KINDS
from utils.config.entry_point import Job


def train(config: TrainingConfig, job: Job) -> str:
    """Train what `task` names; the same command resumes. Returns a line with the result."""
    # ------------------------------------------------------------------------------------------ 1. Ranks and machine
    runtime = start_ranks(config)
    kind = KINDS[config.task.name]
    config = kind.pipeline.complete(config)

    # --------------------------------------------------------------------------------------------------- 2. The data
    data = kind.pipeline.open_training(config, runtime, run_path(config, job))
    setup = kind.set_up(config, data.collection)
    streams = kind.pipeline.streams(data, setup, config)

    # --------------------------------------------------------------------------------------------------- 3. The task
    task = build_task(lambda: kind.build(setup), config)

    # ----------------------------------------------------------------------------------------------- 4. The training
    # A new run loads init_from, then prepares what depends on the data, such as a fitted head.
    words = shlex.join([f"data={config.data.name}", f"data.root={config.data.root}"])
    next_commands = [line.format(run=run_path(config, job), data=words) for line in kind.next_commands]
    return run_training(
        task, streams, config, job, runtime, prepare=lambda: kind.prepare(task, data, setup, config, runtime),
        next_commands=next_commands,
    )  # fmt: skip
