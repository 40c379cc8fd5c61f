"""The shape of `launch`: a SLURM job. Values are in conf/launch/slurm.yaml."""

import re
from typing import Annotated, Literal, Self

from omegaconf import OmegaConf
from pydantic import Field, field_validator, model_validator

from utils.config.bounds import Count, CountOrZero, Processes, Workers
from utils.config.help import CONF, ROOT
from utils.config.schema import PathText, Strict

# The files at the root that have a primary file in conf/.
SCRIPTS = sorted(file.stem for file in ROOT.glob("*.py") if (CONF / f"{file.stem}.yaml").is_file())
Script = Literal[*SCRIPTS]
# What submitit and this room set themselves, or what undoes it.
_OWN_LINES = {
    "job-name", "nodes", "ntasks", "ntasks-per-node", "tasks-per-node", "gpus-per-node", "gpus-per-task", "gpus",
    "partition", "account", "qos", "constraint", "cpus-per-task", "mem", "mem-per-cpu", "time", "signal", "output",
    "error", "open-mode", "array", "requeue", "no-requeue", "chdir",
}  # fmt: skip


class LaunchConfig(Strict):
    """A script, the resources of its job, and what to do after queueing it.

    gpu_type: as the cluster names it, such as a100; null takes any. ranks_per_node: null takes one for each GPU, and 1
    without GPUs. start: a SLURM task for each rank (srun), or one for each node, whose torchrun starts the ranks.
    stop_before_end_sec: a job is asked to save this long before its time ends. max_requeues: time limits that a job may
    reach before it is not continued; preemptions do not count. max_lost_ranks: the same for ranks and nodes that are
    lost.
    """

    script: Script
    folder: PathText
    job_name: str | None
    nodes: Count
    gpus_per_node: Workers
    gpu_type: str | None
    ranks_per_node: Processes | None
    start: Literal["srun", "torchrun"]
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    cpus_per_rank: Processes | None
    memory_gib: Annotated[float, Field(ge=1e-3, le=1e6)] | None
    time_min: Count
    stop_before_end_sec: Annotated[int, Field(ge=1, le=65535)]
    max_requeues: CountOrZero
    max_lost_ranks: CountOrZero
    array_parallelism: Count
    python: PathText | None
    container: PathText | None
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
                raise ValueError(f"--{found.group(1)} is set by launch itself; remove it here, and see its other keys")
        return lines

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if 0 < self.gpus_per_node < self.ranks_on_node:
            raise ValueError(
                f"launch.ranks_per_node: {self.ranks_on_node} ranks need a GPU each, and "
                f"launch.gpus_per_node={self.gpus_per_node}; lower the one or raise the other"
            )
        if self.gpu_type is not None and self.gpus_per_node == 0:
            raise ValueError("launch.gpu_type: no GPU is asked for; set launch.gpus_per_node")
        if self.stop_before_end_sec >= 60 * self.time_min:
            raise ValueError(
                f"launch.stop_before_end_sec: {self.stop_before_end_sec} s are all of launch.time_min={self.time_min}, "
                "so the job would be stopped as it starts; set it lower"
            )
        many = self.nodes * self.ranks_on_node
        if many > 1 and not (self.trains or "runtime" in _config_parts(self.script)):
            raise ValueError(
                f"launch.script: {self.script}.py is one process, and {many} are asked for; set launch.nodes=1 "
                "launch.ranks_per_node=1"
            )
        return self

    @property
    def ranks_on_node(self) -> int:
        """The ranks of a node: one for each GPU, or 1, where no number is given."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def trains(self) -> bool:
        """Whether the script saves when it is asked to stop, and continues."""
        return "common" in _config_parts(self.script)


def _config_parts(script: str) -> set[str]:
    """Return the keys and the groups of a script's primary file."""
    values = OmegaConf.load(CONF / f"{script}.yaml")
    groups = {part if isinstance(part, str) else next(iter(part)) for part in values.defaults}
    return groups | {str(key) for key in values}
