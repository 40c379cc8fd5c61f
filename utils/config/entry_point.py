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
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.config.help import CONF, list_options
from utils.config.messages import ConfigError, Schema, hydra_problem, validate
from utils.config.schema import path_keys
from utils.config.source_model import follow_init_from
from utils.config.sweep import FLAGS, parse_sweep, run_sweep
from utils.errors import (
    EXIT_CRASH,
    EXIT_INTERRUPTED,
    EXIT_LOST_RANK,
    EXIT_OK,
    EXIT_USER_ERROR,
    UserError,
    lost_worker,
)
from utils.io.safe_text import Lines, safe_lines
from utils.ranks import distributed
from utils.record.logging import environment_rank, get_logger, place_of, setup_logging
from utils.record.sweep_table import read_jobs, sweep_table, with_failures
from utils.record.trackers import has_unfinished

log = get_logger(__name__)


@dataclass(frozen=True)
class Job:
    """The command line beside the values: script, chosen groups, overrides."""

    script: str
    choices: dict[str, str]
    overrides: list[str]


def quote_paths(arguments: list[str], keys: Container[str]) -> list[str]:
    """Quote the values of some keys, which are paths, so that Hydra takes them literally; quoted values stay.

    Hydra's grammar refuses paths with non-Latin letters, commas, brackets, `=` or `&`. A value in brackets with a comma
    is a list of paths; in a multirun a comma separates two values. Neither where a file has that name.
    """
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key.lstrip("+") in keys:
            is_one = "," not in value or os.path.exists(value)
            if not is_one and value.startswith("[") and value.endswith("]"):
                value = f"[{','.join(_quote(part.strip()) for part in value[1:-1].split(','))}]"
            elif not is_one and FLAGS & set(arguments) and not set("'\"") & set(value):
                value = ",".join(map(_quote, value.split(",")))
            else:
                value = _quote(value)
            argument = f"{key}={value}"
        quoted.append(argument)
    return quoted


