"""What a SLURM task of a job runs: the script as a process of its own, which is stopped and continued with the job.

submitit pickles a `ScriptJob`, calls it in each task, and calls its `checkpoint` in the first one before a preemption
or the end of the time. The script then saves and ends with status 75, and submitit requeues the job.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submit.queue import job_state, requeue, show
from utils.config.sweep import SWEEP_VARIABLE
from utils.errors import EXIT_LOST_RANK, EXIT_OK, EXIT_STOPPED
from utils.io.files import write_json
from utils.ranks.job_status import STATUS_VARIABLE, judge_status

# torchrun passes these on, and waits for its ranks to save.
_TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
_AGAIN_SEC = 5.0
_PATIENCE_SEC = 600  # for the ranks to save, and for the scheduler to end the tasks of a requeued job


@dataclass
class ScriptJob:
    """A script and its arguments. `code`: the copy of the code; `folder`: of the job; `index`: in an array.

    torchrun_ranks: the ranks that torchrun starts on each node; None: each task is a rank. max_lost_ranks: losses of a
    rank or a node after which the job is not continued. sweep: its name.
    """

    script: str
    arguments: list[str]
    code: Path
    working_dir: Path
    folder: Path
    index: int = 0
    torchrun_ranks: int | None = None
    max_lost_ranks: int = 0
    sweep: str | None = None

    def command(self) -> list[str]:
        """Return the command of this task."""
        words = [str(self.code / f"{self.script}.py"), *self.arguments]
        if self.torchrun_ranks is None:
            return [sys.executable, "-u", *words]
        nodes = show("hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 20000
        return [
            sys.executable, "-u", "-m", "torch.distributed.run", f"--nnodes={len(nodes)}",
            f"--node-rank={os.environ['SLURM_NODEID']}", f"--nproc-per-node={self.torchrun_ranks}",
            f"--master-addr={nodes[0]}", f"--master-port={port}", f"--signals-to-handle={_TORCHRUN_SIGNALS}",
            f"--shutdown-timeout={_PATIENCE_SEC}", "--tee=3",  # a log for each rank, and all of them in the task's
            f"--log-dir={self.folder / 'logs' / job_id()}_{os.environ['SLURM_NODEID']}_ranks", *words,
        ]  # fmt: skip

    def __call__(self) -> int:
        """Run the script to its end. A status other than 0 ends the task with it; 75 and 70 requeue the job."""
        self._process = None
        command = self.command()
        _say(shlex.join(command))
        folder = self.folder / f"status_{self.index}_{_restarts()}"
        environment = {**os.environ, STATUS_VARIABLE: str(folder)}
        if self.sweep is not None:
            environment[SWEEP_VARIABLE] = self.sweep
        self._process = subprocess.Popen(command, cwd=self.working_dir, env=environment)
        status = self._process.wait()
        if not _is_first():
            if judge_status(folder, status) in (EXIT_STOPPED, EXIT_LOST_RANK):
                self._wait_for_the_first()
        else:
            status = judge_status(folder, status)
            if status == EXIT_STOPPED or (status == EXIT_LOST_RANK and self._may_lose_another()):
                self._continue(status)
        self._end(status)
        return status

    def checkpoint(self) -> Any:
        """Wait until the script has saved, and return what continues it; in a signal handler of the first task."""
        from submitit.helpers import DelayedSubmission

        process, self._process = self._process, None  # which cannot be pickled
        if process is None:  # it has not begun
            return DelayedSubmission(self)
        started, status = time.monotonic(), process.returncode
        if status is None:
            process.send_signal(signal.SIGUSR1)  # SLURM signals it too; both together are one request
            # `wait` holds a lock in the frame that the signal has interrupted.
            found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        if status == EXIT_OK:  # it was at its end
            self._end(status)
            os._exit(EXIT_OK)
        _say(f"ended with status {status} after {time.monotonic() - started:.1f} s; the job continues in the queue")
        return DelayedSubmission(self)

    def _wait_for_the_first(self) -> None:
        """Wait until the first task has ended the job, or SLURM has, because it was requeued."""
        file, until = end_file(self.folder, self.index), time.monotonic() + _PATIENCE_SEC
        while not file.exists() and time.monotonic() < until:
            time.sleep(_AGAIN_SEC)

    def _may_lose_another(self) -> bool:
        """Count the loss of a rank, and return whether the job is continued."""
        file = self.folder / f"lost_{self.index}"
        count = int(file.read_text()) + 1 if file.exists() else 1
        file.write_text(str(count))
        return count <= self.max_lost_ranks

    def _continue(self, status: int) -> None:
        """Put the job back into the queue, unless SLURM itself ends it or requeues it, and wait for the end."""
        if job_state(job_id()) in ("RUNNING", None):
            _say(f"{self.script}.py has ended with status {status}; the job continues in the queue")
            until = time.monotonic() + _PATIENCE_SEC
            while not requeue(job_id()) and time.monotonic() < until:
                time.sleep(_AGAIN_SEC)
        time.sleep(_PATIENCE_SEC)

    def _end(self, status: int) -> None:
        """Note the end of the script in the job's folder; a failed one ends this process."""
        if _is_first():
            write_json(end_file(self.folder, self.index), {"status": status, "restarts": _restarts()})
        _say(f"{self.script}.py has ended with status {status}")
        if status != EXIT_OK:
            os._exit(status if status > 0 else 128 - status)  # SLURM shows it, and ends the other tasks


def end_file(folder: Path, index: int) -> Path:
    """Return the file that tells how job number `index` of a folder has ended."""
    return folder / f"end_{index}.json"


def job_id() -> str:
    """Return the number by which SLURM knows this job; ARRAY_INDEX in an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _is_first() -> bool:
    return os.environ["SLURM_PROCID"] == "0"


def _say(text: str) -> None:
    place = f"{os.environ.get('SLURMD_NODENAME', socket.gethostname())}, task {os.environ['SLURM_PROCID']}"
    sys.stdout.write(f"[{place}] {text}\n")
    sys.stdout.flush()
