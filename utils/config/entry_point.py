"""From the command line to one validated configuration object.

Hydra composes plain YAML from conf/, and the script's schema, a pydantic model, validates it once. No later code sees a
DictConfig. Errors are shown as a list of dotted keys with a fix, with exit status 2 and without a traceback.

    @entry_point("finetune", FinetuneConfig)
    def main(config: FinetuneConfig, job: Job) -> None: ...

    if __name__ == "__main__":
        main()
"""

import gc
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from utils.config.command_line import (
    SPELLINGS,
    Job,
    Script,
    join_spaces,
    literal,
    quote_paths,
    respell,
    store_experiment,
)
from utils.config.help import CONF, list_options
from utils.config.messages import ConfigError, Schema, hydra_problem, validate
from utils.config.recipe import flatten
from utils.config.sweep_config import FLAGS
from utils.errors import (
    EXIT_CRASH,
    EXIT_INTERRUPTED,
    EXIT_LOST_RANK,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    UserError,
    find_lack,
    lost_worker,
)
from utils.io.safe_text import Lines, hide_secrets, message_lines
from utils.ranks import distributed
from utils.ranks.signals import StopRequest, Terminated
from utils.record.logging import environment_rank, log, own_place, setup_logging
from utils.record.run_reader import run_of
from utils.start import open_name

Main = Callable[[Schema, Job], str | None]
_SHOW = ("--cfg", "job")  # prints the configuration
OmegaConf.clear_resolver("oc.env")  # a configuration is written to files, and variables are secrets
_NO_FILE = re.compile(r"(?i)null|true|false|[-+]?[\d._]+(e[-+]?\d+)?")  # Hydra reads these as other types than text


def follow_init_from(values: DictConfig, job: Job) -> Job:
    """Copy `model` from the run that `init_from` names into `values`; return the job with that choice.

    A model that the command line or an experiment chooses stays, and so do the keys of a model that they state.
    """
    source = OmegaConf.select(values, "init_from", throw_on_missing=False)
    is_chosen = job.states("model.family")
    run = None if is_chosen or not source or "model" not in values else run_of(Path(source).expanduser())
    model = {} if run is None else run.config.get("model")
    if not isinstance(model, dict) or "name" not in model:
        return job
    before = flatten({"model": OmegaConf.to_container(values.model)})
    values.model = literal(model)
    for key, value in before.items():
        if job.states(key):
            OmegaConf.update(values, key, value)
    log.debug("model: %s, the network of init_from", model["name"])
    return replace(job, choices={**job.choices, "model": str(model["name"])})


def _check_word(word: str) -> None:
    """Raise ConfigError for a word that Hydra would ignore, or answer with a traceback."""
    key, _, value = word.partition("=")
    name = key.lstrip("+~")
    if re.search("[\ud800-\udfff]", word):  # not UTF-8
        raise ConfigError(f"{key!a}: must be UTF-8, found {value!a}")
    if re.match(r"hydra\b", name):
        raise ConfigError(f"{name}: Hydra only composes the keys here; --help lists those for run folders and sweeps")
    if value.startswith("glob("):
        raise ConfigError(f"{name}: {value} is not read; write the values, {name}=A,B, and add --multirun")
    if _NO_FILE.fullmatch(value) and (options := list_options(name)):
        raise ConfigError(f"{name}: {value} names no file; known: {', '.join(options)}")