def _quote(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    plain = is_quoted or value in ("", "null", "???")
    return value if plain else QuotedString(value, Quote.single).with_quotes()


@dataclass(frozen=True)
class Command(Generic[Schema]):
    """A script as a command. Its parts serve those who compose and run it in their own process (tests, notebooks)."""

    script: str
    main: Callable[[Schema, Job], str | None]
    schema: type[Schema]
    config_dir: Path

    def __call__(self) -> None:
        """Run the command of sys.argv, and end the process with its status."""
        setup_logging()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises, and the errors are ours to show
        try:
            status = self._run(sys.argv[1:])
        except SystemExit as stop:  # argparse, or a training that was stopped
            status = stop.code or EXIT_OK
        except KeyboardInterrupt:  # before or after the training, which saves
            status = EXIT_INTERRUPTED
            self._say("interrupted")
        except Exception as error:
            try:
                status = self._report(error)
            except RuntimeError as later:  # a loader's worker has died: torch's signal handler raises wherever it is
                status = self._report(later)
        _leave(status)

    def _run(self, arguments: list[str]) -> int:
        """Run the job or the sweep of some arguments; returns the greatest exit status."""
        for argument in arguments:
            key, _, value = argument.partition("=")
            if re.search("[\ud800-\udfff]", argument):  # bytes that are no UTF-8
                raise ConfigError([f"{key!a}: must be UTF-8, found {value!a}"])
            if value == "null" and (options := list_options(key)):
                raise ConfigError([f"{key}: null chooses no file; known: {', '.join(options)}"])
        arguments = quote_paths(arguments, path_keys(self.schema))
        try:
            if FLAGS & set(arguments):
                return self._run_sweep(arguments)
            values, job = self._compose(arguments)
            if values is not None:
                choices = follow_init_from(values, job.overrides, job.choices)
                config, job = validate(values, self.schema), Job(self.script, choices, job.overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([hydra_problem(error, self.schema)]) from None
        if values is not None:
            self.main(config, job)
        return EXIT_OK

    def _compose(self, arguments: list[str]) -> tuple[DictConfig | None, Job]:
        """Let Hydra compose the values; None where it was asked to show them (--cfg)."""
        composed: list[tuple[DictConfig, Job]] = []

        def take(values: DictConfig) -> None:
            state = HydraConfig.get()
            choices = {name: str(choice) for name, choice in state.runtime.choices.items() if "hydra/" not in name}
            # `${...}` is resolved with the values.
            overrides = OmegaConf.to_container(state.overrides.task, resolve=False)
            composed.append((values, Job(self.script, choices, overrides)))

        if self.config_dir != CONF:  # a stranger's primary file finds our groups
            arguments = [*arguments, f"hydra.searchpath=['file://{CONF}']"]
        # argparse takes no override behind a flag that follows another override.
        sys.argv[1:] = sorted(arguments, key=lambda argument: not argument.startswith("-") and "=" in argument)
        try:
            hydra.main(config_path=str(self.config_dir), config_name=self.script, version_base="1.3")(take)()
        except ValueError as error:  # options that exclude each other
            raise HydraException(str(error)) from None
        setup_logging()  # Hydra has switched our loggers off
        return composed[0] if composed else (None, Job(self.script, {}, []))

    def _run_sweep(self, arguments: list[str]) -> int:
        """Run the jobs of a --multirun, and log them with those of its folder, the best first."""
        if "sweep" not in self.schema.model_fields:
            raise ConfigError([f"--multirun: is of training; {self.script}.py takes one value of each key"])
        sweep = parse_sweep(arguments)
        statuses = run_sweep(sweep, sys.argv[0])
        jobs = with_failures(read_jobs(Path(sweep.base)), [(job.words, status) for job, status in statuses.items()])
        if jobs and environment_rank() == 0:
            log.info("%s", Lines(sweep_table(jobs)))
        return max(statuses.values(), default=EXIT_OK)

    def _say(self, message: str, *, other_ranks: bool = False) -> None:
        """Show an error from rank 0; the first line from other ranks too where one of them may be alone with it."""
        rank, message = environment_rank(), safe_lines(f"{self.script}.py: {message}")
        if rank == 0 or other_ranks:
            sys.stderr.write(f"{place_of(rank)}{message if rank == 0 else message.splitlines()[0]}\n")

    def _report(self, error: Exception) -> int:
        """Show an error; returns its exit status."""
        if isinstance(error, UserError):
            self._say(str(error), other_ranks=not isinstance(error, ConfigError))
            return EXIT_USER_ERROR
        if type(error).__name__ == "OutOfMemoryError":  # torch's; training names the stage and the shape itself
            advice = "set a smaller batch size, or a smaller model or image"
            self._say(f"the device is out of memory ({error}); {advice}", other_ranks=True)
            return EXIT_USER_ERROR
        if (lost := lost_worker(error)) is not None:
            self._say(lost, other_ranks=True)
            return EXIT_LOST_RANK
        text = safe_lines("".join(traceback.format_exception(error)))  # a defect
        sys.stderr.write(textwrap.indent(text, place_of(environment_rank()), lambda line: True))
        return EXIT_CRASH


def _leave(status: int) -> None:
    """End the process, without the interpreter's shutdown where gloo may abort it or a tracker hold it up."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch raises where a loader's worker ends while we leave
    grouped = distributed.shutdown(failed=status != EXIT_OK)
    sys.stdout.flush()
    sys.stderr.flush()
    if grouped or has_unfinished():
        os._exit(status)
    sys.exit(status)


def entry_point(
    config_name: str, schema: type[Schema], config_dir: Path = CONF
) -> Callable[[Callable[[Schema, Job], str | None]], Command[Schema]]:
    """Turn `main(config, job)` into a command."""
    return lambda main: Command(config_name, main, schema, config_dir)
