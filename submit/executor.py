"""From `launch` to a job in the queue: submitit's executor with our settings, its sbatch script, SLURM's refusals."""

import contextlib
import io
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from submit.config import LaunchConfig
from submit.job import ScriptJob
from utils.errors import UserError

# What SLURM says, and the key that is most likely wrong; the first that is found.
_KEYS = {
    "accounting/qos policy": None, "invalid account": "account", "partition": "partition", "qos": "qos",
    "feature": "constraint", "time limit": "time_min", "memory": "memory_gib", "generic resource": "gpus_per_node",
    "gres": "gpus_per_node", "cpu count": "cpus_per_rank", "node configuration": "nodes", "node count": "nodes",
    "processors": "nodes", "unrecognized option": "sbatch_lines",
}  # fmt: skip
# sbatch's variables would win over what the job's own script says.
_VARIABLES = {
    "partition": "SBATCH_PARTITION", "account": "SBATCH_ACCOUNT", "qos": "SBATCH_QOS",
    "constraint": "SBATCH_CONSTRAINT", "time_min": "SBATCH_TIMELIMIT", "gpus_per_node": "SBATCH_GPUS_PER_NODE",
    "memory_gib": "SBATCH_MEM_PER_NODE", "job_name": "SBATCH_JOB_NAME",
}  # fmt: skip
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class _Executor(submitit.SlurmExecutor):
    """submitit's executor, which can also be made where there is no SLURM, to print its script."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script_text(self, array_size: int) -> str:
        """Return the sbatch script; array_size: jobs of an array, 1 without one."""
        if array_size > 1:
            self.parameters["map_count"] = array_size
        text = self._make_submission_file_text(self._submitit_command_str, "")
        self.parameters.pop("map_count", None)
        return text


def make_executor(launch: LaunchConfig, folder: Path) -> _Executor:
    """Return the executor of a job whose files are in `folder`."""
    folder = folder.absolute()
    times = launch.max_requeues if launch.trains else 0  # the other scripts would only begin anew
    python = sys.executable if launch.container else launch.python or sys.executable
    executor = _Executor(folder / "logs", max_num_timeout=times, python=shlex.quote(python))
    cpus = _cpus_per_task(launch)
    options = (line.removeprefix("--").partition("=") for line in launch.sbatch_lines)
    lines = {name: value or True for name, _, value in options}
    values: dict[str, Any] = {
        "job_name": launch.job_name or launch.script,
        "nodes": launch.nodes,
        "ntasks_per_node": 1 if launch.start == "torchrun" else launch.ranks_on_node,
        "gpus_per_node": _gpus(launch),
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "cpus_per_task": cpus,
        "mem": None if launch.memory_gib is None else f"{round(1024 * launch.memory_gib)}M",
        "time": launch.time_min,
        "signal_delay_s": launch.stop_before_end_sec,
        "array_parallelism": launch.array_parallelism,
        "setup": launch.setup or None,
        "stderr_to_stdout": True,
        # srun does not take it from sbatch in SLURM 22.05 to 23.02.
        "srun_args": [] if cpus is None else [f"--cpus-per-task={cpus}"],
        # Its own copy of the code is found before the folder from which it is submitted.
        "additional_parameters": {"chdir": str(folder / "code"), "requeue": True, **lines},
    }
    executor.update_parameters(**{name: value for name, value in values.items() if value is not None}, wckey=None)
    return executor


def _cpus_per_task(launch: LaunchConfig) -> int | None:
    if launch.cpus_per_rank is None:
        return None
    return launch.cpus_per_rank * (launch.ranks_on_node if launch.start == "torchrun" else 1)


def _gpus(launch: LaunchConfig) -> str | int | None:
    if launch.gpu_type is None:
        return launch.gpus_per_node or None
    return f"{launch.gpu_type}:{launch.gpus_per_node}"


def container_words(launch: LaunchConfig, folder: Path) -> list[str] | None:
    """Return the words that run the python of a container in a job whose files are in `folder`; None without one."""
    if launch.container is None:
        return None
    mounts = dict.fromkeys([str(Path.cwd()), str(folder.absolute()), *launch.container_mounts])
    binds = [word for mount in mounts for word in ("--bind", mount)]
    gpus = ["--nv"] if launch.gpus_per_node else []
    return ["apptainer", "exec", *gpus, *binds, launch.container, launch.python or "python"]


@contextlib.contextmanager
def _clean_environment(launch: LaunchConfig) -> Iterator[None]:
    """Hide what a job around this process, a launcher, or the shell would add to what `launch` says."""
    before = dict(os.environ)
    hidden = {name for key, name in _VARIABLES.items() if getattr(launch, key) is not None}
    for name in before:
        of_a_job = name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")) and name != "SLURM_CONF"
        if of_a_job or name in _RANK_VARIABLES or name in hidden:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def queue_jobs(launch: LaunchConfig, folder: Path, jobs: Sequence[ScriptJob]) -> list[str]:
    """Queue the jobs, several as one array; returns SLURM's numbers. Raises UserError where SLURM refuses."""
    if shutil.which("sbatch") is None:
        raise UserError("launch: there is no sbatch here; submit on a login node of the cluster")
    executor = make_executor(launch, folder)
    try:
        with _clean_environment(launch), contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return [job.job_id for job in executor.submit_array(jobs)]
    except (FailedJobError, FailedSubmissionError) as error:
        said = " ".join(str(error).replace("sbatch: error:", "").split())
        key = next((key for word, key in _KEYS.items() if word in said.lower()), None)
        where, asked = ("launch", None) if key is None else (f"launch.{key}", getattr(launch, key))
        value = "" if asked is None else f" ({asked!r} was asked for)"
        raise UserError(f"{where}: SLURM refuses the job{value}: {said}") from None
