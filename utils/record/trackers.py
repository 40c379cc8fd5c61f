"""Trackers: where a run's figures and pictures go beside metrics.jsonl, which is always written.

    check_tracker(config.tracking)                                  before anything is made
    tracker = start_tracker(config.tracking, folder, run_config, step)   on rank 0; None for tracking=jsonl
    tracker.add(step, {"train/loss": 0.5, "images/confusion": picture, "tables/classes": rows})
    tracker.close()

W&B and TensorBoard write from a process and a thread of their own, so a call costs little.
"""

import os
import secrets
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
_START_SEC = 30.0  # for W&B's server to answer
_ANSWER_SEC = 20.0  # for one attempt of a question
_MOST_ROWS = 1000  # of a table in W&B


class Tracker:
    """Pass values to a writer. The first call that fails is a warning and the last one that is made."""

    def __init__(self, writer: "_Wandb | _Tensorboard") -> None:
        self._writer, self._failed = writer, False

    def add(self, step: int, values: Mapping[str, Value]) -> None:
        """Pass on the values of a step."""
        self._try(self._writer.add, step, values)

    def close(self, failed: bool = False, model: tuple[Path, Mapping[str, Any]] | None = None) -> None:
        """Write the rest. model: the folder of weights of a complete run, and metadata."""
        self._try(self._writer.close, failed, model)

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
    """Event files in <run>/tensorboard/, without tables; a resumed run hides the events beyond its checkpoint."""

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

    def close(self, failed: bool, model: object) -> None:
        self._writer.close()


class _Wandb:
    """A W&B run with the name of the run folder; a resumed run continues it under its id.

    W&B's step is ours. Steps that the run has logged before it was killed are not logged again. W&B's own process
    uploads; each wait for its server has a bound.
    """

    name = "W&B"

    def __init__(self, options: WandbTrackingConfig, mode: str, folder: Path, config: Mapping[str, Any]) -> None:
        wandb, file, rows = _import_wandb(), folder / ID_FILE, RunReader(folder).rows
        self._logged_step = max((row["step"] for row in rows), default=0) if file.exists() else 0
        self._options, self._batch_size = options, config["loop"]["global_batch_size"]
        if not file.exists():
            write_text(file, secrets.token_hex(4) + "\n")
        # The run folder has the console (log.txt) and the machine and code (environment.json).
        settings = wandb.Settings(
            silent=True, console="off", save_code=False, disable_git=True, x_save_requirements=False,
            x_disable_meta=True, init_timeout=_START_SEC, x_graphql_timeout_seconds=_ANSWER_SEC,
            finish_timeout=options.finish_timeout_sec, finish_timeout_raises=True,
        )  # fmt: skip
        values = {
            "project": options.project, "entity": options.entity, "group": options.group, "tags": options.tags or None,
            "notes": options.notes, "job_type": config["script"], "name": folder.resolve().name, "config": dict(config),
            "id": file.read_text(encoding="utf-8").strip(), "resume": "allow", "allow_val_change": True,
            "dir": folder.resolve(), "settings": settings,
        }  # fmt: skip
        try:
            self._run = wandb.init(mode=mode, **values)
        except (wandb.errors.Error, TimeoutError) as error:
            if mode != "online":
                raise
            reason = str(error).split("\n")[0]
            log.warning("W&B: its server does not take this run (%s); the run is recorded offline", reason)
            wandb.teardown()  # its process still holds the run
            self._run = wandb.init(mode="offline", **values)
        unsent = f"send it later: wandb sync {folder}/wandb/offline-run-*"
        log.info("W&B: %s", unsent if self._run.offline else self._run.url)

    def add(self, step: int, values: Mapping[str, Value]) -> None:
        if step > self._logged_step:
            shown = {name: self._show(value) for name, value in values.items()}
            self._run.log({"samples": step * self._batch_size, **shown}, step=step)

    def _show(self, value: Value) -> Any:
        wandb = _import_wandb()
        if isinstance(value, np.ndarray):
            return wandb.Image(value)
        if isinstance(value, int | float):
            return value
        rows = [list(row.values()) for row in value[:_MOST_ROWS]]
        return wandb.Table(columns=list(value[0]), data=rows, allow_mixed_types=True)

    def close(self, failed: bool, model: tuple[Path, Mapping[str, Any]] | None) -> None:
        wandb = _import_wandb()
        if model is not None and self._options.model_artifact:
            which = "best" if (model[0] / "best_weights.safetensors").exists() else "last"
            file = model[0] / f"{which}_weights.safetensors"
            artifact = wandb.Artifact(f"weights-{self._run.id}", type="model", metadata=dict(model[1]))
            artifact.add_file(str(file.resolve()), name=file.name, policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact, aliases=[which])
        self._run.finish(exit_code=1 if failed else 0)
        wandb.teardown()


def _import_wandb() -> Any:
    """Return the wandb package, without its reports of errors to its maker, which only make noise where it is down."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # takes 0.6 s

    return wandb


def choose_mode(options: WandbTrackingConfig) -> str:
    """Return the mode of W&B. auto: WANDB_MODE, else online where there is an API key, else offline.

    Asks no server, and never prompts. Raises UserError (`tracking.mode`) for online without a key.
    """
    mode = os.environ.get("WANDB_MODE", "auto") if options.mode == "auto" else options.mode
    if mode not in ("auto", "online") or _has_key():
        return "online" if mode == "auto" else mode
    if mode == "online":
        raise UserError("tracking.mode: online needs an API key; run `wandb login`, or set it to offline")
    log.info("W&B: offline, because no API key was found; `wandb login` stores one")
    return "offline"


def _has_key() -> bool:
    wandb = _import_wandb()
    try:
        wandb.setup(settings=wandb.Settings(silent=True, mode="online"))  # login looks for no key in another mode
        return wandb.login(prompt=False, verify=False)
    except (wandb.errors.Error, ValueError) as error:  # the form of a key; the value of a WANDB_ variable
        log.warning("W&B refuses its settings: %s", error)
        return False


def check_tracker(options: TrackingConfig) -> None:
    """Raise UserError where W&B is wanted online and no API key is found."""
    if options.name == "wandb":
        choose_mode(options)


def start_tracker(options: TrackingConfig, folder: Path, config: Mapping[str, Any], step: int) -> Tracker | None:
    """Start the tracker of a run; None for jsonl, and with a warning for one that fails.

    config: the saved configuration, with `script`; step: where the run begins or resumes.
    """
    try:
        if options.name == "wandb":
            return Tracker(_Wandb(options, choose_mode(options), folder, config))
        if options.name == "tensorboard":
            return Tracker(_Tensorboard(folder, step))
    except Exception as error:  # a server, a disk, a foreign library
        log.warning("tracking: %s cannot be started (%s); the run continues without it", options.name, error)
    return None
