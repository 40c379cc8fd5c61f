"""Weights & Biases: the run of a run folder, online or offline.

W&B's own process uploads. What may wait for its server has a bound (`_settings`).
"""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from utils.errors import UserError
from utils.io.files import write_text
from utils.record.config import WandbTrackingConfig
from utils.record.figures import name_figures
from utils.record.logging import get_logger
from utils.record.report_files import TableRow
from utils.record.run_config import read_run_config

log = get_logger(__name__)

ID_FILE = "wandb_run_id.txt"
_MODES = ("online", "offline", "disabled")
_START_SEC = 30.0  # for W&B's server to answer
_ANSWER_SEC = 20.0  # for one attempt of a question
_MOST_ROWS = 1000  # of a table


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of a run. `config` is the saved configuration, with `script`.

    step: where the run begins or resumes; samples_per_step: the global batch size; sweep: the name of its multirun.
    """

    folder: Path
    config: Mapping[str, Any]
    step: int = 0
    samples_per_step: int = 1
    sweep: str | None = None


def import_wandb() -> Any:
    """Return the wandb package, without its reports of errors to its maker, which only make noise where it is down."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # takes 0.6 s

    return wandb


def choose_mode(options: WandbTrackingConfig) -> str:
    """Return online, offline or disabled: what `tracking.mode` means here.

    auto: WANDB_MODE, else online where there is an API key, else offline. Asks no server. Raises UserError
    (`tracking.mode`) where online is asked for and there is no key, or WANDB_MODE is unknown.
    """
    mode = os.environ.get("WANDB_MODE", "auto") if options.mode == "auto" else options.mode
    if mode not in (*_MODES, "auto"):
        raise UserError(
            f"tracking.mode: auto takes WANDB_MODE, and {mode!r} is not one of {', '.join(_MODES)}; change or unset it"
        )
    if mode not in ("online", "auto"):
        return mode
    problem = _find_problem()
    if problem is None:
        return "online"
    if mode == "online":
        raise UserError(f"tracking.mode: online was asked for, and {problem}; run `wandb login` or set it to offline")
    log.info("W&B: offline, because %s; `wandb login` stores one", problem)
    return "offline"


def _find_problem() -> str | None:
    """Return what is wrong with the user's API key, None for nothing."""
    wandb = import_wandb()
    try:
        wandb.setup(settings=wandb.Settings(silent=True, mode="online"))  # login looks for no key in another mode
        return None if wandb.login(prompt=False, verify=False) else "no API key was found"
    except (wandb.errors.Error, ValueError) as error:  # the form of a key; the value of a WANDB_ variable
        return f"W&B refuses its settings ({' '.join(str(error).split())})"


class WandbRun:
    """A W&B run with the name of the run folder; a resumed run continues it under its id.

    W&B's step is ours. Rows that W&B has are not logged again after a resumption from an earlier step; rows that it
    lacks, because it was slow or down, are sent at the start from metrics.jsonl.
    """

    def __init__(self, options: WandbTrackingConfig, mode: str, info: RunInfo) -> None:
        self._wandb, self._info = import_wandb(), info
        self._marker = info.folder / "wandb" / "logged_step.txt"
        values = {"job_type": options.job_type or info.config["script"], "group": options.group or info.sweep}
        self._run = open_run(options, mode, info.folder, config=dict(info.config), **values)
        self._offline, self._last_step = self._run.offline, info.step
        if self._offline:
            log.info("W&B: send it later: wandb sync %s", info.folder / "wandb" / "offline-run-*")
        else:
            log.info("W&B: %s", self._run.url)
        # Offline files are certain up to the last orderly close.
        marked = self._marker.read_text().strip() if self._marker.exists() else ""
        known = int(marked) + 1 if marked.isdigit() else 0
        self._first_step = known if self._offline else self._run.step
        self._send_missing_rows()

    def _send_missing_rows(self) -> None:
        path = self._info.folder / "metrics.jsonl"
        *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]  # the last is incomplete
        for row in map(json.loads, lines):
            step, kind = row.pop("step"), row.pop("kind")
            if step <= self._info.step:
                self.add_figures(step, name_figures(kind, row))

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._last_step = max(step, self._last_step)
        if step >= self._first_step:
            self._run.log({"samples": step * self._info.samples_per_step, **values}, step=step)

    def add_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Log finite numbers."""
        self._log(step, figures)

    def add_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log a picture."""
        self._log(step, {f"images/{name}": self._wandb.Image(image)})

    def add_table(self, step: int, name: str, rows: Sequence[TableRow]) -> None:
        """Log a table, its first thousand rows."""
        if rows:
            data = [list(row.values()) for row in rows[:_MOST_ROWS]]
            table = self._wandb.Table(columns=list(rows[0]), data=data, allow_mixed_types=True)
            self._log(step, {f"tables/{name}": table})

    def add_model(self, file: Path, alias: str, metadata: Mapping[str, Any]) -> None:
        """Log the weights as an artefact, `weights-ID`."""
        log_files(self._run, f"weights-{self._run.id}", [file], metadata, [alias])

    def close(self, failed: bool) -> None:
        """Upload the rest (online) and end W&B's process."""
        self._run.finish(exit_code=1 if failed else 0)
        if self._offline:
            write_text(self._marker, f"{self._last_step}\n")
        self._wandb.teardown()