@dataclass(frozen=True)
class Command(Generic[Schema]):
    """A script as a command. Tests and notebooks can call its parts in their own process."""

    script: str
    main: Main | str  # or a name, `module:function`, imported after the validation
    schema: type[Schema]
    config_dir: Path = CONF
    # Refuses a configuration before the main function is imported.
    check: Callable[[Schema], None] = lambda config: None

    def __call__(self) -> None:
        """Run the command in sys.argv and exit with its status."""
        with self._exiting():
            config, job = self.prepare(sys.argv[1:])
            if line := self.load()(config, job):
                log.info("%s", line)

    @contextmanager
    def _exiting(self) -> Iterator[None]:
        """Show an error of the body, and exit with its status. No frame of this function is below the main function."""
        if not gc.isenabled():  # since `begin`; a notebook's own objects are not frozen
            gc.freeze()
            gc.enable()
        setup_logging()
        status = EXIT_OK
        try:
            with StopRequest(at_once=True):
                yield
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            try:
                status = self._report(error)
            except RuntimeError as later:  # from torch's signal handler: a loader worker died
                status = self._report(later)
            traceback.clear_frames(error.__traceback__)  # they keep networks, which `shutdown` wants to be freed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch raises if a loader worker ends during the exit
        grouped = distributed.shutdown(failed=status != EXIT_OK)
        sys.stdout.flush()
        sys.stderr.flush()
        if grouped or status == EXIT_STOPPED:  # gloo might abort the shutdown, or W&B still wait for an upload
            os._exit(status)
        sys.exit(status)

    def prepare(self, arguments: list[str]) -> tuple[Schema, Job]:
        """Return the checked configuration and the job. A sweep, or `--cfg`, ends the process instead."""
        arguments = join_spaces(arguments)
        for word in arguments:
            _check_word(word)
        try:
            if FLAGS & set(arguments):
                sys.exit(self._run_sweep(quote_paths(arguments, self.schema)))
            values, job = self.compose([word for word in arguments if word not in _SHOW])
            if "--cfg" in arguments:
                sys.stdout.write(hide_secrets(OmegaConf.to_yaml(values)))
                sys.exit()
            job = follow_init_from(values, job)
            config = validate(values, self.schema)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(hydra_problem(error, self.schema)) from None
        self.check(config)
        return config, job

    def load(self) -> Main:
        """Return the main function."""
        return open_name(self.main) if isinstance(self.main, str) else self.main

    def compose(self, words: list[str]) -> tuple[DictConfig, Job]:
        """Compose the configuration from conf/ and the words of a command line."""
        typed = {word.partition("=")[0].lstrip("+") for word in words}
        script = Script(self.script, self.schema, self.config_dir, typed)
        words = respell(words, script, *SPELLINGS)
        read = [*respell(words, script, store_experiment), f"hydra.searchpath=['file://{CONF}']"]
        with hydra.initialize_config_dir(str(self.config_dir), version_base="1.3"):
            values = hydra.compose(self.script, read, return_hydra_config=True)
        choices = {name: str(choice) for name, choice in values.hydra.runtime.choices.items() if "hydra/" not in name}
        with open_dict(values):
            del values["hydra"]
        return values, Job(self.script, choices, words)

    def _run_sweep(self, arguments: list[str]) -> int:
        """Run the jobs of a --multirun and log a table of all jobs in the sweep's folder."""
        if "sweep" not in self.schema.model_fields:
            raise ConfigError(f"--multirun: is for training; {self.script}.py takes one value for each key")
        from utils.config.sweep import parse_sweep, run_jobs, write_wandb_sweep
        from utils.record.sweep_table import read_jobs, sweep_table

        sweep = parse_sweep(arguments)
        if sweep.settings.wandb is not None:
            return write_wandb_sweep(sweep, sys.argv[0])
        statuses = run_jobs(sweep.jobs(), sweep.settings, sys.argv[0])
        jobs = read_jobs(Path(sweep.base))
        if jobs and environment_rank() == 0:
            log.info("%s", Lines(sweep_table(jobs)))
        return max(statuses.values(), default=EXIT_OK)

    def _report(self, error: BaseException) -> int:
        """Show an error, and return its exit status.

        Other ranks than 0 show the first line, or nothing if all ranks have the error. All show a defect whole.
        """
        if isinstance(error, SystemExit):  # after a sweep, or a training that was stopped
            return error.code or EXIT_OK
        status, message = _explain(error)
        text = "".join(traceback.format_exception(error)) if message is None else f"{self.script}.py: {message}"
        lines = message_lines(text).splitlines()
        if environment_rank() and message is not None:
            lines = [] if isinstance(error, ConfigError | KeyboardInterrupt) else lines[:1]
        sys.stderr.writelines(f"{own_place()}{line}\n" for line in lines)
        return status


def _explain(error: BaseException) -> tuple[int, str | None]:
    """Return the exit status of an error and its message, which is None for a defect."""
    match error:
        case Terminated():  # outside the training loop, which saves
            return EXIT_STOPPED, f"stopped by {error}; type the same command again"
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "interrupted"
        case UserError():
            return error.status, str(error)
    if message := find_lack(error):
        return EXIT_CRASH if isinstance(error, OSError) else EXIT_USER_ERROR, message
    message = lost_worker(error)
    return EXIT_LOST_RANK if message else EXIT_CRASH, message


def recompose(job: Job, words: Sequence[str], schema: type[Schema]) -> Schema:
    """Return the configuration of a job with more words, for keys that its own do not set."""
    values, job = Command(job.script, lambda config, job: None, schema).compose([*words, *job.overrides])
    follow_init_from(values, job)
    return validate(values, schema)


def entry_point(config_name: str, schema: type[Schema]) -> Callable[[Main], Command[Schema]]:
    """Turn `main(config, job)` into a command; main returns the last line of the log."""
    return lambda main: Command(config_name, main, schema)
