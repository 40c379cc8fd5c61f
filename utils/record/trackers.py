"""Trackers: where a run's figures and pictures go beside metrics.jsonl, which is always written.

    check_tracker(config.tracking)                                  before anything is made
    tracker = start_tracker(config.tracking, run_info)              on rank 0; None for tracking=jsonl
    tracker.add(step, {"train/loss": 0.5, "images/confusion": picture, "tables/classes": rows})
    tracker.close()

W&B and TensorBoard write from a process and a thread of their own, so a call costs little. The first call that fails is
a warning and the last one that is made.
"""

import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.io.files import write_text
from utils.record.config import TrackingConfig, WandbTrackingConfig
from utils.record.logging import get_logger
from utils.record.report import TableRow
from utils.record.run_reader import RunReader

log = get_logger(__name__)

Value = float | np.ndarray | Sequence[TableRow]  # a finite number, a picture [H, W, 3] uint8, a table
ID_FILE = "wandb_run_id.txt"
_MODES = ("online", "offline", "disabled")
_START_SEC = 30.0  # for W&B's server to answer
_ANSWER_SEC = 20.0  # for one attempt of a question
_MOST_ROWS = 1000  # of a table in W&B
_STOP_SEC = 5.0  # for the rest of a run that goes on later: a job that is preempted has no more
_FINISH_SEC = 60.0  # for TensorBoard's last events to reach the disk
_unfinished: set[threading.Thread] = set()


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


class Tracker:
    """Pass values on until a call fails, then warn once. finish_sec: how long a complete run waits for the rest."""

    def __init__(self, name: str, finish_sec: float) -> None:
        self._name, self._finish_sec, self._failed = name, finish_sec, False

    def add(self, step: int, values: Mapping[str, Value]) -> None:
        """Pass on the values of a step."""
        self._try(self._add, step, values)

    def add_model(self, weights: Path, metadata: Mapping[str, Any]) -> None:
        """Pass on the best weights of a complete run's weights/, or the last ones where there are no best ones."""
        self._try(self._add_model, weights, metadata)

    def close(self, failed: bool = False, *, goes_on: bool = False) -> None:
        """Write the rest; wait a few seconds only where the run goes on later, or has failed."""
        self._failed = False  # also after a failure, to end its process
        thread = threading.Thread(target=self._try, args=(self._close, failed), daemon=True)
        thread.start()
        patience = _STOP_SEC if goes_on or failed else self._finish_sec
        thread.join(patience)
        if thread.is_alive():
            _unfinished.add(thread)
            log.warning("%s has not taken everything within %g s; the run folder has it", self._name, patience)

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            call(*arguments)
        except Exception as error:  # a server, a disk, a foreign library
            self._failed = True
            log.warning(
                "tracking: %s failed (%s: %s) and is disabled; the run continues, and metrics.jsonl has every row",
                self._name, type(error).__name__, error,
            )  # fmt: skip

    def _add(self, step: int, values: Mapping[str, Value]) -> None:
        raise NotImplementedError

    def _add_model(self, weights: Path, metadata: Mapping[str, Any]) -> None:
        """Write nothing, where a tracker keeps no models."""

    def _close(self, failed: bool) -> None:
        raise NotImplementedError


