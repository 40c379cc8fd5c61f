"""The part of a job that runs on the nodes.

Each SLURM task runs the script as a process. After all tasks, the batch script runs `python -m submit.job FOLDER
STATUS`, which requeues a job that was stopped or has lost a rank. A task exits with its script's status, but with 0 if
the script was stopped: on a failure SLURM would kill the other tasks, which may still be saving.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from utils.errors import EXIT_LOST_RANK, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR
from utils.io.files import ignore_write_errors, read_json, write_json, write_text
from utils.record.logging import restart_count
from utils.record.run_reader import NOTE_VARIABLE, write_progress

_ANSWER_SEC = 60
_RETRY_SEC = 5.0
_PATIENCE_SEC = 600  # for SLURM to end a job
# Signals that end a script: a request before its handler was set, or a kill (by the kernel if memory is full).
_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_KILLING = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)


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


@dataclass
class ScriptJob:
    """A task, which is one rank: runs a script of `folder`/code in `working_dir`. submitit pickles and calls it."""

    script: str
    arguments: list[str]
    folder: Path
    working_dir: Path
    command: list[str] | None = None  # the words before the script, in place of python
    sweep: str | None = None  # the name of its sweep

    def __call__(self) -> None:
        """Run the script and exit with its status."""
        script = [str(self.folder / f"code/{self.script}.py"), *self.arguments]
        words = [*(self.command or [sys.executable]), "-u", *script]
        _say(shlex.join(words))
        environment = {**os.environ, NOTE_VARIABLE: str(self.folder / f"run_{_index()}")}
        if self.sweep is not None:
            environment["WANDB_RUN_GROUP"] = self.sweep
        process = subprocess.Popen(words, cwd=self.working_dir, env=environment)

        def stop(number: int, frame: FrameType | None) -> None:
            process.send_signal(signal.SIGUSR1)  # if SLURM signals the script too, both count as one request

        for number in _STOPPING:  # submitit's own handler would requeue the job before it has saved
            signal.signal(number, stop)
        status = _meaning(process.wait())
        _write_status(self.folder, f"task_{os.environ['SLURM_PROCID']}", status)
        _say(f"{self.script}.py has ended with status {status}")
        if status == EXIT_LOST_RANK and os.environ["SLURM_PROCID"] == "0":
            finish(self.folder, status)  # srun waits until SLURM notices a lost node
        os._exit(EXIT_OK if status == EXIT_STOPPED else status)


def _index() -> int:
    """Return this job's index in its array."""
    return int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))


def _write_status(folder: Path, name: str, status: int) -> None:
    """Write the status of a task or of the job, for this start of the job. Write errors are logged."""
    file = folder / f"status_{_index()}_{restart_count()}" / name
    with ignore_write_errors(file):
        write_text(file, f"{status}\n")


def finish(folder: Path, status: int) -> int:
    """Requeue the job, or write its final status to end_*.json; return the status. status: srun's exit status."""
    index = _index()
    launch = read_json(folder / "job.json")["launch"]
    array = os.environ.get("SLURM_ARRAY_JOB_ID")  # one of the array's jobs has this number as its own
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{index}"
    noted = [int(file.read_text()) for file in folder.glob(f"status_{index}_{restart_count()}/task_*")]
    if not noted:
        noted = [_meaning(128 - status if status > 128 else status)]  # a shell adds 128 to a signal's number
    elif len(noted) < int(os.environ["SLURM_NTASKS"]):  # a task was killed, or its node was lost
        noted.append(EXIT_LOST_RANK)
    others = sorted({*noted} - {EXIT_OK, EXIT_LOST_RANK, EXIT_STOPPED})
    # The cause: if one rank fails, the others report a lost rank.
    ranked = (EXIT_USER_ERROR, *others, EXIT_LOST_RANK, EXIT_STOPPED, EXIT_OK)
    status = next(status for status in ranked if status in noted)
    _write_status(folder, "job", status)
    if status in (EXIT_STOPPED, EXIT_LOST_RANK):
        limit = launch["max_requeues" if status == EXIT_STOPPED else "max_lost_ranks"]
        often = sum(int(file.read_text()) == status for file in folder.glob(f"status_{index}_*/job"))
        if often <= limit or not launch["trains"]:
            _say(f"ended with status {status}; the job continues in the queue")
            if launch["trains"]:
                _requeue(job, folder / f"run_{index}")
            time.sleep(_PATIENCE_SEC)  # SLURM ends this script: the job was requeued or cancelled, or its time is over
        elif status == EXIT_LOST_RANK:
            ask("scontrol", "update", f"JobId={job}", "Requeue=0")  # else SLURM requeues it after a node failure
    write_json(folder / f"end_{index}.json", {"status": status, "restarts": restart_count()})
    return status


def _requeue(job: str, note: Path) -> None:
    """Requeue a job that SLURM is not ending yet, and mark its run. Retries while SLURM does not answer."""
    until = time.monotonic() + _PATIENCE_SEC
    while time.monotonic() < until:
        with suppress(NoAnswer):
            if "JobState=RUNNING" in ask("scontrol", "--oneliner", "show", "job", job).split():
                with suppress(OSError):  # the job has not come to its run
                    write_progress(Path(note.read_text()), "requeued")
                ask("scontrol", "requeue", job)
            return
        time.sleep(_RETRY_SEC)


def _meaning(status: int) -> int:
    """Return the exit status for a process's return code: 75 or 70 if a signal ended the process."""
    if -status in _STOPPING:
        return EXIT_STOPPED
    if -status in _KILLING:
        return EXIT_LOST_RANK
    return status if status >= 0 else 128 - status


def _say(text: str) -> None:
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    sys.stdout.write(f"[{node}, task {os.environ.get('SLURM_PROCID', 'batch')}] {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(finish(Path(sys.argv[1]), int(sys.argv[2])))
