"""progress.json: what a run says of itself, every few seconds and at its end, to sweeps, SLURM and the page.

{"state": "running", "step": 120, "total_steps": 1000, "left_sec": 84.2}
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.io.files import ignore_write_errors, read_json, write_atomically

PROGRESS_FILE = "progress.json"
NOTE_VARIABLE = "ATELIER_RUN_NOTE"  # a file in which a run writes its folder, for the SLURM job that may requeue it
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
