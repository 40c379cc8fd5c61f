"""Wait for jobs: by squeue and the files that the jobs leave, since not every cluster has accounting."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from submit.job import end_file
from submit.queue import ACTIVE, NoAnswer, list_states
from utils.errors import EXIT_CRASH
from utils.io.files import read_json
from utils.record.logging import get_logger

log = get_logger(__name__)

_LOOK_SEC = 2.0
_FILES_SEC = 30.0  # for a shared file system to show what a node has written
_UNKNOWN = ("unknown to SLURM", "no reason")


class _Tail:
    """The log of a job's first task, shown as it grows."""

    def __init__(self, file: Path) -> None:
        self._file, self._place = file, 0

    def show(self) -> None:
        """Print what was added."""
        if self._file.exists():
            with open(self._file, "rb") as stream:
                stream.seek(self._place)
                text = stream.read()
            self._place += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()


def wait_for(ids: Sequence[str], folder: Path, *, follow: bool) -> int:
    """Wait until all jobs have ended; returns the greatest of their exit statuses.

    Raises SystemExit(130) on Ctrl-C, which leaves the jobs running.
    """
    tails = [_Tail(folder / "logs" / f"{job}_0_log.out") for job in ids] if follow else []
    try:
        states = _watch(ids, tails)
    except KeyboardInterrupt:
        log.warning("the jobs go on without being watched; scancel %s ends them", ids[0].partition("_")[0])
        raise SystemExit(130) from None
    for tail in tails:
        tail.show()
    return max(_end_of(job, states[job], folder, index) for index, job in enumerate(ids))


def _watch(ids: Sequence[str], tails: Sequence[_Tail]) -> dict[str, tuple[str, str]]:
    """Return the last state and reason of each job, when none is active any more."""
    states: dict[str, tuple[str, str]] = {}
    silent = False
    while True:
        try:
            found = list_states(ids)
            silent = False
        except NoAnswer as error:
            if not silent:
                log.warning("SLURM does not answer, and is asked again: %s", error)
            silent = True
        else:
            for job in ids:
                now = found.get(job, _UNKNOWN)
                state, reason = now
                if state in ACTIVE and state != states.get(job, _UNKNOWN)[0]:
                    log.info("job %s: %s%s", job, state, f" ({reason})" if state == "PENDING" else "")
                states[job] = now
            if not any(state in ACTIVE for state, _ in states.values()):
                return states
        for tail in tails:
            tail.show()
        time.sleep(_LOOK_SEC)


def _end_of(job: str, last: tuple[str, str], folder: Path, index: int) -> int:
    """Return a job's exit status: the script's, or 1 where SLURM has ended it."""
    state, reason = last
    file, until = end_file(folder, index), time.monotonic() + _FILES_SEC
    while state in (_UNKNOWN[0], "COMPLETED", "FAILED") and not file.exists() and time.monotonic() < until:
        time.sleep(0.5)
    if file.exists():
        end = read_json(file)
        log.info("job %s has ended with status %d, after %d restarts", job, end["status"], end["restarts"])
        return end["status"] if end["status"] >= 0 else 128 - end["status"]
    log.error("job %s has ended as %s (%s) before its script did", job, state, reason)
    return EXIT_CRASH
