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

from submit.queue import forbid_requeue, is_running, requeue, show
from utils.config.sweep import SWEEP_VARIABLE
from utils.errors import EXIT_LOST_RANK, EXIT_OK, EXIT_STOPPED
from utils.io.files import write_json
from utils.ranks.job_status import STATUS_VARIABLE, judge_status, note_task, some_rank_failed
from utils.ranks.slurm_step import restart_count, slurm_port

# torchrun passes these on, and waits for its ranks to save.
_TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
_AGAIN_SEC = 5.0
_SIGNAL_SEC = 10.0  # by which SLURM's signal may reach one task later than another, on a busy machine
_PATIENCE_SEC = 600  # for the ranks to save, and for the scheduler to end the tasks of a requeued job
_FAILURE_SEC = 30  # for the other ranks to end by themselves where one has failed
# A script that a signal ended: asked to stop before it could listen, or killed (by the kernel, where memory ran out).
_STOPPING, _KILLING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2), (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)


@dataclass
class ScriptJob:
    """A script and its arguments. `code`: the copy of the code; `folder`: of the job; `index`: in an array.

    container: the words before the script's python, which run it in a container; this job itself runs outside, where
    SLURM's commands are. torchrun_ranks: the ranks that torchrun starts on each node; None: each task is a rank.
    max_lost_ranks: losses of a rank or a node after which the job is not continued. sweep: its name.
    """

    script: str
    arguments: list[str]
    code: Path
    working_dir: Path
    folder: Path
    index: int = 0
    container: list[str] | None = None
    torchrun_ranks: int | None = None
    max_lost_ranks: int = 0
    sweep: str | None = None

    def command(self) -> list[str]:
        """Return the command of this task."""
        words = [str(self.code / f"{self.script}.py"), *self.arguments]
        python = self.container or [sys.executable]
        if self.torchrun_ranks is None:
            return [*python, "-u", *words]
        nodes = show("hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        return [
            *python, "-u", "-m", "torch.distributed.run", f"--nnodes={len(nodes)}",
            f"--node-rank={os.environ['SLURM_NODEID']}", f"--nproc-per-node={self.torchrun_ranks}",
            f"--master-addr={nodes[0]}", f"--master-port={slurm_port(os.environ)}",
            f"--signals-to-handle={_TORCHRUN_SIGNALS}",
            f"--shutdown-timeout={_PATIENCE_SEC}", "--tee=3",  # a log for each rank, and all of them in the task's
            f"--log-dir={self.folder / 'logs' / job_id()}_{os.environ['SLURM_NODEID']}_ranks", *words,
        ]  # fmt: skip

    def __call__(self) -> int:
        """Run the script to its end. A status other than 0 ends the task with it; 75 and 70 requeue the job."""
        from submitit.core.utils import UncompletedJobError

        self._process = None
        try:
            status = self._run()
        except UncompletedJobError:  # `checkpoint` was called, and it was the last time limit that it may reach
            status = EXIT_STOPPED
        self._end(status)
        return status

    def _run(self) -> int:
        command, folder = self.command(), self._status_folder()
        _say(shlex.join(command))
        environment = {**os.environ, STATUS_VARIABLE: str(folder)}
        if self.sweep is not None:
            environment[SWEEP_VARIABLE] = self.sweep
        self._process = subprocess.Popen(command, cwd=self.working_dir, env=environment)
        status = judge_status(folder, _meaning(self._wait(folder)))
        note_task(folder, int(os.environ["SLURM_PROCID"]), status)
        if not _is_first():
            if status in (EXIT_STOPPED, EXIT_LOST_RANK):
                self._wait_for_the_first()
        elif status == EXIT_STOPPED or (status == EXIT_LOST_RANK and self._may_lose_another()):
            self._continue(status)
        elif status == EXIT_LOST_RANK:
            forbid_requeue(job_id())
        return status

    def _status_folder(self) -> Path:
        return self.folder / f"status_{self.index}_{restart_count()}"

    def _wait(self, folder: Path) -> int:
        """Wait for the script; where another rank has failed, it is killed if it does not end by itself."""
        until = None
        while True:
            try:
                return self._process.wait(_AGAIN_SEC)
            except subprocess.TimeoutExpired:
                pass
            if until is None and some_rank_failed(folder):
                until = time.monotonic() + _FAILURE_SEC
            if until is not None and time.monotonic() > until:
                _say("another rank has failed, and this one does not end: it is killed")
                self._process.kill()

    def checkpoint(self) -> Any:
        """Stop the script, and return what continues it. A script that was at its end or has failed ends this process.

        submitit calls it in the first task, in a signal handler.
        """
        from submitit.helpers import DelayedSubmission

        process, self._process = self._process, None  # a process cannot be pickled
        if process is None:  # the script has not begun
            return DelayedSubmission(self)
        started = time.monotonic()
        status = _stop(process)
        if self.torchrun_ranks is not None and status != EXIT_OK:
            status = EXIT_STOPPED  # torchrun always ends with 1; unless its ranks have noted theirs, none had started
        status = judge_status(self._status_folder(), _meaning(status))
        if status not in (EXIT_STOPPED, EXIT_LOST_RANK):
            self._end(status)
            os._exit(status)
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
        """Put the job back into the queue, unless SLURM itself ends it or requeues it, and wait for the end.

        Another task's signal may have ended the script. submitit, which counts the time limits, has the first word.
        """
        time.sleep(_SIGNAL_SEC)
        if is_running(job_id()):
            _say(f"{self.script}.py has ended with status {status}; the job continues in the queue")
            until = time.monotonic() + _PATIENCE_SEC
            while not requeue(job_id()) and time.monotonic() < until:
                time.sleep(_AGAIN_SEC)
        time.sleep(_PATIENCE_SEC)

    def _end(self, status: int) -> None:
        """Note the end of the script in the job's folder; a failed one ends this process."""
        if _is_first():
            write_json(end_file(self.folder, self.index), {"status": status, "restarts": restart_count()})
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


def _stop(process: subprocess.Popen) -> int:
    """Ask a script to save; returns its exit status, which is negative where a signal has ended it."""
    if process.returncode is not None:
        return process.returncode
    process.send_signal(signal.SIGUSR1)  # SLURM signals it too; both together are one request
    # Not process.wait, which may hold a lock in the frame that submitit's signal has interrupted.
    found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _meaning(status: int) -> int:
    """Return a script's status; 75 or 70 where a signal has ended it, which it could not say itself."""
    if -status in _STOPPING:
        return EXIT_STOPPED
    return EXIT_LOST_RANK if -status in _KILLING else status


def _is_first() -> bool:
    return os.environ["SLURM_PROCID"] == "0"


def _say(text: str) -> None:
    place = f"{os.environ.get('SLURMD_NODENAME', socket.gethostname())}, task {os.environ['SLURM_PROCID']}"
    sys.stdout.write(f"[{place}] {text}\n")
    sys.stdout.flush()
