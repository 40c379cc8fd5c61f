"""Weights & Biases: a run's figures, pictures, tables and weights, online or offline.

Every call may wait for W&B's server, so they are made in a thread of their own (utils/record/background.py).
"""

import json
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from utils.io.files import write_text
from utils.io.safe_text import hide_secrets_in
from utils.record.background import Say
from utils.record.config import WandbTrackingConfig
from utils.record.report_files import TableRow
from utils.record.run_config import read_run_config
from utils.record.tracker import RunInfo, name_figures
from utils.record.wandb_mode import import_wandb

ID_FILE = "wandb_run_id.txt"
_KINDS = ("train", "evaluate", "epoch")
_START_SEC = 30.0  # for W&B's server to answer
_ANSWER_SEC = 20.0  # for one attempt of a question about an artefact
_MOST_ROWS = 1000  # of a table

_lock = threading.Lock()  # the jobs of a multirun follow each other in one process, and one may still be closing
_open: set["WandbTracker"] = set()


class WandbTracker:
    """A W&B run. It has the run folder's name, and keeps its id on resume.

    W&B's own step only grows, while a resumed run goes back to its checkpoint. So `step` is logged as a figure and is
    the axis of all others, with `samples` beside it. `train/step`, `evaluate/step` and `epoch/step` tell a later start
    which rows the server has.
    """

    def __init__(self, options: WandbTrackingConfig, mode: str, info: RunInfo, say: Say) -> None:
        wandb = import_wandb()
        self._wandb, self._info, self._say = wandb, info, say
        self.id = info.id or run_id(info.folder)
        self._marker = info.folder / "wandb" / "logged_step.txt"
        with _hidden_secrets():
            self._run = wandb.init(
                project=options.project, entity=options.entity, mode=mode, id=self.id, resume="allow",
                allow_val_change=True, reinit="create_new",
                group=options.group or info.sweep, job_type=options.job_type or info.config["script"],
                tags=options.tags or None, notes=options.notes,
                # Absolute: W&B's own process writes, and its working directory is that of the first job of a multirun.
                name=_name(info), dir=info.folder.resolve(), config=dict(info.config),
                settings=_settings(wandb, options),
            )  # fmt: skip
        _open.add(self)
        for axis in ("step", "samples", *(f"{kind}/step" for kind in _KINDS)):
            self._run.define_metric(axis, hidden=True)
        self._run.define_metric("*", step_metric="step")
        if mode == "online":
            say(f"W&B: {self._run.url}")
            summary = self._run.summary if self._run.resumed else {}
            sent = self._log_missing_rows({kind: summary.get(f"{kind}/step", 0) for kind in _KINDS})
            if sent and any(info.folder.glob(f"wandb/offline-run-*-{self.id}")):
                say(f"W&B: it has {sent} earlier rows now; do not send {info.folder}/wandb/offline-run-*")
        else:
            self._log_missing_rows(dict.fromkeys(_KINDS, self._marked_step()))
            say(f"W&B: send it later: wandb sync {info.folder / 'wandb' / 'offline-run-*'}")

    def _marked_step(self) -> int:
        """Return the last step before the last orderly close; 0 without one."""
        text = self._marker.read_text() if self._marker.exists() else ""
        return int(text) if text.strip().isdigit() else 0

    def _log_missing_rows(self, known: Mapping[str, int]) -> int:
        """Log the rows that W&B may not have: it was slow or down, or was killed with the run; returns how many.

        known: kind -> step up to which it has them.
        Online, its server says what it knows. Offline, W&B keeps rows in memory, so they are certain only after a
        close; some rows are then in two of its files.
        """
        path, self._last_step = self._info.folder / "metrics.jsonl", self._info.step
        if self._info.step <= min(known.values()) or not path.exists():
            return 0
        sent = 0
        *lines, _ = path.read_text(encoding="utf-8").split("\n")  # a kill may leave an incomplete last line
        for row in map(json.loads, lines):
            step, kind = row.pop("step"), row.pop("kind")
            if known.get(kind, known["train"]) < step <= self._info.step:
                self.add_row(step, kind, row)
                sent += 1
        return sent

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._last_step = max(step, self._last_step)
        self._run.log({"step": step, "samples": step * self._info.samples_per_step, **values})

    def add_row(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        """Log the row's figures."""
        self._log(step, {f"{kind}/step": step, **name_figures(kind, figures)})

    def add_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log a picture."""
        self._log(step, {f"images/{name}": self._wandb.Image(image)})

    def add_table(self, step: int, name: str, rows: Sequence[TableRow]) -> None:
        """Log a table, its first thousand rows."""
        if not rows:
            return
        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows[:_MOST_ROWS]]
        table = self._wandb.Table(columns=columns, data=data, allow_mixed_types=True)
        with self._asking(f"the table {name} of step {step} is not sent"):
            self._log(step, {f"tables/{name}": table})

    def add_model(self, file: Path, alias: str, metadata: Mapping[str, Any]) -> None:
        """Log the weights as an artefact, `weights-ID`."""
        self.log_files(model_artifact(self.id), [file], [alias], metadata)

    def log_files(self, name: str, files: Sequence[Path], aliases: Sequence[str], metadata: Mapping[str, Any]) -> None:
        """Log files as an artefact of type model."""
        with self._asking(f"the artefact {name} is not sent"):
            artifact = self._wandb.Artifact(name, type="model", metadata=dict(metadata))
            for file in files:
                artifact.add_file(str(file.resolve()), name=file.name, policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact, aliases=list(aliases))

    def use_model(self, source: Path) -> None:
        """Note that this run comes from the weights of the run in folder `source`."""
        if self._run.offline:
            return  # W&B notes no lineage offline; the configuration has init_from
        with self._asking(f"the lineage from {source} is not noted"):
            saved = read_run_config(source)["tracking"]
            if saved["name"] != "wandb":
                raise ValueError(f"its last start had tracking={saved['name']}")
            entity = saved["entity"] or self._run.entity
            name = f"{entity}/{saved['project']}/{model_artifact(run_id(source))}:latest"
            self._run.use_artifact(name, type="model")

    @contextmanager
    def _asking(self, otherwise: str) -> Iterator[None]:
        """Do what needs an answer of the server; a figure does not, and is worth more."""
        try:
            yield
        except Exception as error:
            self._say(f"W&B: {otherwise} ({(str(error) or type(error).__name__).splitlines()[0]})")

    def close(self, failed: bool = False) -> None:
        """Upload the rest (online), end W&B's run, and wait until its process has ended."""
        try:
            self._run.finish(exit_code=1 if failed else 0)
            if self._info.id is None:
                write_text(self._marker, f"{self._last_step}\n")
        finally:
            _open.discard(self)
            _end_process(self._wandb)


def open_wandb(options: WandbTrackingConfig, mode: str, info: RunInfo, say: Say) -> WandbTracker:
    """Start W&B's run; offline where its server does not answer or refuses the key."""
    wandb = import_wandb()
    try:
        tracker = WandbTracker(options, mode, info, say)
    except (wandb.errors.Error, TimeoutError) as error:
        if mode == "offline":
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        _end_process(wandb)  # it still holds the run
        say(f"W&B: its server does not take this run ({reason}); the run is recorded offline")
        tracker = WandbTracker(options, "offline", info, say)
    if source := tracked_run(info.config.get("init_from")):
        tracker.use_model(source)
    return tracker


def tracked_run(weights: str | None) -> Path | None:
    """Return the folder of the run that has these weights (a run folder or a file in it), if W&B knows that run."""
    path = Path(weights or "")
    return next((folder for folder in (path, path.parent.parent) if weights and (folder / ID_FILE).exists()), None)


def _end_process(wandb: Any) -> None:
    """End W&B's own process, unless another run of this process uses it."""
    with _lock:
        if not _open:
            wandb.teardown()


def run_id(folder: Path) -> str:
    """Return the id of a run folder's W&B run; a new one is written to the folder."""
    file = folder / ID_FILE
    if not file.exists():
        write_text(file, secrets.token_hex(4) + "\n")
    return file.read_text(encoding="utf-8").strip()


def _name(info: RunInfo) -> str:
    """Return the name of the run folder; of an export, with the format."""
    folder = info.folder.resolve().name
    return folder if info.id is None else f"{folder} {info.id.partition('-')[2]}"


def model_artifact(run: str) -> str:
    """Return the name of the artefact that has a run's weights."""
    return f"weights-{run}"


def _settings(wandb: Any, options: WandbTrackingConfig) -> Any:
    """Return W&B's settings. We keep the console (log.txt) and the state of the code (environment.json) ourselves."""
    return wandb.Settings(
        silent=True, console="off", save_code=False, disable_git=True, x_save_requirements=False,
        init_timeout=_START_SEC, finish_timeout=options.finish_timeout_sec, x_graphql_timeout_seconds=_ANSWER_SEC,
    )  # fmt: skip


@contextmanager
def _hidden_secrets() -> Iterator[None]:
    """Hide keys and passwords of the command line, which W&B keeps."""
    with _lock:
        command = sys.argv
        sys.argv = hide_secrets_in(command)
        try:
            yield
        finally:
            sys.argv = command
