"""Sweeps: run the jobs of a --multirun as processes, in turn or one on each GPU.

    python finetune.py --multirun optim.lr=0.001,0.003 seed=0,1,2 sweep.name=rates
    python finetune.py --multirun optim.lr=0.001,0.003 sweep.gpus=[0,1]
    python finetune.py --multirun 'optim.lr=tag(log,interval(1e-4,1e-2))' sweep.wandb=sweep.yaml

Each job has a run folder named by its swept values (`lr=0.001,seed=0`), so the same command again runs only the missing
jobs. A search over ranges is W&B's: sweep.wandb writes the sweep that its agents run.
"""

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import OmegaConf

from utils.config.help import CONF
from utils.config.messages import validate
from utils.config.schema import Strict
from utils.config.sweep_config import FLAGS, SweepConfig
from utils.errors import EXIT_OK, EXIT_STOPPED, UserError
from utils.io.files import Json, Values, output_errors, sha256_text, write_json
from utils.ranks.distributed import detect_world
from utils.ranks.signals import StopRequest
from utils.record.logging import log
from utils.record.run_reader import OBJECTIVE, RunReader, settings_of

_NAME_BYTES = 200  # of a job's folder; file systems allow 255
_LOOK_SEC = 0.1
_QUOTES = "'\""


class _SweepWords(Strict):
    sweep: SweepConfig


class SweepJob(NamedTuple):
    """A job: the overrides of its command, and its run folder."""

    words: tuple[str, ...]
    folder: str

    @property
    def is_complete(self) -> bool:
        """Whether its run is complete with these overrides; with others, the run itself continues or refuses them."""
        run = RunReader(Path(self.folder))
        return run.is_complete and run.settings == settings_of(self.words)


class Sweep(NamedTuple):
    """A sweep: the overrides of its command, its settings, and the folder that contains the run folders."""

    overrides: list[Override]
    settings: SweepConfig
    base: str

    @property
    def swept(self) -> list[Override]:
        """The overrides with several values."""
        return [override for override in self.overrides if override.is_sweep_override()]

    def jobs(self) -> Iterator[SweepJob]:
        """Yield the jobs of all combinations of values. Raises UserError for a range."""
        for key in self.swept:
            if key.is_interval_sweep():
                raise UserError(
                    f"{key.key_or_group}: found a range, {key.input_line}; W&B's agents search in it: add "
                    "sweep.wandb=FILE.yaml, or write values: A,B"
                )
        names = [key.key_or_group for key in self.swept]
        for values in itertools.product(*(key.sweep_string_iterator() for key in self.swept)):
            yield self.job(dict(zip(names, values)))

    def job(self, chosen: Values) -> SweepJob:
        """Return the job with the `chosen` values.

        Its folder's name has the last part of each swept key, or the whole key if two keys end alike, and a hash if
        characters were replaced or cut.
        """
        words = []
        for item in self.overrides:
            key = item.key_or_group
            if key != "run_dir":
                words.append(f"{item.get_key_element()}={chosen[key]}" if key in chosen else item.input_line)
        ends = [key.rpartition(".")[2] for key in chosen]
        parts = []
        for key, end in zip(chosen, ends):
            parts.append(f"{end if ends.count(end) == 1 else key}={str(chosen[key]).strip(_QUOTES)}")
        full = ",".join(sorted(parts)) or "job"
        name = re.sub(r"[^\w.,=+-]+", "_", full).encode()[:_NAME_BYTES].decode(errors="ignore")
        if name != full:
            name = f"{name}-{sha256_text(full)[:8]}"
        folder = f"{self.base}/{name}"
        return SweepJob((*words, f"run_dir={folder}"), folder)


def parse_sweep(words: Sequence[str]) -> Sweep:
    """Parse the words of a command line. Raises ConfigError for a wrong value of `sweep`."""
    overrides = OverridesParser.create().parse_overrides([word for word in words if word not in FLAGS])
    values = OmegaConf.to_container(OmegaConf.load(CONF / "common.yaml").sweep)
    base = None
    for item in overrides:
        if item.key_or_group.startswith("sweep."):
            values[item.key_or_group.removeprefix("sweep.")] = item.value()
        elif item.key_or_group == "run_dir":
            base = item.value()
    settings = validate({"sweep": values}, _SweepWords).sweep
    return Sweep(overrides, settings, str(base or f"outputs/sweeps/{settings.name}"))