class _Tensorboard(Tracker):
    """Event files in <run>/tensorboard/, without tables; a resumed run hides the events beyond its checkpoint."""

    def __init__(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes 0.5 s

        super().__init__("TensorBoard", _FINISH_SEC)
        path = info.folder / "tensorboard"
        self._writer = SummaryWriter(str(path), purge_step=info.step + 1 if path.exists() else None, flush_secs=30)
        log.info("TensorBoard: tensorboard --logdir %s", path)

    def _add(self, step: int, values: Mapping[str, Value]) -> None:
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                self._writer.add_image(name, value, step, dataformats="HWC")
            elif isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def _close(self, failed: bool) -> None:
        self._writer.close()


# ---------------------------------------------------------------------------------------------------------------- W&B


class _Wandb(Tracker):
    """A W&B run with the name of the run folder; a resumed run continues it under its id.

    W&B's step is ours. Steps that the run has logged before it was killed are not logged again. W&B's own process
    uploads; what may wait for its server has a bound (`_open_run`).
    """

    def __init__(self, options: WandbTrackingConfig, mode: str, info: RunInfo) -> None:
        super().__init__("W&B", options.finish_timeout_sec)
        self._samples_per_step = info.samples_per_step
        continues = (info.folder / ID_FILE).exists()
        self._logged_step = max((row["step"] for row in RunReader(info.folder).rows.rows), default=0) * continues
        group, kind = options.group or info.sweep, options.job_type or info.config["script"]
        self._run = _open_run(options, mode, info.folder, config=dict(info.config), group=group, job_type=kind)
        if self._run.offline:
            log.info("W&B: send it later: wandb sync %s", info.folder / "wandb" / "offline-run-*")
        else:
            log.info("W&B: %s", self._run.url)

    def _add(self, step: int, values: Mapping[str, Value]) -> None:
        if step > self._logged_step:
            shown = {name: self._show(value) for name, value in values.items()}
            self._run.log({"samples": step * self._samples_per_step, **shown}, step=step)

    def _show(self, value: Value) -> Any:
        wandb = _import_wandb()
        if isinstance(value, np.ndarray):
            return wandb.Image(value)
        if isinstance(value, int | float):
            return value
        rows = [list(row.values()) for row in value[:_MOST_ROWS]]
        return wandb.Table(columns=list(value[0]), data=rows, allow_mixed_types=True)

    def _add_model(self, weights: Path, metadata: Mapping[str, Any]) -> None:
        files = {name: weights / f"{name}_weights.safetensors" for name in ("best", "last")}
        alias = "best" if files["best"].exists() else "last"
        artifact = _import_wandb().Artifact(f"weights-{self._run.id}", type="model", metadata=dict(metadata))
        artifact.add_file(str(files[alias].resolve()), name=files[alias].name, policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=[alias])

    def _close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)
        _import_wandb().teardown()


def _import_wandb() -> Any:
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
    if mode in ("offline", "disabled"):
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
    wandb = _import_wandb()
    try:
        wandb.setup(settings=wandb.Settings(silent=True, mode="online"))  # login looks for no key in another mode
        return None if wandb.login(prompt=False, verify=False) else "no API key was found"
    except (wandb.errors.Error, ValueError) as error:  # the form of a key; the value of a WANDB_ variable
        return f"W&B refuses its settings ({' '.join(str(error).split())})"


def _open_run(options: WandbTrackingConfig, mode: str, folder: Path, **values: Any) -> Any:
    """Start or continue W&B's run of a run folder; offline where its server does not answer or refuses the key.

    The run folder has the console (log.txt) and the machine and code (environment.json).
    """
    wandb, file = _import_wandb(), folder / ID_FILE
    if not file.exists():
        write_text(file, secrets.token_hex(4) + "\n")
    settings = wandb.Settings(
        silent=True, console="off", save_code=False, disable_git=True, x_save_requirements=False, x_disable_meta=True,
        init_timeout=_START_SEC, finish_timeout=options.finish_timeout_sec, x_graphql_timeout_seconds=_ANSWER_SEC,
    )  # fmt: skip
    values |= {
        "project": options.project, "entity": options.entity, "id": file.read_text(encoding="utf-8").strip(),
        "resume": "allow", "allow_val_change": True, "tags": options.tags or None, "notes": options.notes,
        "name": folder.resolve().name, "dir": folder.resolve(), "settings": settings,
    }  # fmt: skip
    try:
        return wandb.init(mode=mode, **values)
    except (wandb.errors.Error, TimeoutError) as error:
        if mode == "offline":
            raise
        log.warning(
            "W&B: its server does not take this run (%s); the run is recorded offline", str(error).split("\n")[0]
        )
        wandb.teardown()  # its process still holds the run
        return wandb.init(mode="offline", **values)


# --------------------------------------------------------------------------------------------------------------- both


def check_tracker(options: TrackingConfig) -> None:
    """Raise UserError where W&B is wanted online and no API key is found. Asks no server, and never prompts."""
    if options.name == "wandb":
        choose_mode(options)


def start_tracker(options: TrackingConfig, info: RunInfo) -> Tracker | None:
    """Start what `tracking` names (utils/record/config.py); None for jsonl and for what is disabled or fails."""
    try:
        if options.name == "wandb" and (mode := choose_mode(options)) != "disabled":
            return _Wandb(options, mode, info)
        if options.name == "tensorboard":
            return _Tensorboard(info)
    except Exception as error:  # a server, a disk, a foreign library
        log.warning("tracking: %s cannot be started (%s); the run continues without it", options.name, error)
    return None


def has_unfinished() -> bool:
    """Return whether a tracker of this process still works after its close; its library may hold up the exit."""
    return any(thread.is_alive() for thread in _unfinished)
