"""Trackers: W&B and TensorBoard record figures and pictures in addition to metrics.jsonl.

W&B writes from a separate process and TensorBoard from a thread, so calls are cheap.
"""

import os
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.io.files import Values, write_text
from utils.record.logging import log
from utils.record.report import TableRow
from utils.record.run_folder import git_state
from utils.record.run_reader import OBJECTIVE, RunReader

Value = float | np.ndarray | list[TableRow]  # a finite number, a picture [H, W, 3] uint8, or a table for W&B
ID_FILE = "wandb_run_id.txt"
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # error reports to W&B's developers clutter the output
_START_SEC = 30.0  # for W&B's server to answer
_FINISH_SEC = 120.0  # for the upload of a run that has ended
_WEIGHTS_SEC = 3600.0  # the same with weights
_STOP_SEC = 5.0  # for the upload of a stopped run: a scheduler may kill the job soon


class Tracker:
    """Start W&B or TensorBoard, and pass values to it. After a first failure, log a warning and make no more calls.

    config: the saved configuration, with `script`; step: the first step of the run or its resumption.
    """

    def __init__(self, name: str, folder: Path, config: Values, step: int) -> None:
        self._writer = None
        try:
            self._writer = _WRITERS[name](folder, config, step)
        except Exception as error:  # a server, a disk, a foreign library
            log.warning("tracking: %s cannot be started (%s); the run continues without it", name, error)

    def add(self, step: int, values: Mapping[str, Value]) -> None:
        """Record the values of a step."""
        self._try("add", step, values)

    def close(self, status: int | None) -> None:
        """Write pending values. status: 0 for a complete run, 1 for a failed one, None for a stopped one."""
        self._try("close", status)

    def _try(self, method: str, *arguments: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments)
        except Exception as error:  # a server, a disk, a foreign library
            log.warning(
                "tracking: %s failed (%s) and is disabled; metrics.jsonl has all", self._writer.name, repr(error)
            )
            self._writer = None


class _Tensorboard:
    """Event files in <run>/tensorboard/. A resumed run hides the events after its checkpoint."""

    name = "TensorBoard"

    def __init__(self, folder: Path, config: Values, step: int) -> None:
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

    def __init__(self, folder: Path, config: Values, step: int) -> None:
        import wandb  # takes 0.6 s

        self._options = config["tracking"]
        self._reader = RunReader(folder)
        self._logged_step = -1
        file = folder / ID_FILE
        if file.exists():
            self._logged_step = max((row["step"] for row in self._reader.rows), default=0)
        else:
            write_text(file, os.environ.get("WANDB_RUN_ID", secrets.token_hex(4)) + "\n")
        # The run folder has the console output (log.txt), the machine and the code (environment.json).
        settings = wandb.Settings(
            silent=True, console="off", save_code=False, disable_git=True, x_save_requirements=False,
            x_disable_meta=True, init_timeout=_START_SEC, finish_timeout_raises=True,
            finish_timeout=_WEIGHTS_SEC if self._options["weights"] else _FINISH_SEC,
        )  # fmt: skip
        named = {"id": file.read_text("utf-8").strip(), "name": folder.resolve().name}
        named |= {"project": self._options["project"], "job_type": config["script"], "dir": folder.resolve()}
        named["config"] = {**config, "git": git_state()}
        self._run = wandb.init(mode=choose_mode(), resume="allow", allow_val_change=True, settings=settings, **named)
        unsent = f"send it later: wandb sync {folder}/wandb/offline-run-*"
        log.info("W&B: %s", unsent if self._run.offline else self._run.url)

    def add(self, step: int, values: Mapping[str, Value]) -> None:
        import wandb

        def tabulate(rows: list[TableRow]) -> wandb.Table:
            return wandb.Table([*rows[0]], [[*row.values()] for row in rows], allow_mixed_types=True)

        show = {np.ndarray: wandb.Image, list: tabulate}
        if values and step > self._logged_step:
            self._run.log({name: show.get(type(value), float)(value) for name, value in values.items()}, step=step)

    def close(self, status: int | None) -> None:
        import wandb

        if status is None:  # the exit of the process does not wait for this thread
            finish = threading.Thread(target=self._run.finish, daemon=True)
            finish.start()
            finish.join(_STOP_SEC)
            return
        self._run.summary[OBJECTIVE] = self._reader.objective
        aliases = {"best": "best", "last": "latest"}  # of the versions of the weights
        for name, alias in aliases.items() if self._options["weights"] and status == 0 else ():
            self._run.log_model(self._reader.weights(name), f"weights-{self._run.id}", [alias])
        self._run.finish(exit_code=status)
        wandb.teardown()


def choose_mode() -> str:
    """Return W&B's mode: WANDB_MODE, else online if there is an API key, else offline. Never prompts."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode
    wandb.setup(settings=wandb.Settings(silent=True, mode="online"))  # in other modes, login ignores keys
    if wandb.login(prompt=False, verify=False):
        return "online"
    log.info("W&B: offline, because no API key was found; `wandb login` stores one")
    return "offline"


_WRITERS = {"wandb": _Wandb, "tensorboard": _Tensorboard}
