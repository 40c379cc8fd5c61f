"""The shape of `launch`: a SLURM job. Values are in conf/launch/slurm.yaml."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from utils.config.bounds import Count, CountOrZero, Processes, Workers
from utils.config.help import CONF, ROOT
from utils.config.schema import PathText, Strict

# The files at the root that have a primary file in conf/.
SCRIPTS = sorted(file.stem for file in ROOT.glob("*.py") if (CONF / f"{file.stem}.yaml").is_file())
Script = Literal[*SCRIPTS]


class LaunchConfig(Strict):
    """A script, the resources of its job, and what to do after queueing it.

    ranks_per_node: null takes one for each GPU, and 1 without GPUs. stop_before_end_sec: a job is asked to save this
    long before its time ends. max_requeues, max_lost_ranks: how often a job that was stopped, or lost a rank or a node,
    is continued. command: what runs the script in place of `python`, such as a container's words; our part of the job
    runs outside.
    """

    script: Script
    folder: PathText
    job_name: str | None
    nodes: Count
    gpus_per_node: Workers
    ranks_per_node: Processes | None
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
    command: Annotated[list[str], Field(min_length=1)] | None
    setup: list[str]
    sbatch_lines: list[str]
    wait: bool
    dry_run: bool

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if 0 < self.gpus_per_node < self.ranks_on_node:
            raise ValueError(
                f"launch.ranks_per_node: {self.ranks_on_node} ranks need a GPU each; "
                f"launch.gpus_per_node is {self.gpus_per_node}"
            )
        if self.stop_before_end_sec >= 60 * self.time_min:
            raise ValueError(f"launch.stop_before_end_sec: must be below launch.time_min, {60 * self.time_min} s")
        if self.nodes * self.ranks_on_node > 1 and "runtime" not in self._primary:
            raise ValueError(
                f"launch.script: {self.script}.py is one process; set launch.nodes=1 launch.ranks_per_node=1"
            )
        return self

    @property
    def _primary(self) -> str:
        return (CONF / f"{self.script}.yaml").read_text(encoding="utf-8")

    @property
    def ranks_on_node(self) -> int:
        """The ranks of a node: one for each GPU, or 1, where no number is given."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def trains(self) -> bool:
        """Whether the script saves when it is asked to stop, and continues."""
        return "  - common\n" in self._primary
