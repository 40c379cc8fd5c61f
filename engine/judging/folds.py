"""Cross-validation of a whole training: a run of the same recipe without each fold, measured on the fold."""

import shutil
from pathlib import Path

import numpy as np

from engine.task import Report
from utils.config.help import ROOT
from utils.config.sweep import parse_sweep, run_jobs
from utils.errors import UserError
from utils.record.run_reader import RunReader


def judge_folds(run: RunReader, folds: int) -> Report:
    """Make the runs that are missing, in RUN/folds, and return the figures of their last weights on their folds.

    A figure is the mean over all images. The table `folds` has a row for each fold. Raises UserError (`folds`).
    """
    script = str(ROOT / f"{run.config['script']}.py")
    values = ",".join(f"[{number},{folds}]" for number in range(1, folds + 1))
    words = [f"data.validation_fraction={values}", f"run_dir={run.path}/folds", "loop.evaluate_every_epochs=1e9"]
    sweep = parse_sweep([*sorted(run.settings), *words])  # evaluated at the end alone: a fold chooses no weights
    jobs = [*sweep.jobs()]
    for job in jobs:  # with minutes.json alone, which gives them the plan and the steps of the run
        shutil.copytree(run.path, job.folder, ignore=shutil.ignore_patterns("[!m]*", "me*"), dirs_exist_ok=True)
    if any(run_jobs(jobs, sweep.settings, script).values()):
        raise UserError("folds: a run has failed; its message is above")
    rows = [RunReader(Path(job.folder)).result["figures"] for job in jobs]
    images = [row["samples"] for row in rows]
    means = {name: np.average([row[name] for row in rows], weights=images) for name in rows[0]}
    return Report({**means, "samples": sum(images)}, {"folds": rows})
