"""What SLURM says of jobs: by squeue and scontrol, which need no accounting."""

import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress

# A job in one of these states may still run.
ACTIVE = {
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "STOPPED",
    "RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING", "RESV_DEL_HOLD",
}  # fmt: skip
_UNKNOWN_JOB = "Invalid job id"
_ANSWER_SEC = 60


class NoAnswer(Exception):
    """SLURM's controller does not answer, such as while it is restarted; the message has its words."""


def show(what: str, name: str) -> str:
    """Return what `scontrol show` prints; empty where SLURM does not know the job (any more). Raises NoAnswer."""
    return _ask("scontrol", "--oneliner", "show", what, name)


def requeue(job: str) -> bool:
    """Put a job back into the queue; returns whether SLURM has done it."""
    try:
        _ask("scontrol", "requeue", job)
    except NoAnswer:
        return False
    return True


def forbid_requeue(job: str) -> None:
    """Let SLURM not requeue a job, which it would do where a node has failed."""
    with suppress(NoAnswer):
        _ask("scontrol", "update", f"JobId={job}", "Requeue=0")


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SEC)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]} has not answered within {_ANSWER_SEC} s") from None
    if done.returncode != 0 and _UNKNOWN_JOB not in done.stderr:
        raise NoAnswer(" ".join(done.stderr.split()))
    return done.stdout


def is_running(job: str) -> bool:
    """Return whether a job runs, and is not being ended; where SLURM does not answer it is taken to."""
    try:
        found = re.search(r"\bJobState=(\w+)", show("job", job))
    except NoAnswer:
        return True
    return found is None or found.group(1) == "RUNNING"


def list_states(jobs: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return job -> (state, reason), such as (PENDING, Resources), of those that SLURM knows. Raises NoAnswer.

    jobs: one, or the members NUMBER_INDEX of one array.
    """
    number, wanted = jobs[0].partition("_")[0], set(jobs)
    lines = _ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={number}", "--format=%i|%T|%r")
    found = (line.split("|", 2) for line in lines.splitlines())
    return {job: (state, reason) for job, state, reason in found if job in wanted}
