"""Query SLURM jobs by squeue and scontrol, which need no accounting database, and wait for their end."""

import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from utils.errors import EXIT_CRASH, EXIT_INTERRUPTED
from utils.io.files import read_json
from utils.record.logging import get_logger

log = get_logger(__name__)

_ANSWER_SEC = 60
_LOOK_SEC = 2.0
_FILES_SEC = 30.0  # for a shared file system to show what a node has written


class NoAnswer(Exception):
    """SLURM's controller does not answer, for example during a restart. The message is the command's error."""


def ask(*command: str) -> str:
    """Return the output of a SLURM command; empty if SLURM does not know the job (any more). Raises NoAnswer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SEC)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]} has not answered within {_ANSWER_SEC} s") from None
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise NoAnswer(" ".join(done.stderr.split()))
    return done.stdout


def job_state(job: str) -> str:
    """Return a job's state, such as RUNNING; UNKNOWN if SLURM does not know the job (any more). Raises NoAnswer."""
    found = re.search(r"\bJobState=(\w+)", ask("scontrol", "--oneliner", "show", "job", job))
    return "UNKNOWN" if found is None else found.group(1)


def list_active(jobs: Sequence[str]) -> dict[str, str]:
    """Return {job: state} of the jobs that have not ended, with the reason if a job is pending. Raises NoAnswer.

    jobs: one job, or the members NUMBER_INDEX of one array.
    """
    number = jobs[0].partition("_")[0]
    active = {}
    for line in ask("squeue", "-h", "--array", f"--jobs={number}", "--format=%i|%T|%r").splitlines():
        job, state, reason = line.split("|", 2)
        if job in jobs:
            active[job] = f"{state} ({reason})" if state == "PENDING" else state
    return active


def wait_for(ids: Sequence[str], folder: Path) -> int:
    """Wait until all jobs have ended and return their greatest exit status.

    Ctrl-C raises SystemExit(130) and leaves the jobs running.
    """
    before: dict[str, str] = {}
    active = dict.fromkeys(ids, "")
    try:
        while active:
            time.sleep(_LOOK_SEC)
            try:
                active = list_active(ids)
            except NoAnswer as error:
                log.warning("SLURM does not answer (%s); retrying", error)
            for job, state in active.items():
                if before.get(job, "") != state:
                    log.info("job %s: %s", job, state)
            before |= active
    except KeyboardInterrupt:
        log.warning("the jobs continue unwatched; end them with scancel %s", ids[0].partition("_")[0])
        raise SystemExit(EXIT_INTERRUPTED) from None
    return max(_end_of(job, folder / f"end_{index}.json") for index, job in enumerate(ids))


def _end_of(job: str, file: Path) -> int:
    """Return a job's exit status: the script's, or 1 if SLURM ended the job."""
    until = time.monotonic() + _FILES_SEC
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.5)
    if not file.exists():
        log.error("SLURM has ended job %s before its script did; `scontrol show job %s` tells why", job, job)
        return EXIT_CRASH
    end = read_json(file)
    log.info("job %s has ended with status %d, after %d restarts", job, end["status"], end["restarts"])
    return end["status"]