def open_run(options: WandbTrackingConfig, mode: str, folder: Path, **values: Any) -> Any:
    """Start or continue W&B's run of a run folder; offline where its server does not answer or refuses the key."""
    wandb = import_wandb()

    def start(mode: str) -> Any:
        return wandb.init(
            project=options.project, entity=options.entity, mode=mode, id=_run_id(folder), resume="allow",
            allow_val_change=True, tags=options.tags or None, notes=options.notes, name=folder.resolve().name,
            dir=folder.resolve(), settings=_settings(wandb, options), **values,
        )  # fmt: skip

    try:
        return start(mode)
    except (wandb.errors.Error, TimeoutError) as error:
        if mode == "offline":
            raise
        log.warning(
            "W&B: its server does not take this run (%s); the run is recorded offline", str(error).split("\n")[0]
        )
        wandb.teardown()  # its process still holds the run
        return start("offline")


def _settings(wandb: Any, options: WandbTrackingConfig) -> Any:
    """Return W&B's settings. The run folder has the console (log.txt) and the machine and code (environment.json)."""
    return wandb.Settings(
        silent=True, console="off", save_code=False, disable_git=True, x_save_requirements=False, x_disable_meta=True,
        init_timeout=_START_SEC, finish_timeout=options.finish_timeout_sec, x_graphql_timeout_seconds=_ANSWER_SEC,
    )  # fmt: skip


def _run_id(folder: Path) -> str:
    """Return the id of a run folder's W&B run; a new one is written to the folder."""
    file = folder / ID_FILE
    if not file.exists():
        write_text(file, secrets.token_hex(4) + "\n")
    return file.read_text(encoding="utf-8").strip()


def log_files(run: Any, name: str, files: Sequence[Path], metadata: Mapping[str, Any], aliases: Sequence[str]) -> None:
    """Log files as an artefact of type model."""
    artifact = import_wandb().Artifact(name, type="model", metadata=dict(metadata))
    for file in files:
        artifact.add_file(str(file.resolve()), name=file.name, policy="immutable", skip_cache=True)
    run.log_artifact(artifact, aliases=list(aliases))


def send_files(run_dir: Path, name: str, files: Sequence[Path], report: Mapping[str, Any]) -> None:
    """Log an export as artefact `export-ID-NAME` of the run, where it was tracked by W&B with `model_artifact`.

    W&B that is down is a warning.
    """
    if not (run_dir / ID_FILE).exists():
        return
    try:
        options = WandbTrackingConfig.model_validate(read_run_config(run_dir)["tracking"])
        if not options.model_artifact or (mode := choose_mode(options)) == "disabled":
            return
        run = open_run(options, mode, run_dir)
        log_files(run, f"export-{run.id}-{name}", files, report, [])
        run.finish()
    except (UserError, ValidationError) as error:
        log.warning("the export is not sent to W&B: %s", str(error).splitlines()[0])
    except Exception as error:  # a server, a disk, a foreign library
        log.warning("the export is not sent to W&B (%s: %s)", type(error).__name__, error)
