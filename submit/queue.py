"""What SLURM says of jobs: by squeue and scontrol, which need no accounting."""

import re
import subprocess

# A job in one of these states may still run.
ACTIVE = {
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "STOPPED", "RUNNING",
    "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING",
}  # fmt: skip


def show(what: str, name: str) -> str:
    """Return what `scontrol show` prints; empty where SLURM does not know the name (any more), or does not answer."""
    return _ask("scontrol", "--oneliner", "show", what, name) or ""


def requeue(job: str) -> bool:
    """Put a job back into the queue; returns whether SLURM has done it."""
    return _ask("scontrol", "requeue", job) is not None


def _ask(*command: str) -> str | None:
    """Return what a command of SLURM prints, None where it fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None


def job_state(job: str) -> str | None:
    """Return the state of a job, such as RUNNING; None where SLURM does not know it (any more)."""
    found = re.search(r"\bJobState=(\w+)", show("job", job))
    return found and found.group(1)


def job_reason(job: str) -> str:
    """Return why a job waits or has ended, as SLURM says it."""
    found = re.search(r"\bReason=(\S+)", show("job", job))
    return found.group(1) if found else "unknown"
