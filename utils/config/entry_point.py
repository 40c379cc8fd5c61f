"""From the command line to one validated configuration object.

Hydra composes plain YAML from conf/; a pydantic model (the entry script's schema) checks the whole of it once; from
there on no code sees a DictConfig. Errors of either are shown as a list of dotted keys with what to do, exit status 2
and no traceback.

    @entry_point("finetune", FinetuneConfig)
    def main(config: FinetuneConfig, job: Job) -> None: ...

    if __name__ == "__main__":
        main()
"""

import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from utils.config.messages import (
    ConfigError,
    encoding_problems,
    hydra_problem,
    missing_problems,
    validation_problems,
)
from utils.config.options import ROOT, list_options
from utils.config.schema import Strict, path_keys
from utils.config.source_model import follow_init_from
from utils.config.sweep import FLAGS, JobResult, Sweep, parse_sweep
from utils.config.sweep_processes import run_at_once
from utils.errors import (
    EXIT_CRASH,
    EXIT_INTERRUPTED,
    EXIT_LOST_RANK,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    UserError,
    lost_worker,
)
from utils.io.safe_text import Lines, safe_lines
from utils.ranks import distributed
from utils.ranks.job_status import note_status
from utils.record.logging import environment_rank, get_logger, place_of, setup_logging
from utils.record.sweep_table import read_jobs, sweep_table, with_results
from utils.record.trackers import has_unfinished

log = get_logger(__name__)
Schema = TypeVar("Schema", bound=Strict)

CONF = ROOT / "conf"


@dataclass(frozen=True)
class Job:
    """The command line beside the values: script, chosen groups, overrides, name in a sweep."""

    script: str
    choices: dict[str, str]
    overrides: list[str]
    sweep_name: str | None = None


def quote_paths(arguments: list[str], keys: Container[str], multirun: bool) -> list[str]:
    """Quote the values of some keys, which are paths, so that Hydra takes them literally; quoted values stay.

    Hydra's grammar refuses paths with non-Latin letters, commas, brackets, `=` or `&`. In a multirun, a comma in a
    value that names no existing file separates two values, as Hydra has it. A value in brackets with a comma is a list
    of paths.
    """
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key.lstrip("+") in keys:
            if _is_list(value):
                quoted.append(f"{key}=[{','.join(_quote(part.strip()) for part in value[1:-1].split(','))}]")
                continue
            sweeps = multirun and not Path(value).exists() and not set("'\"") & set(value)
            argument = f"{key}={','.join(map(_quote, value.split(',') if sweeps else [value]))}"
        quoted.append(argument)
    return quoted


def _is_list(value: str) -> bool:
    return value.startswith("[") and value.endswith("]") and "," in value and not Path(value).exists()


def order_arguments(arguments: list[str]) -> list[str]:
    """Put the overrides behind the flags: argparse takes no override behind a flag that follows another override."""
    return sorted(arguments, key=lambda argument: not argument.startswith("-") and "=" in argument)


