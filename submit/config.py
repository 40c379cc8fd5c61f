"""The shape of `launch`: a SLURM job. Values are in conf/launch/slurm.yaml."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from utils.config.schema import Strict

Count = Annotated[int, Field(ge=1)]
# What submitit and this room set themselves.
_OWN_LINES = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "partition", "account", "qos", "constraint",
    "cpus-per-task", "mem", "time", "signal", "output", "error", "open-mode", "array", "requeue", "chdir", "wckey",
}  # fmt: skip


class LaunchConfig(Strict):
    """A script, the resources of its job, and what to do after queueing it.

    ranks_per_node: null takes one for each GPU, and 1 without GPUs. start: a SLURM task for each rank (srun), or one
    for each node, whose torchrun starts the ranks. stop_before_end_sec: a job is asked to save this long before its
    time ends. max_requeues: time limits that a job may reach before it is not continued; preemptions do not count.
    max_lost_ranks: the same for ranks and nodes that are lost.
    """

    script: Literal["train", "pretrain_fcmae", "finetune", "evaluate", "predict", "export", "prepare"]
    folder: str
    job_name: str | None
    nodes: Count
    gpus_per_node: Annotated[int, Field(ge=0)]
    ranks_per_node: Count | None
    start: Literal["srun", "torchrun"]
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    cpus_per_rank: Count | None
    memory_gib: Annotated[float, Field(gt=0)] | None
    time_min: Count
    stop_before_end_sec: Annotated[int, Field(ge=1, le=65535)]
    max_requeues: Annotated[int, Field(ge=0)]
    max_lost_ranks: Annotated[int, Field(ge=0)]
    array_parallelism: Count
    python: str | None
    container: str | None
    container_with: Literal["apptainer", "pyxis"]
    container_mounts: list[str]
    setup: list[str]
    sbatch_lines: list[str]
    wait: bool
    follow: bool
    dry_run: bool

    @field_validator("sbatch_lines")
    @classmethod
    def _are_options(cls, lines: list[str]) -> list[str]:
        for line in lines:
            found = re.fullmatch(r"--([a-z][a-z-]*)(=.*)?", line)
            if found is None:
                raise ValueError(f"{line!r} is no option of sbatch; give --NAME or --NAME=VALUE (--exclude=node7)")
            if found.group(1) in _OWN_LINES:
                raise ValueError(f"--{found.group(1)} is set by another key of launch; remove it here")
        return lines
