"""From `launch` to a job in the queue: submitit's executor with our settings, its sbatch script, SLURM's refusals."""

import contextlib
import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from submit.config import LaunchConfig
from submit.job import ScriptJob
from utils.errors import UserError

# What SLURM says, and the key that is most likely wrong.
_KEYS = {
    "account": "account", "partition": "partition", "qos": "qos", "feature": "constraint", "time limit": "time_min",
    "memory": "memory_gib", "cpu": "cpus_per_rank", "generic resource": "gpus_per_node", "gres": "gpus_per_node",
    "node configuration": "nodes", "node count": "nodes", "processors": "nodes", "unrecognized option": "sbatch_lines",
}  # fmt: skip


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
    executor = _Executor(folder / "logs", max_num_timeout=launch.max_requeues, python=_python(launch, folder))
    options = (line.removeprefix("--").partition("=") for line in launch.sbatch_lines)
    lines = {name: value or True for name, _, value in options}
    values: dict[str, Any] = {
        "job_name": launch.job_name or launch.script,
        "nodes": launch.nodes,
        "ntasks_per_node": 1 if launch.start == "torchrun" else ranks_on_node(launch),
        "gpus_per_node": launch.gpus_per_node or None,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "cpus_per_task": _cpus_per_task(launch),
        "mem": None if launch.memory_gib is None else f"{round(1024 * launch.memory_gib)}M",
        "time": launch.time_min,
        "signal_delay_s": launch.stop_before_end_sec,
        "array_parallelism": launch.array_parallelism,
        "setup": launch.setup or None,
        "stderr_to_stdout": True,
        "srun_args": _srun_arguments(launch, folder),
        # Its own copy of the code is found before the folder from which it is submitted.
        "additional_parameters": {"chdir": str(folder / "code"), "requeue": True, **lines},
    }
    executor.update_parameters(**{name: value for name, value in values.items() if value is not None})
    return executor


def ranks_on_node(launch: LaunchConfig) -> int:
    """Return the ranks of a node: one for each GPU, or 1, where no number is given."""
    return launch.ranks_per_node or max(1, launch.gpus_per_node)


def _cpus_per_task(launch: LaunchConfig) -> int | None:
    if launch.cpus_per_rank is None:
        return None
    return launch.cpus_per_rank * (ranks_on_node(launch) if launch.start == "torchrun" else 1)


def _mounts(folder: Path, launch: LaunchConfig) -> list[str]:
    return list(dict.fromkeys([str(Path.cwd()), str(folder), *launch.container_mounts]))


def _python(launch: LaunchConfig, folder: Path) -> str:
    """Return the interpreter of the nodes as a shell command."""
    inside = shlex.quote(launch.python or ("python" if launch.container else sys.executable))
    if launch.container is None or launch.container_with == "pyxis":
        return inside
    binds = " ".join(f"--bind {shlex.quote(mount)}" for mount in _mounts(folder, launch))
    gpus = "--nv " if launch.gpus_per_node else ""
    return f"apptainer exec {gpus}{binds} {shlex.quote(launch.container)} {inside}"


def _srun_arguments(launch: LaunchConfig, folder: Path) -> list[str]:
    if launch.container is None or launch.container_with == "apptainer":
        return []
    mounts = ",".join(f"{mount}:{mount}" for mount in _mounts(folder, launch))
    return [
        f"--container-image={launch.container}", f"--container-mounts={mounts}",
        f"--container-workdir={folder / 'code'}",
    ]  # fmt: skip


def queue_jobs(launch: LaunchConfig, folder: Path, jobs: Sequence[ScriptJob]) -> list[str]:
    """Queue the jobs, several as one array; returns SLURM's numbers. Raises UserError where SLURM refuses."""
    executor = make_executor(launch, folder)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return [job.job_id for job in executor.submit_array(jobs)]
    except FileNotFoundError:
        raise UserError("launch: there is no sbatch here; submit on a login node of the cluster") from None
    except (FailedJobError, FailedSubmissionError) as error:
        said = " ".join(str(error).replace("sbatch: error:", "").split())
        key = next((key for word, key in _KEYS.items() if word in said.lower()), None)
        where, asked = ("launch", None) if key is None else (f"launch.{key}", getattr(launch, key))
        value = "" if asked is None else f" ({asked!r} was asked for)"
        raise UserError(f"{where}: SLURM refuses the job{value}: {said}") from None
