"""How each rank of a job has ended. Its launcher may hide that: torchrun ends with 1 for any status but 0."""

import os
from pathlib import Path

from utils.errors import EXIT_CRASH, EXIT_LOST_RANK, EXIT_STOPPED, EXIT_USER_ERROR
from utils.io.files import ignore_write_errors, write_text
from utils.record.logging import environment_rank

STATUS_VARIABLE = "ATELIER_STATUS_FOLDER"


def note_status(status: int) -> None:
    """Write this rank's status into the folder that STATUS_VARIABLE names, if it is set."""
    name = os.environ.get(STATUS_VARIABLE)
    if name:
        file = Path(name) / str(environment_rank())
        with ignore_write_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, f"{status}\n")


def judge_status(folder: Path, status: int) -> int:
    """Return the status of a job: of what its ranks have noted in `folder`, or `status`, that of the launcher.

    A rank that fails takes the others with it, which then miss it: so its status is worth more than theirs.
    """
    if status == 0:  # torchrun may have restarted ranks that failed
        return status
    noted = {int(text) for file in folder.glob("*") if (text := file.read_text().strip()).isdigit()}
    ranked = (EXIT_USER_ERROR, EXIT_CRASH, EXIT_LOST_RANK, EXIT_STOPPED)
    return next((one for one in ranked if one in noted), status)
