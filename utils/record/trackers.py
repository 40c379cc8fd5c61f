"""Trackers: W&B and TensorBoard record figures and pictures in addition to metrics.jsonl.

W&B writes from a separate process and TensorBoard from a thread, so calls are cheap.
"""

import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
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
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # error reports to W&B's developers clutter the output
_START_SEC = 30.0  # for W&B's server to answer
_ANSWER_SEC = 20.0  # for one attempt of a request
_FINISH_SEC = 120.0  # for the upload of a run that has ended
_STOP_SEC = 5.0  # for the upload of a stopped run: a scheduler may kill the job soon
_MOST_ROWS = 1000  # of a table in W&B


class Tracker:
    """Pass values to a writer. After a first failed call, log a warning and make no more calls."""

    def __init__(self, writer: "_Wandb | _Tensorboard") -> None:
        self._writer = writer
        self._failed = False

    def add(self, step: int, values: Mapping[str, Value]) -> None:
        """Record the values of a step."""
        self._try(self._writer.add, step, values)

    def close(self, status: int | None) -> None:
        """Write pending values. status: 0 for a complete run, 1 for a failed one, None for a stopped one."""
        self._try(self._writer.close, status)

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            call(*arguments)
        except Exception as error:  # a server, a disk, a foreign library
            self._failed = True
            log.warning(
                "tracking: %s failed (%s: %s) and is disabled; metrics.jsonl has every row",
                self._writer.name, type(error).__name__, error,
            )  # fmt: skip


class _Tensorboard:
    """Event files in <run>/tensorboard/, without tables. A resumed run hides the events after its checkpoint."""

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes 0.5 s

        path = folder / "tensorboard"
        self._writer = SummaryWriter(str(path), purge_step=step + 1 if path.exists() else None, flush_secs=30)
        log.info("TensorBoard: tensorboard --logdir %s", path)

    def add(self, step: int, values: Mapping[str, Value]) -> None:
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                self._writer.add_image(name, value, step, dataformats="HWC")
            elif isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self, status: int | None) -> None:
        self._writer.close()


class _Wandb:
    """A W&B run named like the run folder; a resumed run continues under the same id.

    W&B steps are training steps. A resumed run does not log again what it logged before it was killed. Every wait for
    the server has a time limit.
    """

    name = "W&B"

    def __init__(self, options: WandbTrackingConfig, mode: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb  # takes 0.6 s

        self._batch_size = config["loop"]["batch_size"]
        self._logged_step = 0
        file = folder / ID_FILE
        if file.exists():
            self._logged_step = max((row["step"] for row in RunReader(folder).rows), default=0)
        else:
            write_text(file, secrets.token_hex(4) + "\n")
        values = {"project": options.project, "job_type": config["script"], "config": dict(config)}
        values |= {"id": file.read_text(encoding="utf-8").strip(), "resume": "allow", "allow_val_change": True}
        values |= {"name": folder.resolve().name, "dir": folder.resolve(), "settings": _settings()}
        try:
            self._run = wandb.init(mode=mode, **values)
        except (wandb.errors.Error, TimeoutError) as error:
            if mode != "online":
                raise
            reason = str(error).split("\n")[0]
            log.warning("W&B: the server does not accept this run (%s); the run is recorded offline", reason)
            wandb.teardown()  # W&B's process still holds the run
            self._run = wandb.init(mode="offline", **values)
        unsent = f"send it later: wandb sync {folder}/wandb/offline-run-*"
        log.info("W&B: %s", unsent if self._run.offline else self._run.url)

    def add(self, step: int, values: Mapping[str, Value]) -> None:
        if step > self._logged_step:
            shown = {name: self._show(value) for name, value in values.items()}
            self._run.log({"samples": step * self._batch_size, **shown}, step=step)

    def _show(self, value: Value) -> Any:
        import wandb

        if isinstance(value, np.ndarray):
            return wandb.Image(value)
        if isinstance(value, int | float):
            return value
        rows = [list(row.values()) for row in value[:_MOST_ROWS]]
        return wandb.Table(columns=list(value[0]), data=rows, allow_mixed_types=True)

    def close(self, status: int | None) -> None:
        import wandb

        if status is None:  # the exit of the process does not wait for this thread
            finish = threading.Thread(target=self._run.finish, daemon=True)
            finish.start()
            finish.join(_STOP_SEC)
            return
        self._run.finish(exit_code=status)
        wandb.teardown()


def _settings() -> Any:
    import wandb

    # The run folder has the console output (log.txt), the machine and the code (environment.json).
    quiet = {"silent": True, "console": "off", "save_code": False, "disable_git": True}
    quiet |= {"x_save_requirements": False, "x_disable_meta": True}
    limits = {"init_timeout": _START_SEC, "x_graphql_timeout_seconds": _ANSWER_SEC}
    return wandb.Settings(**quiet, **limits, finish_timeout=_FINISH_SEC, finish_timeout_raises=True)


def choose_mode(options: TrackingConfig) -> str | None:
    """Return W&B's mode; None for other trackers. auto: WANDB_MODE, else online if there is an API key, else offline.

    Contacts no server and never prompts. Raises UserError (`tracking.mode`) for online without a key.
    """
    if options.name != "wandb":
        return None
    mode = os.environ.get("WANDB_MODE", "auto") if options.mode == "auto" else options.mode
    if mode not in ("auto", "online") or _has_key():
        return "online" if mode == "auto" else mode
    if mode == "online":
        raise UserError("tracking.mode: online needs an API key; run `wandb login`, or set it to offline")
    log.info("W&B: offline, because no API key was found; `wandb login` stores one")
    return "offline"


def _has_key() -> bool:
    import wandb

    try:
        wandb.setup(settings=wandb.Settings(silent=True, mode="online"))  # in other modes, login ignores keys
        return wandb.login(prompt=False, verify=False)
    except (wandb.errors.Error, ValueError) as error:  # a malformed key, a wrong value of a WANDB_ variable
        log.warning("W&B refuses the settings: %s", error)
        return False


def start_tracker(options: TrackingConfig, folder: Path, config: Mapping[str, Any], step: int) -> Tracker | None:
    """Start a run's tracker. Return None for jsonl, or with a warning if the start fails.

    config: the saved configuration, with `script`; step: the first step of the run or its resumption.
    """
    try:
        if (mode := choose_mode(options)) is not None:
            return Tracker(_Wandb(options, mode, folder, config))
        if options.name == "tensorboard":
            return Tracker(_Tensorboard(folder, step))
    except Exception as error:  # a server, a disk, a foreign library
        log.warning("tracking: %s cannot be started (%s); the run continues without it", options.name, error)
    return None
