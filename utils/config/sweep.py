"""Sweeps: the jobs of a --multirun, which run in turn or, as processes, several at once.

    python finetune.py --multirun optim.lr=0.001,0.003 seed=0,1,2 sweep.name=rates sweep.at_once=2
    python finetune.py --multirun optim.lr=0.001,0.003 sweep.gpus=[0,1]
    python finetune.py --multirun 'optim.lr=tag(log,interval(1e-4,1e-2))' sweep.trials=20

Each job has its own run folder, whose name is what is swept (`lr=0.001,seed=0`), so a sweep that is typed again runs
what is missing. Jobs in turn (the default) run in one process, by Hydra.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from utils.config.messages import ConfigError
from utils.io.files import sha256_text
from utils.record.run_reader import RunReader, settings_of

FLAGS = ("--multirun", "-m", "hydra.mode=MULTIRUN")
FOLDER = "outputs/sweeps"
_QUOTES = "'\""
_NAME_BYTES = 200  # of a job's folder; file systems take 255
SWEEP_VARIABLE = "ATELIER_SWEEP"  # the name of the sweep, for a job that runs as a command of its own


@dataclass(frozen=True)
class SweepJob:
    """A job: its overrides, and its run folder."""

    words: tuple[str, ...]
    folder: str

    @property
    def arguments(self) -> list[str]:
        """Return the words of a command that runs this job alone."""
        return [*self.words, f"run_dir={self.folder}"]

    @property
    def is_complete(self) -> bool:
        """Whether its run is complete, with these overrides: with others it may continue, or refuse them."""
        run = RunReader(Path(self.folder))
        return run.is_complete and run.settings == settings_of(self.words)


@dataclass(frozen=True)
class JobResult:
    """How a job has ended: its overrides, its exit status and a line of text."""

    overrides: Sequence[str]
    status: int
    text: str


@dataclass(frozen=True)
class Sweep:
    """A --multirun's overrides, and what `sweep.` says of it.

    at_once: jobs at the same time; gpus: each job gets one of them; trials: jobs whose values Optuna chooses.
    """

    overrides: list[Override]
    at_once: int = 1
    gpus: tuple[int, ...] = ()
    trials: int | None = None

    @property
    def is_in_turn(self) -> bool:
        """Whether Hydra runs the jobs, in one process."""
        return self.at_once == 1 and not self.gpus and self.trials is None

    @property
    def base(self) -> str:
        """Return the folder of the jobs' run folders: run_dir, or one that sweep.name names."""
        given = _values(self.overrides)
        return str(given.get("run_dir") or f"{FOLDER}/{given.get('sweep.name', 'default')}")

    @property
    def name(self) -> str:
        """Return its name: of its folder."""
        return Path(self.base).name

    def job(self, words: Sequence[str]) -> SweepJob:
        """Return the job of some overrides."""
        return SweepJob(tuple(words), f"{self.base}/{self.name_job(words)}")

    def name_job(self, words: Iterable[str]) -> str:
        """Return the name of a job's run folder: the overrides of its `words` that are swept.

        A key is its last part; the whole key where two end alike. With a hash where the name had to be changed or cut.
        """
        constant = {one.get_key_element() for one in self.overrides if not one.is_sweep_override()}
        swept = [word.partition("=") for word in words if word.partition("=")[0] not in constant]
        ends = [key.lstrip("+").rpartition(".")[2] for key, _, _ in swept]
        names = [end if ends.count(end) == 1 else key for end, (key, _, _) in zip(ends, swept)]
        full = ",".join(sorted(f"{name}={value.strip(_QUOTES)}" for name, (_, _, value) in zip(names, swept)))
        clean = re.sub(r"[^\w.,=+-]+", "_", full).encode()[:_NAME_BYTES].decode(errors="ignore")
        return (clean if clean == full else f"{clean}-{sha256_text(full)[:8]}") or "job"

    def jobs(self) -> list[SweepJob]:
        """Return all jobs: each choice with each other."""
        choices = [
            [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
            if one.is_sweep_override()
            else [one.input_line]
            for one in self.overrides
            if one.key_or_group != "run_dir"
        ]
        return [self.job(words) for words in itertools.product(*choices)]


def _values(overrides: Iterable[Override]) -> dict[str, Any]:
    keys = ("run_dir", "sweep.name", "sweep.at_once", "sweep.gpus", "sweep.trials")
    return {one.key_or_group: one.value() for one in overrides if one.key_or_group in keys}


def parse_sweep(words: Sequence[str]) -> Sweep:
    """Return the sweep of a command's words. Raises ConfigError where `sweep.` has a wrong value."""
    overrides = OverridesParser.create().parse_overrides([word for word in words if word not in FLAGS])
    given = _values(overrides)
    at_once, gpus, trials = (given.get(f"sweep.{name}") for name in ("at_once", "gpus", "trials"))
    problems = []
    if at_once is not None and not (isinstance(at_once, int) and at_once >= 1):
        problems.append(f"sweep.at_once: must be a number of jobs, 1 or more, found {at_once!r}")
    if gpus is not None and not (isinstance(gpus, list) and gpus and all(isinstance(one, int) for one in gpus)):
        problems.append(f"sweep.gpus: must be a list of GPUs such as [0,1], found {gpus!r}")
    if trials is not None and not (isinstance(trials, int) and trials >= 1):
        problems.append(f"sweep.trials: must be a number of jobs, 1 or more, found {trials!r}")
    if problems:
        raise ConfigError(problems)
    return Sweep(overrides, at_once or len(gpus or [0]), tuple(gpus or ()), trials)