def _quote(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    plain = is_quoted or value in ("", "null", "???")
    return value if plain else QuotedString(value, Quote.single).with_quotes()


def validate(values: Any, schema: type[Schema]) -> Schema:
    """Check composed values against the schema. Raises ConfigError with one line per wrong key."""
    container = OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else values
    if problems := encoding_problems(container):  # pydantic fails with some of them
        raise ConfigError(problems)
    problems = missing_problems(container)  # a text field would take `???` for a text
    try:
        config = schema.model_validate(container)
    except ValidationError as error:
        problems += validation_problems(error, container, schema)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def _job_from_hydra(script: str, sweep: Sweep | None) -> Job:
    state = HydraConfig.get()
    overrides = OmegaConf.to_container(state.overrides.task, resolve=False)  # `${...}` is resolved with the values
    choices = {name: str(choice) for name, choice in state.runtime.choices.items() if not name.startswith("hydra/")}
    return Job(script, choices, overrides, None if sweep is None else sweep.name_job(overrides))


def _say(message: str, *, other_ranks: bool = False) -> None:
    """Show an error from rank 0; the first line from other ranks too where one of them may be alone with it."""
    rank, message = environment_rank(), safe_lines(message)
    if rank == 0:
        sys.stderr.write(f"{place_of(rank)}{message}\n")
    elif other_ranks:
        sys.stderr.write(f"{place_of(rank)}{message.splitlines()[0]}\n")


def _leave(status: int) -> None:
    """End the process, without the interpreter's shutdown where gloo may abort it or a tracker hold it up."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch raises where a loader's worker ends while we leave
    note_status(status)
    grouped = distributed.shutdown(failed=status != EXIT_OK)
    sys.stdout.flush()
    sys.stderr.flush()
    if grouped or has_unfinished():
        os._exit(status)
    sys.exit(status)


def _check_arguments(arguments: list[str]) -> None:
    """Refuse Hydra's rerun option, which reads a pickle, and groups without or with a second file, as Hydra does."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.startswith("--experimental-rerun"):
            raise ConfigError([f"{key}: reads a pickled file, which Atelier never does; give the overrides"])
        group = key.lstrip("+")
        if (value == "null" or key != group) and (options := list_options(group, CONF)):
            raise ConfigError([f"{group}: {argument} chooses no file; write {group}=NAME, one of {', '.join(options)}"])


@dataclass(frozen=True)
class Command(Generic[Schema]):
    """A script as a command. Its parts serve those who compose and run it in their own process (tests, notebooks)."""

    script: str
    main: Callable[[Schema, Job], str | None]
    schema: type[Schema]
    config_dir: Path

    def __call__(self) -> None:
        """Run the command of sys.argv, and end the process with its status."""
        setup_logging()  # again for each job of a sweep
        os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises, and the errors are ours to show
        try:
            status = self._run(sys.argv[1:])
        except (UserError, HydraException, OmegaConfBaseException) as error:
            status, _ = self._report(error)
        except ValueError as error:  # jobs raise nothing, so it is Hydra's: options that exclude each other
            status, _ = self._report(HydraException(str(error)))
        except SystemExit as stop:
            if stop.code not in (EXIT_STOPPED, EXIT_LOST_RANK):
                raise
            status = stop.code
        except KeyboardInterrupt:  # before or after the training, which saves
            status = EXIT_INTERRUPTED
            _say(f"{self.script}.py: interrupted")
        _leave(status)

    def _run(self, arguments: list[str]) -> int:
        """Run the job or the sweep of some arguments; returns the greatest exit status."""
        _check_arguments(arguments)
        multirun = not set(FLAGS).isdisjoint(arguments)
        arguments = quote_paths(order_arguments(arguments), path_keys(self.schema), multirun)
        sweep = parse_sweep(arguments) if multirun else None
        if sweep is None or sweep.is_in_turn:
            results = self._run_in_turn(arguments, sweep)
            status = max((result.status for result in results), default=EXIT_OK)
        else:
            status, results = run_at_once(sweep, sys.argv[0])
        if sweep is not None and environment_rank() == 0:
            self._log_table(sweep, results)
        return status

    def _log_table(self, sweep: Sweep, results: list[JobResult]) -> None:
        """Log the jobs of a sweep, those of its folder too, the best first."""
        jobs = read_jobs(Path(sweep.base)) if "sweep" in self.schema.model_fields else []  # else they have no folders
        if jobs := with_results(jobs, results):
            setup_logging()  # Hydra has switched our loggers off again
            log.info("%s", Lines(sweep_table(jobs)))

    def _run_in_turn(self, arguments: list[str], sweep: Sweep | None) -> list[JobResult]:
        """Let Hydra compose and run the jobs, in this process."""
        results: list[JobResult] = []

        def job(values: DictConfig) -> None:
            results.append(self._run_job(values, sweep))

        elsewhere = self.config_dir != CONF  # a stranger's primary file finds our groups
        sys.argv[1:] = [*arguments, f"hydra.searchpath=['file://{CONF}']"] if elsewhere else arguments
        hydra.main(config_path=str(self.config_dir), config_name=self.script, version_base="1.3")(job)()
        return results

    def _run_job(self, values: DictConfig, sweep: Sweep | None) -> JobResult:
        """Validate and run one job; every way it can end becomes an exit status."""
        setup_logging()
        job = _job_from_hydra(self.script, sweep)
        try:
            job = replace(job, choices=follow_init_from(values, job.overrides, job.choices))
            return JobResult(job.overrides, EXIT_OK, self.main(validate(values, self.schema), job) or "done")
        except Exception as error:
            try:
                return JobResult(job.overrides, *self._report(error))
            except RuntimeError as later:  # a loader's worker has died: torch's signal handler raises wherever it is
                return JobResult(job.overrides, *self._report(later))

    def _report(self, error: Exception) -> tuple[int, str]:
        """Show an error; returns its exit status and its line in a sweep's table."""
        if isinstance(error, HydraException | OmegaConfBaseException):
            error = ConfigError([hydra_problem(error, self.schema, CONF)])
        if isinstance(error, ConfigError):
            _say(f"{self.script}.py: {error}")
            return EXIT_USER_ERROR, error.problems[0]
        if isinstance(error, UserError):
            _say(f"{self.script}.py: {error}", other_ranks=True)
            return EXIT_USER_ERROR, str(error).splitlines()[0]
        if type(error).__name__ == "OutOfMemoryError":  # torch's; training names the stage and the shape itself
            message = f"the device is out of memory ({error}); set a smaller batch size, or a smaller model or image"
            _say(f"{self.script}.py: {message}", other_ranks=True)
            return EXIT_USER_ERROR, message.splitlines()[0]
        if (lost := lost_worker(error)) is not None:
            _say(f"{self.script}.py: {lost}", other_ranks=True)
            return EXIT_LOST_RANK, lost
        # A defect: show its traceback; the sweep continues.
        text = safe_lines("".join(traceback.format_exception(error)))
        sys.stderr.write(textwrap.indent(text, place_of(environment_rank()), lambda line: True))
        return EXIT_CRASH, f"{type(error).__name__}: {error}".splitlines()[0]


def entry_point(
    config_name: str, schema: type[Schema], config_dir: Path = CONF
) -> Callable[[Callable[[Schema, Job], str | None]], Command[Schema]]:
    """Turn `main(config, job)` into a command; its return value is its line in a sweep's table."""
    return lambda main: Command(config_name, main, schema, config_dir)
