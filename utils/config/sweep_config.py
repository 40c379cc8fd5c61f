"""The schema of `sweep`, and the flags of a --multirun."""

from utils.config.bounds import CountOrZero, Some
from utils.config.schema import PathText, Strict

FLAGS = {"--multirun", "-m"}


class SweepConfig(Strict):
    """A sweep, with its run folders in outputs/sweeps/<name>/."""

    name: PathText
    gpus: Some[CountOrZero] | None  # a job at a time for each
    wandb: PathText | None  # a file for `wandb sweep`, written in place of the jobs
