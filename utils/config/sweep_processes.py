"""The jobs of a sweep as processes, several at once."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from utils.config.search import Search
from utils.config.sweep import SWEEP_VARIABLE, JobResult, Sweep, SweepJob
from utils.errors import EXIT_OK, EXIT_STOPPED, UserError
from utils.ranks.distributed import detect_world
from utils.ranks.signals import SIGNALS
from utils.record.logging import get_logger

log = get_logger(__name__)


def run_at_once(sweep: Sweep, script: str) -> tuple[int, list[JobResult]]:
    """Run a sweep's jobs as processes of a script; returns the sweep's exit status, 75 where stopped, and the jobs'."""
    if detect_world().size > 1:
        raise UserError("sweep.at_once: jobs at once are processes of their own; start the sweep with python alone")
    gpus = visible_gpus(sweep.gpus)
    if sweep.trials is None:
        processes = JobProcesses(script, iter(sweep.jobs()))
    else:
        search = Search(sweep)
        processes = JobProcesses(script, iter(search.next_job, None), search.tell)
    processes.run(sweep.at_once, gpus)
    results = processes.results
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


@dataclass
class JobProcesses:
    """Processes that take jobs, one after another, until there are none.

    ended: called with each job that was not stopped. It and `jobs` are used by one thread at a time.
    """

    script: str
    jobs: Iterator[SweepJob]
    ended: Callable[[SweepJob], None] = lambda job: None
    results: list[JobResult] = field(default_factory=list)  # of jobs that were not stopped
    stopping: bool = False
    error: Exception | None = None
    _processes: set[subprocess.Popen] = field(default_factory=set)
    _lock: Any = field(default_factory=Lock)

    def run(self, at_once: int, gpus: Sequence[str]) -> None:
        """Run all jobs; a stop signal is passed on to those that run, and no other is started.

        Raises what a thread raised, such as the disk's error.
        """
        threads = [
            Thread(target=self._take_jobs, args=(gpus[number % len(gpus)] if gpus else None,), daemon=True)
            for number in range(at_once)
        ]
        with self._signals_passed_on():
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # so that signals are handled
                    thread.join(0.2)
        if self.error is not None:
            raise self.error

    def _take_jobs(self, gpu: str | None) -> None:
        try:
            self._take_all(gpu)
        except Exception as error:  # raised in the main thread, when the other jobs have ended
            self.error = error

    def _take_all(self, gpu: str | None) -> None:
        while not self.stopping and self.error is None:
            with self._lock:
                job = next(self.jobs, None)
            if job is None:
                return
            status = self._run(job, gpu)
            with self._lock:
                if status != EXIT_STOPPED:
                    self.results.append(JobResult(job.words, status, f"see {job.folder}.log"))
                    self.ended(job)

    def _run(self, job: SweepJob, gpu: str | None) -> int:
        """Run a job, unless it is complete; its output goes into a file beside its folder."""
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
            command = [sys.executable, self.script, *job.arguments]
            # In a session of its own: Ctrl-C is passed on below, as a request to save.
            process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            self._processes.add(process)
            if self.stopping:
                process.send_signal(signal.SIGTERM)
            status = process.wait()
            status = status if status >= 0 else 128 - status  # ended by a signal: a shell's number
        self._processes.discard(process)
        if status not in (EXIT_OK, EXIT_STOPPED):
            log.error("failed with status %d: see %s", status, output)
        return status

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        def pass_on(number: int, frame: Any) -> None:
            self.stopping = True
            for process in list(self._processes):
                process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, pass_on) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
