"""The schema of `sweep`, and the flags of a --multirun."""

from typing import Annotated

from pydantic import Field

from utils.config.bounds import CountOrZero
from utils.config.schema import PathText, Strict

FLAGS = {"--multirun", "-m"}


class SweepConfig(Strict):
    """A sweep, with its run folders in outputs/sweeps/<name>/."""

    name: PathText
    gpus: Annotated[list[CountOrZero], Field(min_length=1)] | None  # a job at a time for each
    wandb: PathText | None  # a file for `wandb sweep`, written in place of the jobs
