"""The status with which a rank ends, for a job whose launcher hides it: torchrun ends with 1 for any other than 0."""

import os
from pathlib import Path

from utils.errors import EXIT_LOST_RANK, EXIT_STOPPED
from utils.io.files import ignore_write_errors

STATUS_VARIABLE = "ATELIER_STATUS_FILE"


def note_status(status: int) -> None:
    """Write a status after which the same command continues to the file that STATUS_VARIABLE names, if it is set."""
    name = os.environ.get(STATUS_VARIABLE)
    if name and status in (EXIT_STOPPED, EXIT_LOST_RANK):
        with ignore_write_errors(Path(name)):
            Path(name).write_text(str(status))


def noted_status(file: Path, status: int) -> int:
    """Return the status that a rank has noted in `file`, or `status`, its launcher's, where none has."""
    return int(file.read_text()) if status != 0 and file.exists() else status
