"""What a run folder says of its run: its configuration, and whether it is complete."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from utils.errors import UserError
from utils.io.files import canonical_json, ignore_write_errors, read_json, write_json
from utils.io.safe_text import hide_secrets

CONFIG_FILE = "config.json"
OVERRIDES_FILE = "overrides.txt"
_COMPLETE_FILE = "complete.json"
Part = TypeVar("Part", bound=BaseModel)


def read_run_config(path: Path) -> dict[str, Any]:
    """Return the configuration that a run folder was made with (`script` beside the schema's keys)."""
    file = path / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"run_dir: {path} is not a run folder: it has no config.json; name a folder that training made")
    try:
        config = read_json(file)
        canonical_json(config)  # which refuses NaN: a configuration has none
    except ValueError as error:
        raise UserError(f"run_dir: {file} is damaged ({error})") from None
    except OSError as error:
        raise UserError(f"run_dir: {file} cannot be read ({error.strerror})") from None
    if not isinstance(config, dict):
        raise UserError(f"run_dir: {file} is damaged (it holds no configuration)")
    return config


def read_run_part(path: Path, schema: type[Part]) -> Part:
    """Return what a schema names of a run's configuration. Raises UserError (`run_dir`) where it is wrong."""
    try:
        return schema.model_validate(read_run_config(path))
    except ValidationError as error:
        where, why = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise UserError(f"run_dir: {path / CONFIG_FILE} is damaged ({where}: {why}); name another run") from None


def settings_of(overrides: Iterable[str]) -> frozenset[str]:
    """Return the overrides that say what a run is, not where it is or of which sweep; without secrets."""
    return frozenset(hide_secrets(text) for text in overrides if not text.startswith(("run_dir=", "sweep.")))


def read_settings(path: Path) -> frozenset[str]:
    """Return the overrides that a run was started with, as `settings_of` does."""
    file = path / OVERRIDES_FILE
    return settings_of(file.read_text(encoding="utf-8").splitlines() if file.exists() else ())


def is_complete(path: Path) -> bool:
    """Return whether the run of a folder has ended and does not go on."""
    return (path / _COMPLETE_FILE).exists()


def mark_complete(path: Path, step: int | None) -> None:
    """Write that a run has ended at `step` and does not go on; None: that it goes on. A write error is a warning."""
    file = path / _COMPLETE_FILE
    with ignore_write_errors(file):
        if step is None:
            file.unlink(missing_ok=True)
        else:
            write_json(file, {"step": step})
