"""The jobs of a sweep as processes, several at once."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from typing import Any

from utils.config.search import Search
from utils.config.sweep import SWEEP_VARIABLE, JobResult, Sweep, SweepJob
from utils.errors import EXIT_OK, EXIT_STOPPED, UserError
from utils.ranks.distributed import detect_world
from utils.ranks.signals import SIGNALS
from utils.record.logging import get_logger

log = get_logger(__name__)


def run_at_once(sweep: Sweep, script: str) -> tuple[int, list[JobResult]]:
    """Run a sweep's jobs as processes of a script; returns the sweep's exit status, 75 where stopped, and the jobs'.

    A stop signal is passed on to the jobs that run, and no other is started. Raises what a thread raised, such as the
    disk's error, when the other jobs have ended.
    """
    if detect_world().size > 1:
        raise UserError("sweep.at_once: jobs at once are processes of their own; start the sweep with python alone")
    gpus = visible_gpus(sweep.gpus) or [None]
    search = None if sweep.trials is None else Search(sweep)
    jobs = iter(sweep.jobs()) if search is None else iter(search.next_job, None)
    processes, lock, results = _Processes(script), Lock(), []

    def take_jobs(gpu: str | None) -> None:
        while not processes.stopping:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            try:
                status = processes.run(job, gpu)
            except Exception:
                processes.stopping = True
                raise
            if status != EXIT_STOPPED:
                with lock:
                    results.append(JobResult(job.words, status, f"see {job.folder}.log"))
                    if search is not None:
                        search.tell(job)

    before = {number: signal.signal(number, processes.stop) for number in SIGNALS}
    try:
        with ThreadPoolExecutor(sweep.at_once) as pool:
            threads = [pool.submit(take_jobs, gpus[number % len(gpus)]) for number in range(sweep.at_once)]
            while wait(threads, timeout=0.2).not_done:  # so that signals are handled
                pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for thread in threads:
        thread.result()
    return EXIT_STOPPED if processes.stopping else max((one.status for one in results), default=EXIT_OK), results


def visible_gpus(numbers: Sequence[int]) -> list[str]:
    """Return what CUDA calls GPUs that are numbered among those that this process sees.

    Raises UserError (`sweep.gpus`) where CUDA_VISIBLE_DEVICES has fewer.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in numbers]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    for number in numbers:
        if not 0 <= number < len(names):
            raise UserError(
                f"sweep.gpus: {number} is none of the {len(names)} GPUs of CUDA_VISIBLE_DEVICES={visible}; they are "
                "numbered from 0"
            )
    return [names[number] for number in numbers]


class _Processes:
    """The processes of a sweep's jobs that run now, which a signal stops."""

    def __init__(self, script: str) -> None:
        self._script, self.stopping = script, False
        self._running: set[subprocess.Popen] = set()

    def stop(self, number: int, frame: Any) -> None:
        """Ask all jobs to save and end: a signal's handler."""
        self.stopping = True
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)

    def run(self, job: SweepJob, gpu: str | None) -> int:
        """Run a job, unless it is complete; its output goes into a file beside its folder. Returns its status."""
        folder = Path(job.folder)
        if job.is_complete:
            log.info("complete already: %s", folder)
            return EXIT_OK
        environment = {**os.environ, SWEEP_VARIABLE: folder.parent.name}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        folder.parent.mkdir(parents=True, exist_ok=True)
        output = folder.with_name(f"{folder.name}.log")
        log.info("started%s: see %s", "" if gpu is None else f" on GPU {gpu}", output)
        with open(output, "ab") as stream:
            # In a session of its own: Ctrl-C is passed on, as a request to save.
            process = subprocess.Popen(
                [sys.executable, self._script, *job.arguments],
                env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
            if self.stopping:
                process.send_signal(signal.SIGTERM)
            status = process.wait()
        self._running.discard(process)
        status = status if status >= 0 else 128 - status  # ended by a signal: a shell's number
        if status not in (EXIT_OK, EXIT_STOPPED):
            log.error("failed with status %d: see %s", status, output)
        return status
