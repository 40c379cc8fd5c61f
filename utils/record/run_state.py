"""What a run is, and what it says of itself while it trains: one vocabulary for sweeps, SLURM and the page.

    progress.json    {"state": "running", "step": 120, "total_steps": 1000, "left_sec": 84.2}

A run writes it every few seconds and at its end; submit/job.py changes the state of a run whose job it requeues.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.io.files import ignore_write_errors, read_json, write_atomically, write_text

PROGRESS_FILE = "progress.json"
NOTE_VARIABLE = "ATELIER_RUN_NOTE"  # set by a SLURM job: a file in which its run writes its folder
# failed: it has ended with an error. dead: its process has vanished, by a kill or with its machine.
STATES = ("running", "requeued", "failed", "dead", "stopped", "finished")


def read_progress(path: Path) -> dict[str, Any]:
    """Return what a run has said last; nothing for a run of an older release or a damaged file."""
    with suppress(OSError, ValueError):
        found = read_json(path / PROGRESS_FILE)
        return found if isinstance(found, dict) else {}
    return {}


def write_progress(path: Path, state: str, **figures: float | None) -> None:
    """Write a run's state; figures that are not given stay. Write errors are logged."""
    with ignore_write_errors(file := path / PROGRESS_FILE):
        text = json.dumps({**read_progress(path), **figures, "state": state})
        write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"), flush=False)


def note_run(path: Path) -> None:
    """Tell the SLURM job around this process, if any, which folder its run has."""
    if note := os.environ.get(NOTE_VARIABLE):
        with ignore_write_errors(Path(note)):
            write_text(Path(note), str(path.absolute()))


def mark_requeued(note: Path) -> None:
    """Mark the run of a SLURM job that will continue it. A job that did not come to its run has no note."""
    with suppress(OSError):
        write_progress(Path(note.read_text(encoding="utf-8")), "requeued")
