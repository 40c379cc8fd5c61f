"""Read a run folder, also during the run, and write what a run says of itself."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel

from utils.config.versions import read_saved
from utils.errors import UserError, about
from utils.io.files import Json, canonical_json, ignore_write_errors, is_locked, read_json, readable, write_atomically
from utils.io.safe_text import hide_secrets
from utils.record.logging import log
from utils.record.metrics_log import METRICS_FILE, Row, read_rows

CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
OVERRIDES_FILE = "overrides.txt"
LOCK_FILE = ".lock"
RESULT_FILE = "result.json"
COMPLETE_FILE = "complete.json"
PROGRESS_FILE = "progress.json"
OBJECTIVE = "objective"  # `RunReader.objective` in W&B's sweeps
NOTE_VARIABLE = "ATELIER_RUN_NOTE"  # a file in which a run writes its folder, for the SLURM job that may requeue it
# failed: it has ended with an error. dead: its process has vanished, by a kill or with its machine.
STATES = ("running", "requeued", "failed", "dead", "stopped", "finished")
Section = TypeVar("Section", bound=BaseModel)


class RunReader(NamedTuple):
    """A run folder; every access reads the current files."""

    path: Path

    @property
    def config(self) -> Json:
        """The run's configuration, with the key `script`. Raises UserError (`run_dir`)."""
        file = self.path / CONFIG_FILE
        if not file.is_file():
            raise UserError(
                f"run_dir: {self.path} is not a run folder: it has no {CONFIG_FILE}; name a folder that training made"
            )
        with about("run_dir"), readable(file, "JSON"):
            config = read_json(file)
            canonical_json(config)  # refuses NaN: a configuration has none
            if not isinstance(config, dict):
                raise ValueError("it has no keys")
        return read_saved(config)

    def part(self, schema: type[Section]) -> Section:
        """Return the part of the configuration that a schema describes. Raises UserError (`run_dir`)."""
        with about("run_dir"), readable(self.path / CONFIG_FILE, "JSON"):
            return schema.model_validate(self.config)

    @property
    def settings(self) -> frozenset[str]:
        """The overrides of the run's command, as `settings_of` returns them."""
        file = self.path / OVERRIDES_FILE
        return settings_of(file.read_text("utf-8").splitlines() if file.is_file() else ())

    @property
    def rows(self) -> list[Row]:
        """The rows of metrics.jsonl."""
        return [row for _, row in read_rows(self.path / METRICS_FILE)]

    @property
    def result(self) -> Json | None:
        """The best `value` of a `metric`, its `step` and `is_lowest_best`; None if it is missing or unreadable."""
        found = self._read(RESULT_FILE)
        is_whole = {"metric", "value", "is_lowest_best"} <= found.keys()
        return found if is_whole and isinstance(found["value"], int | float | None) else None

    @property
    def objective(self) -> float | None:
        """The best figure, or its negative where the lowest is best; None if there is none. Searches maximise it."""
        result = self.result
        if result is None or result["value"] is None:
            return None
        return -result["value"] if result["is_lowest_best"] else result["value"]

    @property
    def progress(self) -> Json:
        """What `write_progress` wrote last; nothing for a run of an older release or a damaged file."""
        return self._read(PROGRESS_FILE)

    @property
    def environment(self) -> Json:
        """The machine and the code of the run, as `environment_state` returned them."""
        return self._read(ENVIRONMENT_FILE)

    def _read(self, name: str) -> Json:
        try:
            found = read_json(self.path / name)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def kept(self) -> dict[int, Path]:
        """The weights of `loop.keep_weights_every` by step, in order."""
        files = self.path.glob("weights/step_*.safetensors")
        return dict(sorted((int(file.stem[5:]), file) for file in files if file.stem[5:].isdecimal()))

    def weights(self, which: str) -> Path:
        """Return the `best`, `last` or `ema` weight file, or that of a name. Raises UserError, which lists all files.

        A run that was not evaluated has no `best`; `best` is then its average, or else its last weights.
        """
        names = [f"{which}_weights.safetensors", which, f"{which}.safetensors"]  # the last two: such as step_000500
        if which == "best":
            names = [f"{name}_weights.safetensors" for name in ("best", "ema", "last")]
        found = [file for name in names if (file := self.path / "weights" / name).is_file()]
        if not found:
            files = sorted(file.stem.removesuffix("_weights") for file in self.path.glob("weights/*.safetensors"))
            known = f"it has {', '.join(files)}" if files else "is it a run folder that has saved a checkpoint?"
            raise UserError(f"the run {self.path} has no {which} weights; {known}")
        if which == "best" and found[0].name != names[0]:
            log.warning(
                "%s has no best weights, because it was not evaluated, or on few images; using %s",
                self.path,
                found[0].name,
            )
        return found[0]

    @property
    def is_complete(self) -> bool:
        """Whether the run has reached its last step."""
        return (self.path / COMPLETE_FILE).exists()

    @property
    def state(self) -> str:
        """What the run is, one of STATES. A run of an older release that is neither finished nor alive is `stopped`."""
        if self.is_complete or is_locked(self.path / LOCK_FILE):
            return "finished" if self.is_complete else "running"
        said = self.progress.get("state", "stopped")
        return said if said in STATES and said != "running" else "dead"


def write_progress(path: Path, state: str, **figures: float | str | None) -> None:
    """Write a run's state, `step`, `total_steps`, `left_sec`, `metric`, `best`; those not given stay.

    Write errors are logged.
    """
    with ignore_write_errors(file := path / PROGRESS_FILE):
        text = json.dumps({**RunReader(path).progress, **figures, "state": state})
        write_atomically(file, lambda temporary: temporary.write_text(text, "utf-8"), flush=False)


def run_of(path: Path) -> RunReader | None:
    """Return the run that a folder is, or that a weight file or a checkpoint belongs to."""
    whole = path.absolute()
    inside = [whole, *(child.parent for child in (whole, *whole.parents) if child.name in ("weights", "checkpoints"))]
    return next((RunReader(folder) for folder in inside if (folder / CONFIG_FILE).is_file()), None)


def settings_of(overrides: Iterable[str]) -> frozenset[str]:
    """Return the overrides, without secrets, that define a run: all but run_dir and the sweep."""
    return frozenset(hide_secrets(text) for text in overrides if not text.startswith(("run_dir=", "sweep.")))
