"""`train`, the main function of every training script: from a configuration to a finished run.

How a run begins. The order matters: a step reads only what earlier steps have settled.

1. The ranks meet, and the machine settles the keys that are `auto`. Unset keys of the model come from its weights.
2. The collection is indexed. Its facts (classes, vocabulary, buckets) and, with `loop.minutes`, the recipe follow.
3. The task is built from the seed and takes its initial weights, unless the run folder has a checkpoint; then come the
   streams, which may fill caches. A dry run ends here.
4. Layers are fitted to the data, in a new run.
5. The run folder is opened, the checkpoint restored, and the updates begin.
"""

import shlex
from dataclasses import replace

from data.open import Data
from engine.config import TrainingConfig
from engine.recipe.settle import settle
from engine.recipe.validity import list_findings
from engine.run.checkpoint import will_resume
from engine.run.clock import Stages
from engine.run.start import build_task, describe_run, open_run
from engine.tasks.kind import open_kind
from utils.config.command_line import Job
from utils.contracts import InitFrom
from utils.io.files import output_errors, refuse_links_out
from utils.ranks import distributed
from utils.record.logging import log
from utils.record.report import write_report


def train(config: TrainingConfig, job: Job) -> str | None:
    """Train the task named by `task`; the same command resumes. Returns the summary of a dry run."""
    # ---------------------------------------------------------------------- 1. Ranks, machine, collection and recipe
    stages = Stages()
    kind = open_kind(config.task.name)
    config, job, runtime, collection, path = settle(config, job, kind, stages)
    stages.end("plan")

    # --------------------------------------------------------------------------------------------------- 2. The data
    resumes = distributed.rank_zero_call(lambda: will_resume(config, path))
    setup = kind.set_up(config, collection)
    source = kind.source(collection, config.data, setup, repeats=True)
    fill_batch = 4 if config.loop.micro_batch_size == "auto" else config.loop.micro_batch_size
    data = Data(
        collection,
        source,
        runtime,
        seed=config.seed,
        batch_size=fill_batch,
        run_path=path,
        dry_run=config.dry_run,
    )

    # ------------------------------- 3. The task and its initial weights, before its streams, which may fill caches
    task = build_task(lambda: kind.build(setup), config)
    if not resumes:
        task.initialise(None if config.init_from is None else InitFrom(config.init_from, config.init_weights))
    streams = replace(kind.streams(data, setup, config), findings=list_findings(config, collection, runtime))
    plan = describe_run(task, streams, config, job, path, runtime)
    if config.dry_run:
        if distributed.is_main():
            from engine.run.first_samples import draw_first_samples

            refuse_links_out("run_dir", path)
            with output_errors("run_dir", path):
                tables = {name: list_rows() for name, list_rows in streams.tables.items()}
                write_report(path, tables, {"samples_seen": draw_first_samples(task, streams, plan, config)})
        length = f"{plan.total_steps} steps" if config.loop.minutes is None else f"{config.loop.minutes:g} minutes"
        listed = "".join(f", tables/{name}.csv" for name in streams.tables)
        return f"dry run: {length}; wrote {path}/plots/samples_seen.png{listed} and nothing else"

    # -------------------------------------------------------------------------------- 4. Layers fitted to the data
    finish = kind.prepare(task, data, setup, config, runtime, is_new=not resumes)

    # ----------------------------------------------------------------------------------------------- 5. The training
    words = shlex.join([f"data={config.data.name}", f"data.root={config.data.root}"])
    commands = kind.commands(setup, streams, collection)
    with open_run(task, streams, plan, config, job, path, runtime) as run:
        if distributed.is_main():
            with output_errors("run_dir", path):
                kind.write(path, setup)
        run.evaluator.finish = finish
        if config.loop.minutes is not None:
            from engine.run.pace import Pace

            run.pace = Pace(run)
        log.debug("%s", stages.end("task"))
        run.fit([line.replace("{run}", shlex.quote(str(path))).replace("{data}", words) for line in commands])
    return None
