"""The shape of `launch`: a SLURM job. Values are in conf/launch/slurm.yaml."""

from typing import Literal, Self

from pydantic import model_validator

from utils.config.bounds import Count, CountOrZero, Some, between
from utils.config.help import CONF, ROOT
from utils.config.schema import PathText, Strict

# The root scripts with a primary file in conf/.
SCRIPTS = sorted(file.stem for file in ROOT.glob("*.py") if (CONF / f"{file.stem}.yaml").is_file())
Script = Literal[*SCRIPTS]


class LaunchConfig(Strict):
    """A script, the resources of its job, and its limits."""

    script: Script
    folder: PathText
    nodes: Count
    gpus_per_node: CountOrZero
    ranks_per_node: Count | None  # null: one for each GPU, 1 without GPUs
    cpus_per_rank: Count | None
    time_min: Count
    stop_before_end_sec: between(int, 1, 65535)  # before the job's time ends, it is asked to save
    max_requeues: CountOrZero  # how often a stopped job continues
    max_lost_ranks: CountOrZero  # how often a job continues that has lost a rank or a node
    python: PathText | None
    command: Some[str] | None  # runs the script in place of python, e.g. a container
    setup: list[str]
    sbatch: dict[str, bool | int | str] | None  # further options by name
    dry_run: bool

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if 0 < self.gpus_per_node < self.ranks_on_node:
            gpus = f"launch.gpus_per_node is {self.gpus_per_node}"
            raise ValueError(f"launch.ranks_per_node: {self.ranks_on_node} ranks need a GPU each; {gpus}")
        if self.stop_before_end_sec >= 60 * self.time_min:
            raise ValueError(f"launch.stop_before_end_sec: must be below launch.time_min, {60 * self.time_min} s")
        if self.nodes * self.ranks_on_node > 1 and "runtime" not in self._primary:
            raise ValueError(
                f"launch.script: {self.script}.py is one process; set launch.nodes=1 launch.ranks_per_node=1"
            )
        return self

    @property
    def _primary(self) -> str:
        return (CONF / f"{self.script}.yaml").read_text("utf-8")

    @property
    def ranks_on_node(self) -> int:
        """The number of ranks on each node."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def trains(self) -> bool:
        """Whether the script is a training, which saves on request and resumes."""
        return "  - common\n" in self._primary
