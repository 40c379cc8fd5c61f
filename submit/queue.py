"""What SLURM says of jobs: by squeue and scontrol, which need no accounting."""

import re
import subprocess

# A job in one of these states may still run.
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "STOPPED"}
ACTIVE = WAITING | {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"}


def show(what: str, name: str) -> str:
    """Return what `scontrol show` prints; empty where SLURM does not know the name (any more)."""
    done = subprocess.run(["scontrol", "--oneliner", "show", what, name], capture_output=True, text=True, timeout=60)
    return done.stdout if done.returncode == 0 else ""


def job_state(job: str) -> str | None:
    """Return the state of a job, such as RUNNING; None where SLURM does not know it (any more)."""
    found = re.search(r"\bJobState=(\w+)", show("job", job))
    return found and found.group(1)


def job_reason(job: str) -> str:
    """Return why a job waits or has ended, as SLURM says it."""
    found = re.search(r"\bReason=(\S+)", show("job", job))
    return found.group(1) if found else "unknown"
