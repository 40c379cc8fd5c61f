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
import sys
import textwrap
import traceback
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from utils.config.messages import (
    ConfigError,
    encoding_problems,
    hydra_problem,
    list_options,
    missing_problems,
    validation_problems,
)
from utils.config.schema import Strict, path_keys
from utils.config.sweep import FLAGS, name_sweep_job, parse_sweep
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
from utils.record.background import has_unfinished
from utils.record.logging import environment_rank, get_logger, place_of, setup_logging
from utils.record.sweep_table import RESULT_FILE, read_jobs, sweep_table
from utils.text_table import align_columns

log = get_logger(__name__)
Schema = TypeVar("Schema", bound=Strict)

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"


@dataclass(frozen=True)
class Job:
    """The command line beside the values: script, chosen groups, overrides, name in a sweep."""

    script: str
    choices: dict[str, str]
    overrides: list[str]
    sweep_name: str | None = None


@dataclass
class JobResult:
    """A row of the table at a sweep's end."""

    overrides: list[str]
    status: int
    result: str


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


def _job_from_hydra(script: str) -> Job:
    state = HydraConfig.get()
    overrides = OmegaConf.to_container(state.overrides.task, resolve=False)  # `${...}` is resolved with the values
    choices = {name: str(choice) for name, choice in state.runtime.choices.items() if not name.startswith("hydra/")}
    sweep_name = None
    if state.mode == RunMode.MULTIRUN:
        sweep_name = name_sweep_job(overrides)
    return Job(script, choices, overrides, sweep_name)


def _say(message: str, *, other_ranks: bool = False) -> None:
    """Show an error from rank 0; the first line from other ranks too where one of them may be alone with it."""
    rank, message = environment_rank(), safe_lines(message)
    if rank == 0:
        sys.stderr.write(f"{place_of(rank)}{message}\n")
    elif other_ranks:
        sys.stderr.write(f"{place_of(rank)}{message.splitlines()[0]}\n")


def _table(results: list[JobResult]) -> str:
    """Return the jobs of a sweep as a table; overrides common to all jobs are omitted."""
    everywhere = set.intersection(*(set(result.overrides) for result in results))
    rows = [("job", "status", "result")]
    rows += [
        (
            " ".join(o for o in r.overrides if o not in everywhere) or "-",
            "ok" if r.status == EXIT_OK else f"failed ({r.status})",
            r.result,
        )
        for r in results
    ]
    return align_columns(rows)


def _log_ranking(folder: Path) -> None:
    """Log the jobs of a sweep, the best first, where their runs have results."""
    if any((path / RESULT_FILE).exists() for path in folder.glob("*")):
        log.info("%s", Lines(sweep_table(read_jobs(folder))))


def _leave(status: int) -> None:
    """End the process, without the interpreter's shutdown where gloo may abort it or a tracker hold it up."""
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
        if sweep is not None and not sweep.is_in_turn:
            status = run_at_once(sweep, sys.argv[0])
            _log_ranking(Path(sweep.base))
            return status
        results = self._run_in_turn(arguments)
        if (multirun or len(results) > 1) and results and environment_rank() == 0:
            setup_logging()  # Hydra has switched our loggers off again
            if sweep is not None:
                _log_ranking(Path(sweep.base))
            log.info("%s", Lines(_table(results)))
        return max((result.status for result in results), default=EXIT_OK)

    def _run_in_turn(self, arguments: list[str]) -> list[JobResult]:
        """Let Hydra compose and run the jobs, in this process."""
        results: list[JobResult] = []

        def job(values: DictConfig) -> None:
            results.append(self._run_job(values))

        elsewhere = self.config_dir != CONF  # a stranger's primary file finds our groups
        sys.argv[1:] = [*arguments, f"hydra.searchpath=['file://{CONF}']"] if elsewhere else arguments
        hydra.main(config_path=str(self.config_dir), config_name=self.script, version_base="1.3")(job)()
        return results

    def _run_job(self, values: DictConfig) -> JobResult:
        """Validate and run one job; every way it can end becomes an exit status."""
        setup_logging()
        job = _job_from_hydra(self.script)
        try:
            return JobResult(job.overrides, EXIT_OK, self.main(validate(values, self.schema), job) or "done")
        except Exception as error:
            return JobResult(job.overrides, *self._report(error))

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
