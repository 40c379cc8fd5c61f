"""Sweeps: the jobs of a --multirun, each a process: in turn, several at once, or each on one of some GPUs.

    python finetune.py --multirun optim.lr=0.001,0.003 seed=0,1,2 sweep.name=rates sweep.at_once=2
    python finetune.py --multirun optim.lr=0.001,0.003 sweep.gpus=[0,1]
    python finetune.py --multirun 'optim.lr=tag(log,interval(1e-4,1e-2))' sweep.trials=20

Each job has its own run folder, whose name is what is swept (`lr=0.001,seed=0`), so a sweep that is typed again runs
what is missing. In a search (sweep.trials) Optuna chooses the values of a job by the results of the jobs before. Its
state is in the sweep's folder (optuna.log), so it goes on too: trials that were under way are made again.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import OmegaConf
from pydantic import Field

from utils.config.bounds import Count, CountOrZero, Processes
from utils.config.help import CONF
from utils.config.messages import validate
from utils.config.schema import PathText, Strict
from utils.errors import EXIT_OK, EXIT_STOPPED, UserError
from utils.io.files import sha256_text
from utils.ranks.distributed import detect_world
from utils.ranks.signals import StopRequest
from utils.record.logging import get_logger
from utils.record.run_reader import RunReader, settings_of

log = get_logger(__name__)

FLAGS = {"--multirun", "-m"}
_NAME_BYTES = 200  # of a job's folder; file systems take 255
_LOOK_SEC = 0.1
_QUOTES = "'\""


class SweepConfig(Strict):
    """A multirun: its jobs' run folders are in outputs/sweeps/<name>/.

    at_once: jobs at the same time, null for one, or one for each of `gpus`, of which each job gets one; trials: jobs
    whose values Optuna chooses.
    """

    name: PathText
    at_once: Processes | None
    gpus: Annotated[list[CountOrZero], Field(min_length=1)] | None
    trials: Count | None


class _SweepWords(Strict):
    sweep: SweepConfig


@dataclass(frozen=True)
class SweepJob:
    """A job: the overrides of its command, its run folder, and Optuna's trial where it is one."""

    words: tuple[str, ...]
    folder: str
    trial: Any = None

    @property
    def is_complete(self) -> bool:
        """Whether its run is complete, with these overrides: with others it may continue, or refuse them."""
        run = RunReader(Path(self.folder))
        return run.is_complete and run.settings == settings_of(self.words)


@dataclass(frozen=True)
class Sweep:
    """The overrides of a --multirun, what `sweep.` says of it, and the folder of the jobs' run folders."""

    overrides: list[Override]
    settings: SweepConfig
    base: str

    @property
    def swept(self) -> list[Override]:
        """The overrides with several values."""
        return [one for one in self.overrides if one.is_sweep_override()]

    def jobs(self) -> Iterator[SweepJob]:
        """Yield all jobs: each choice with each other."""
        choices = ([(one.key_or_group, value) for value in one.sweep_string_iterator()] for one in self.swept)
        return map(self.job, map(dict, itertools.product(*choices)))

    def job(self, chosen: Mapping[str, Any], trial: Any = None) -> SweepJob:
        """Return the job of some values of what is swept.

        The name of its folder has the last part of each key, the whole key where two end alike; and a hash where
        characters had to be changed or cut.
        """
        words = (
            f"{one.get_key_element()}={chosen[one.key_or_group]}" if one.is_sweep_override() else one.input_line
            for one in self.overrides
            if one.key_or_group != "run_dir"
        )
        ends = [key.rpartition(".")[2] for key in chosen]
        names = [end if ends.count(end) == 1 else key for end, key in zip(ends, chosen)]
        full = ",".join(sorted(f"{name}={str(value).strip(_QUOTES)}" for name, value in zip(names, chosen.values())))
        name = re.sub(r"[^\w.,=+-]+", "_", full).encode()[:_NAME_BYTES].decode(errors="ignore")
        name = (name if name == full else f"{name}-{sha256_text(full)[:8]}") or "job"
        return SweepJob((*words, f"run_dir={self.base}/{name}"), f"{self.base}/{name}", trial)


def parse_sweep(words: Sequence[str]) -> Sweep:
    """Return the sweep of a command's words. Raises ConfigError where `sweep.` has a wrong value."""
    overrides = OverridesParser.create().parse_overrides([word for word in words if word not in FLAGS])
    values = OmegaConf.to_container(OmegaConf.load(CONF / "common.yaml").sweep)
    given = {one.key_or_group: one.value() for one in overrides if one.key_or_group.startswith(("sweep.", "run_dir"))}
    values |= {key.removeprefix("sweep."): value for key, value in given.items() if key != "run_dir"}
    settings = validate({"sweep": values}, _SweepWords).sweep
    return Sweep(overrides, settings, str(given.get("run_dir") or f"outputs/sweeps/{settings.name}"))


