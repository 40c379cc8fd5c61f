"""From the command line to one validated configuration object.

Hydra composes plain YAML from conf/; a pydantic model (the entry script's schema) checks the whole of it once; from
there on nobody sees a DictConfig. Errors of either are shown as a list of dotted keys with what to do, exit status 2
and no traceback.

    @entry_point("finetune", FinetuneConfig)
    def main(config: FinetuneConfig, job: Job) -> None: ...

    if __name__ == "__main__":
        main()
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from utils import distributed
from utils.config_errors import ConfigError, hydra_problem, validation_problems
from utils.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from utils.logging import environment_rank, get_logger, setup_logging
from utils.schema import Strict

log = get_logger(__name__)
Schema = TypeVar("Schema", bound=Strict)

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
# Hydra's grammar refuses paths with non-Latin letters, commas, brackets, `=` or `&`: these keys' values are quoted.
PATH_KEYS = ("run_dir", "data.root", "init_from", "resume", "input", "output", "weights")


@dataclass(frozen=True)
class Job:
    """What the command line says beside the values: script, chosen groups, overrides, place in a sweep."""

    script: str
    choices: dict[str, str]
    overrides: list[str]
    sweep_name: str | None = None


@dataclass
class JobResult:
    """A row of the table at a sweep's end."""

    overrides: str
    status: int
    result: str


def quote_paths(arguments: list[str], multirun: bool) -> list[str]:
    """Quote the values of path keys so that Hydra takes them as they are.

    In a multirun, a comma in a value that names no existing file separates two values, as Hydra has it.
    """
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        plain = (
            not equals
            or key.lstrip("+") not in PATH_KEYS
            or value in ("", "null", "???")
            or (value[0] == value[-1] and value[0] in "'\"" and len(value) > 1)
            or (multirun and "," in value and not Path(value).exists())
        )
        if not plain:
            # Inside quotes Hydra reads \' as a quote, and backslashes as such except before the closing quote.
            escaped = value.replace("'", "\\'")
            if escaped.endswith("\\"):
                escaped += "\\"
            argument = f"{key}='{escaped}'"
        quoted.append(argument)
    return quoted


def validate(values: Any, schema: type[Schema]) -> Schema:
    """Check composed values against the schema. Raises ConfigError with one line per wrong key."""
    container = OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else values
    try:
        return schema.model_validate(container)
    except ValidationError as error:
        raise ConfigError(validation_problems(error, container, schema)) from None


def _job_from_hydra(script: str) -> Job:
    state = HydraConfig.get()
    choices = {name: str(choice) for name, choice in state.runtime.choices.items() if not name.startswith("hydra/")}
    sweep_name = None
    if state.mode == RunMode.MULTIRUN:
        swept = [text for text in state.overrides.task if not text.startswith("run_dir=")]
        sweep_name = re.sub(r"[^\w.,=+-]+", "_", ",".join(sorted(swept)))[:180] or "job"
    return Job(script, choices, list(state.overrides.task), sweep_name)


def _run_job(
    main: Callable[[Any, Job], str | None], schema: type[Schema], script: str, values: DictConfig
) -> JobResult:
    """Validate and run one job; every way it can end becomes an exit status."""
    setup_logging()
    job = _job_from_hydra(script)
    name = " ".join(job.overrides)
    try:
        # A resolver or a `???` is Hydra's to report; both come as OmegaConf errors.
        return JobResult(name, EXIT_OK, main(validate(values, schema), job) or "done")
    except ConfigError as error:
        _say(f"{script}.py: {error}")
        return JobResult(name, EXIT_USER_ERROR, error.problems[0])
    except UserError as error:
        _say(f"{script}.py: {error}")
        return JobResult(name, EXIT_USER_ERROR, str(error).splitlines()[0])
    except (HydraException, OmegaConfBaseException) as error:
        _say(f"{script}.py: {ConfigError([hydra_problem(error)])}")
        return JobResult(name, EXIT_USER_ERROR, str(error).splitlines()[0])
    except Exception as error:  # a defect: its traceback, and the sweep goes on
        traceback.print_exc()
        return JobResult(name, EXIT_CRASH, f"{type(error).__name__}: {error}".splitlines()[0])


def _say(message: str) -> None:
    """Show an error once, from rank 0 (every rank finds the same)."""
    if environment_rank() == 0:
        sys.stderr.write(message + "\n")


def _table(results: list[JobResult]) -> str:
    """Return the jobs of a sweep as a table."""
    rows = [("job", "status", "result")]
    rows += [(r.overrides, "ok" if r.status == EXIT_OK else f"failed ({r.status})", r.result) for r in results]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows)


def _leave(status: int) -> None:
    """End the process; with a process group, without the interpreter's own end, which gloo may abort."""
    grouped = distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if grouped:
        os._exit(status)
    sys.exit(status)


def _check_arguments(arguments: list[str]) -> None:
    """Refuse Hydra's rerun option: it reads a pickle."""
    if any(argument.startswith("--experimental-rerun") for argument in arguments):
        raise ConfigError(["--experimental-rerun: reads a pickled file, which Atelier never does; give the overrides"])


def entry_point(
    config_name: str, schema: type[Schema], config_dir: Path = CONF
) -> Callable[[Callable[[Schema, Job], str | None]], Callable[[], None]]:
    """Turn `main(config, job)` into a command; what it returns is its line in a sweep's table."""

    def decorate(main: Callable[[Schema, Job], str | None]) -> Callable[[], None]:
        def command() -> None:
            setup_logging()  # again for each job of a sweep
            os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises, and the errors are ours to show
            results: list[JobResult] = []
            arguments = sys.argv[1:]
            multirun = "--multirun" in arguments or "-m" in arguments
            sys.argv[1:] = quote_paths(arguments, multirun)
            if config_dir != CONF:  # a stranger's primary file finds our groups
                sys.argv.append(f"hydra.searchpath=['file://{CONF}']")

            def job(values: DictConfig) -> None:
                results.append(_run_job(main, schema, config_name, values))

            try:
                _check_arguments(sys.argv[1:])
                hydra.main(config_path=str(config_dir), config_name=config_name, version_base="1.3")(job)()
            except (HydraException, OmegaConfBaseException) as error:
                _say(f"{config_name}.py: {ConfigError([hydra_problem(error)])}")
                _leave(EXIT_USER_ERROR)
            except ConfigError as error:
                _say(f"{config_name}.py: {error}")
                _leave(EXIT_USER_ERROR)
            except SystemExit as stop:
                if stop.code == EXIT_STOPPED:
                    _leave(EXIT_STOPPED)
                raise
            if multirun and results and environment_rank() == 0:
                log.info("%s", _table(results))
            _leave(max((result.status for result in results), default=EXIT_OK))

        # What the command is made of, for callers that compose and run it in their own process (tests, notebooks).
        command.main, command.schema, command.config_dir = main, schema, config_dir
        return command

    return decorate
