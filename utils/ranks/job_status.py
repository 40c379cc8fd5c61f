"""How each rank of a job has ended. Its launcher may hide that: torchrun ends with 1 for any status but 0."""

import os
from contextlib import suppress
from pathlib import Path

from utils.errors import EXIT_CRASH, EXIT_LOST_RANK, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR
from utils.io.files import ignore_write_errors, write_text
from utils.record.logging import environment_rank

STATUS_VARIABLE = "ATELIER_STATUS_FOLDER"


def note_status(status: int) -> None:
    """Write this rank's status into the folder that STATUS_VARIABLE names, if it is set."""
    name = os.environ.get(STATUS_VARIABLE)
    if name:
        _note(Path(name) / str(environment_rank()), status)


def note_task(folder: Path, task: int, status: int) -> None:
    """Write how the script of a task has ended: its ranks may have failed before they could note it."""
    _note(folder / f"task_{task}", status)


def _note(file: Path, status: int) -> None:
    with ignore_write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{status}\n")


def _noted(folder: Path) -> set[int]:
    """Return the statuses in a folder, without those that are being written."""
    found = set()
    for file in folder.glob("[!.]*"):
        with suppress(FileNotFoundError, ValueError):
            found.add(int(file.read_text()))
    return found


def some_rank_failed(folder: Path) -> bool:
    """Return whether a rank or task has noted a failure: it was neither complete, nor stopped, nor lost."""
    return bool(_noted(folder) - {EXIT_OK, EXIT_STOPPED, EXIT_LOST_RANK})


def judge_status(folder: Path, status: int) -> int:
    """Return the status of a job: of what its ranks have noted in `folder`, or `status`, that of the launcher.

    A rank that fails takes the others with it, which then miss it: so its status is worth more than theirs.
    """
    if status == EXIT_OK:  # torchrun may have restarted ranks that failed
        return status
    noted = _noted(folder) - {EXIT_OK}
    failures = sorted(noted - {EXIT_LOST_RANK, EXIT_STOPPED})
    ranked = (EXIT_USER_ERROR, EXIT_CRASH, *failures, EXIT_LOST_RANK, EXIT_STOPPED)
    return next((one for one in ranked if one in noted), status)