def run_sweep(sweep: Sweep, script: str) -> dict[SweepJob, int]:
    """Run a sweep's jobs as processes of a script; returns their exit statuses.

    A stop signal is passed on to the jobs that run, and no other is started; it ends in SystemExit(75). Under a
    launcher, which starts the sweep on each rank, jobs run in turn, and each rank starts its own of a job.
    """
    settings = sweep.settings
    gpus: Sequence[str | None] = visible_gpus(settings.gpus) if settings.gpus else [None]
    at_once = settings.at_once or len(gpus)
    if detect_world().size > 1 and (at_once > 1 or settings.gpus or settings.trials):
        raise UserError("sweep.at_once: jobs at once and searches have one rank each; start it with python alone")
    jobs = sweep.jobs() if settings.trials is None else _trials(sweep)
    free = list(itertools.islice(itertools.cycle(gpus), at_once))
    running: dict[subprocess.Popen, tuple[SweepJob, str | None]] = {}
    statuses: dict[SweepJob, int] = {}
    asked = False
    with StopRequest() as stop:
        while True:
            while free and not stop.requested and (job := next(jobs, None)) is not None:
                if job.is_complete:
                    log.info("complete already: %s", job.folder)
                    _end(job, EXIT_OK, statuses)
                elif job.folder in [other.folder for other, _ in running.values()]:  # trials of the same values
                    _tell(job, None)
                else:
                    gpu = free.pop(0)
                    running[_start(job, script, gpu, in_turn=at_once == 1)] = job, gpu
            if not running:
                break
            time.sleep(_LOOK_SEC)
            if stop.requested and not asked:
                asked = True
                for process in running:
                    process.send_signal(signal.SIGTERM)
            for process in [process for process in running if process.poll() is not None]:
                job, gpu = running.pop(process)
                free.append(gpu)
                status = process.returncode
                _end(job, status if status >= 0 else 128 - status, statuses)  # ended by a signal: a shell's number
    if stop.requested:
        raise SystemExit(EXIT_STOPPED)
    return statuses


def _start(job: SweepJob, script: str, gpu: str | None, *, in_turn: bool) -> subprocess.Popen:
    """Start a job; its output goes to the terminal where jobs run in turn, else into a file beside its folder."""
    folder = Path(job.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {"WANDB_RUN_GROUP": folder.parent.name, **os.environ}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    log.info("started%s: %s", "" if gpu is None else f" on GPU {gpu}", folder if in_turn else f"see {folder}.log")
    with nullcontext() if in_turn else open(f"{folder}.log", "ab") as stream:
        # In a session of its own: Ctrl-C is passed on, as a request to save.
        return subprocess.Popen(
            [sys.executable, script, *job.words],
            env=environment, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip


def _end(job: SweepJob, status: int, statuses: dict[SweepJob, int]) -> None:
    """Note how a job has ended; one that was stopped is a trial still."""
    statuses[job] = status
    if status not in (EXIT_OK, EXIT_STOPPED):
        log.error("failed with status %d: %s", status, job.folder)
    if job.trial is not None and status != EXIT_STOPPED:
        _tell(job, RunReader(Path(job.folder)).result)


def _trials(sweep: Sweep) -> Iterator[SweepJob]:
    """Yield the jobs of a search; the values of each follow from the results of those before."""
    import optuna  # takes a second
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    if not sweep.swept:
        raise UserError("sweep.trials: nothing is swept; add a range, optim.lr=tag(log,interval(1e-4,1e-2))")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    Path(sweep.base).mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(f"{sweep.base}/optuna.log"))
    study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize", load_if_exists=True)
    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # of a search that was stopped or killed
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # else it would draw its first values again
    for _ in range(sweep.settings.trials - len(study.get_trials(states=(TrialState.COMPLETE,)))):
        trial = study.ask()
        yield sweep.job({one.key_or_group: _suggest(trial, one) for one in sweep.swept}, trial)


def _suggest(trial: Any, override: Override) -> str | int | float:
    """Return the value of a swept key that a trial suggests."""
    name, sweep = override.key_or_group, override.value()
    if isinstance(sweep, IntervalSweep) and "int" in sweep.tags:
        return trial.suggest_int(name, int(sweep.start), int(sweep.end), log="log" in sweep.tags)
    if isinstance(sweep, IntervalSweep):
        value = trial.suggest_float(name, float(sweep.start), float(sweep.end), log="log" in sweep.tags)
        return float(f"{value:.4g}")  # readable; Optuna may know it to more digits
    return trial.suggest_categorical(name, list(override.sweep_string_iterator()))


def _tell(job: SweepJob, result: dict[str, Any] | None) -> None:
    """Give Optuna the result of a job; without one its trial has failed."""
    from optuna.trial import TrialState

    value = result and result["value"]
    state = TrialState.FAIL if value is None else TrialState.COMPLETE
    job.trial.study.tell(job.trial, -value if value is not None and result["is_lowest_best"] else value, state)


def visible_gpus(numbers: Sequence[int]) -> list[str]:
    """Return what CUDA calls GPUs that are numbered among those that this process sees.

    Raises UserError (`sweep.gpus`) where CUDA_VISIBLE_DEVICES has fewer.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(map(str, numbers))
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if max(numbers) >= len(names):
        raise UserError(f"sweep.gpus: {max(numbers)} is none of the {len(names)} of CUDA_VISIBLE_DEVICES={visible}")
    return [names[number] for number in numbers]
