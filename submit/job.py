"""What runs on the nodes: in each task of SLURM the script as a process of its own, and behind all tasks, in the batch
script, `python -m submit.job FOLDER STATUS`, which requeues a job that was stopped or has lost a rank.

A task ends with the status of its script; with 0 where that was stopped, because SLURM kills the other tasks of one
that fails, and they may be saving still.
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
from types import FrameType

from submit.queue import NoAnswer, ask, job_state
from utils.errors import EXIT_LOST_RANK, EXIT_OK, EXIT_STOPPED
from utils.io.files import read_json, write_json
from utils.ranks.job_status import STATUS_VARIABLE, SWEEP_VARIABLE, judge_status, note, restart_count, slurm_port, worst

# torchrun passes these on, and waits for its ranks to save.
_TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
_AGAIN_SEC = 5.0
_PATIENCE_SEC = 600  # for ranks to save, and for the scheduler to end a job
# A script that a signal ended: asked to stop before it could listen, or killed (by the kernel, where memory ran out).
_STOPPING, _KILLING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2), (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)


@dataclass
class ScriptJob:
    """A task: a script of `folder`/code with its arguments, in `working_dir`; submitit pickles and calls it.

    command: the words before the script in place of python. torchrun_ranks: the ranks that torchrun starts on each
    node; None: each task is a rank. index: in an array. sweep: its name.
    """

    script: str
    arguments: list[str]
    folder: Path
    working_dir: Path
    index: int = 0
    command: list[str] | None = None
    torchrun_ranks: int | None = None
    sweep: str | None = None

    def words(self) -> list[str]:
        """Return the command of this task."""
        python = [*(self.command or [sys.executable]), "-u"]
        script = [str(self.folder / f"code/{self.script}.py"), *self.arguments]
        if self.torchrun_ranks is None:
            return [*python, *script]
        nodes = ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        logs = f"{self.folder}/logs/{os.environ['SLURM_JOB_ID']}_{os.environ['SLURM_NODEID']}_ranks"
        return [
            *python, "-m", "torch.distributed.run", f"--nnodes={len(nodes)}",
            f"--node-rank={os.environ['SLURM_NODEID']}", f"--nproc-per-node={self.torchrun_ranks}",
            f"--master-addr={nodes[0]}", f"--master-port={slurm_port(os.environ)}",
            f"--signals-to-handle={_TORCHRUN_SIGNALS}", f"--shutdown-timeout={_PATIENCE_SEC}",
            "--tee=3", f"--log-dir={logs}", *script,  # a log for each rank, and all of them in the task's
        ]  # fmt: skip

    def __call__(self) -> None:
        """Run the script to its end, and end this process with its status."""
        words, folder, asked = self.words(), status_folder(self.folder, self.index), []
        _say(shlex.join(words))
        environment = {**os.environ, STATUS_VARIABLE: str(folder)}
        if self.sweep is not None:
            environment[SWEEP_VARIABLE] = self.sweep
        process = subprocess.Popen(words, cwd=self.working_dir, env=environment)

        def stop(number: int, frame: FrameType | None) -> None:
            asked.append(number)
            process.send_signal(signal.SIGUSR1)  # SLURM signals it too; both together are one request

        for number in _STOPPING:  # in place of submitit's handler, which would requeue the job before it has saved
            signal.signal(number, stop)
        status = _meaning(process.wait())
        if self.torchrun_ranks is not None and asked and status != EXIT_OK:
            status = EXIT_STOPPED  # torchrun always ends with 1; unless its ranks have noted theirs, none had started
        status = judge_status(folder, status)
        note(folder / f"task_{os.environ['SLURM_PROCID']}", status)
        _say(f"{self.script}.py has ended with status {status}")
        if status == EXIT_LOST_RANK and os.environ["SLURM_PROCID"] == "0":
            finish(self.folder, status)  # srun waits for a lost node, until SLURM knows
        os._exit(EXIT_OK if status == EXIT_STOPPED else status)


def status_folder(folder: Path, index: int) -> Path:
    """Return the folder of what the ranks and tasks of this start of a job note."""
    return folder / f"status_{index}_{restart_count()}"


def finish(folder: Path, status: int) -> int:
    """Requeue the job, or note its end for those who wait; status: srun's. Returns the exit status of the job."""
    index, launch = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")), read_json(folder / "job.json")["launch"]
    array = os.environ.get("SLURM_ARRAY_JOB_ID")  # whose number is also that of one of its jobs
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{index}"
    noted = [int(file.read_text()) for file in status_folder(folder, index).glob("task_*")]
    if not noted:
        noted = [_meaning(128 - status if status > 128 else status)]  # a shell's number of a signal
    elif len(noted) < int(os.environ["SLURM_NTASKS"]):  # the node of a task is lost, or it was killed
        noted.append(EXIT_LOST_RANK)
    status = worst(noted)
    note(status_folder(folder, index) / "job", status)
    if status in (EXIT_STOPPED, EXIT_LOST_RANK):
        limit = launch["max_requeues" if status == EXIT_STOPPED else "max_lost_ranks"]
        often = sum(int(file.read_text()) == status for file in folder.glob(f"status_{index}_*/job"))
        until = time.monotonic() + _PATIENCE_SEC
        if often <= limit or not launch["trains"]:
            _say(f"ended with status {status}; the job continues in the queue")
            while launch["trains"] and time.monotonic() < until and not _requeue(job):
                time.sleep(_AGAIN_SEC)
            time.sleep(_PATIENCE_SEC)  # SLURM ends it: it was requeued, cancelled, or its time is over
        elif status == EXIT_LOST_RANK:
            ask("scontrol", "update", f"JobId={job}", "Requeue=0")  # which SLURM would do where a node has failed
    write_json(end_file(folder, index), {"status": status, "restarts": restart_count()})
    return status


def end_file(folder: Path, index: int) -> Path:
    """Return the file that tells how job number `index` of a folder has ended."""
    return folder / f"end_{index}.json"


def _requeue(job: str) -> bool:
    """Put a job back into the queue, unless SLURM is ending it; returns False where SLURM does not answer."""
    try:
        if job_state(job) == "RUNNING":
            ask("scontrol", "requeue", job)
    except NoAnswer:
        return False
    return True


def _meaning(status: int) -> int:
    """Return a process's status as an exit status; 75 or 70 where a signal has ended it, which it could not say."""
    if -status in _STOPPING:
        return EXIT_STOPPED
    return EXIT_LOST_RANK if -status in _KILLING else status if status >= 0 else 128 - status


def _say(text: str) -> None:
    place = f"{os.environ.get('SLURMD_NODENAME', socket.gethostname())}, task {os.environ.get('SLURM_PROCID', 'batch')}"
    sys.stdout.write(f"[{place}] {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(finish(Path(sys.argv[1]), int(sys.argv[2])))
