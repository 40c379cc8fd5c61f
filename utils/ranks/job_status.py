"""How each rank of a job has ended, which its launcher may hide: torchrun ends with 1 for any status but 0. And what
SLURM's variables say of the job.
"""

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from utils.errors import EXIT_CRASH, EXIT_LOST_RANK, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR
from utils.io.files import ignore_write_errors, write_text
from utils.record.logging import environment_rank

STATUS_VARIABLE = "ATELIER_STATUS_FOLDER"
SWEEP_VARIABLE = "ATELIER_SWEEP"  # the name of the sweep that a job is of
_FIRST, _COUNT = 10_000, 20_000  # ports below 32768, where Linux begins to give them to any program that asks


def note_status(status: int) -> None:
    """Write this rank's status into the folder that STATUS_VARIABLE names, if it is set."""
    if name := os.environ.get(STATUS_VARIABLE):
        note(Path(name) / str(environment_rank()), status)


def note(file: Path, status: int) -> None:
    """Write a status into a file; a write error is a warning."""
    with ignore_write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{status}\n")


def judge_status(folder: Path, status: int) -> int:
    """Return the status of a job: of what its ranks have noted in `folder`, or `status`, that of the launcher."""
    if status == EXIT_OK:  # torchrun may have restarted ranks that failed
        return status
    noted = set()
    for file in folder.glob("[!.]*"):
        with suppress(FileNotFoundError, ValueError):  # it is being written
            noted.add(int(file.read_text()))
    return worst(noted - {EXIT_OK} or {status})


def worst(statuses: Collection[int]) -> int:
    """Return the status that says most: a rank that fails takes the others with it, which then miss it."""
    others = sorted(set(statuses) - {EXIT_OK, EXIT_LOST_RANK, EXIT_STOPPED})
    ranked = (EXIT_USER_ERROR, EXIT_CRASH, *others, EXIT_LOST_RANK, EXIT_STOPPED, EXIT_OK)
    return next(status for status in ranked if status in statuses)


def slurm_port(environment: Mapping[str, str]) -> int:
    """Return a port for the ranks to meet: the same on all tasks of a step, another one for the next step or job."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _FIRST + (job + 1009 * step) % _COUNT


def restart_count() -> int:
    """Return how often the job was requeued, 0 without SLURM."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