def write_wandb_sweep(sweep: Sweep, script: str) -> int:
    """Write the swept values as a sweep of W&B, and return the exit status. Raises UserError (`sweep.wandb`).

    W&B's agents start the script with values such as `optim.lr=0.001`. They search if a key has a range.
    """
    parameters = {key.key_or_group: _to_wandb(key) for key in sweep.swept}
    fixed = [
        item.input_line for item in sweep.overrides if item.key_or_group not in (*parameters, "run_dir", "tracking")
    ]
    values = {
        "program": Path(script).name,
        "method": "bayes" if any(key.is_interval_sweep() for key in sweep.swept) else "grid",
        "metric": {"name": OBJECTIVE, "goal": "maximize"},
        "parameters": parameters,
        "command": ["${env}", "${interpreter}", "${program}", "tracking=wandb", *fixed, "${args_no_hyphens}"],
    }
    file = Path(sweep.settings.wandb)
    with output_errors("sweep.wandb", file):
        write_json(file, values)  # YAML that W&B reads
    log.info("wrote %s: wandb sweep %s prints the command for agents", file, file)
    return EXIT_OK


def _to_wandb(key: Override) -> Json:
    value = key.value()
    if not isinstance(value, IntervalSweep):
        return {"values": [*key.sweep_string_iterator()]}
    if "int" in value.tags:
        return {"min": int(value.start), "max": int(value.end)}
    return {
        "distribution": "log_uniform_values" if "log" in value.tags else "uniform",
        "min": value.start,
        "max": value.end,
    }


def run_jobs(jobs: Iterator[SweepJob], settings: SweepConfig, script: str) -> dict[SweepJob, int]:
    """Run jobs as processes of a script and return their exit statuses.

    A stop signal is forwarded to the running jobs, no further job starts, and the sweep raises SystemExit(75). A
    launcher starts the sweep on each rank: then jobs run in turn, and each rank starts its process of a job.
    """
    if detect_world().size > 1 and settings.gpus:
        raise UserError("sweep.gpus: its jobs have one rank each; start the sweep without a launcher")
    waiting = iter([*jobs])
    statuses = {}

    def work(gpu: int | None) -> None:
        for job in waiting:
            status = EXIT_OK
            if job.is_complete:
                log.info("complete already: %s", job.folder)
            elif stop.requested:
                return
            else:
                status = _run(job, script, gpu, stop)
            statuses[job] = status

    gpus = settings.gpus or [None]
    with StopRequest() as stop, ThreadPoolExecutor(len(gpus)) as pool:
        list(pool.map(work, gpus))
    if stop.requested:
        raise SystemExit(EXIT_STOPPED)
    return statuses


def _run(job: SweepJob, script: str, gpu: int | None, stop: StopRequest) -> int:
    """Run a job and return its status. Its output goes to the terminal, or with a GPU to a file beside its folder."""
    folder = Path(job.folder)
    with output_errors("run_dir", folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {"WANDB_RUN_GROUP": folder.parent.name, **os.environ}
    output = nullcontext()
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        output = open(f"{folder}.log", "ab")  # noqa: SIM115 (closed below)
    log.info("started: %s", folder)
    with output as stream:
        # In a new session: the sweep forwards Ctrl-C as a request to save.
        process = subprocess.Popen(
            [sys.executable, script, *job.words],
            env=environment, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
    while process.poll() is None and not stop.requested:
        time.sleep(_LOOK_SEC)
    process.terminate()  # does nothing to a process that has ended
    status = process.wait()
    status = status if status >= 0 else 128 - status  # a signal's number as in a shell
    if status not in (EXIT_OK, EXIT_STOPPED):
        log.error("failed with status %d: %s", status, folder)
    return status
