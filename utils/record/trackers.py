"""Trackers: where a run's figures and pictures go beside metrics.jsonl, which is always written.

    check_tracker(config.tracking)                         before anything is made
    tracker = start_tracker(config.tracking, run_info)     on rank 0; None for tracking=jsonl
    tracker.add_row(step, "train", {"loss": 0.5})
    tracker.close()

W&B and TensorBoard write from a process and a thread of their own, so a call costs little. The first call that fails is
a warning and the last one that is made.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.record.config import TrackingConfig
from utils.record.figures import name_figures
from utils.record.logging import get_logger
from utils.record.report_files import TableRow
from utils.record.wandb_run import RunInfo, WandbRun, choose_mode

log = get_logger(__name__)

_STOP_SEC = 5.0  # for the rest of a run that goes on later: a job that is preempted has no more
_FINISH_SEC = 60.0  # for TensorBoard's last events to reach the disk
_unfinished: set[threading.Thread] = set()


class _TensorboardWriter:
    """Event files in <run>/tensorboard/; a resumed run hides the events beyond its checkpoint."""

    def __init__(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes 0.5 s

        path = info.folder / "tensorboard"
        self._writer = SummaryWriter(str(path), purge_step=info.step + 1 if path.exists() else None, flush_secs=30)

    def add_figures(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def add_image(self, step: int, name: str, image: np.ndarray) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")

    def add_table(self, step: int, name: str, rows: Sequence[TableRow]) -> None:
        """Write nothing: TensorBoard has no tables; the run folder has tables/<name>.csv."""

    def add_model(self, file: Path, alias: str, metadata: Mapping[str, Any]) -> None:
        """Write nothing: TensorBoard keeps no models."""

    def close(self, failed: bool) -> None:
        self._writer.close()


class Tracker:
    """Pass figures on to W&B or TensorBoard until a call fails; then warn once and drop the rest."""

    def __init__(self, name: str, writer: WandbRun | _TensorboardWriter, finish_sec: float) -> None:
        self._name, self._writer, self._finish_sec = name, writer, finish_sec
        self._failed = False

    def add_row(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        """Pass on the finite numbers of a row of kind train, evaluate or epoch."""
        self._try(lambda: self._writer.add_figures(step, name_figures(kind, figures)))

    def add_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Pass on a picture [H, W, 3] uint8."""
        self._try(lambda: self._writer.add_image(step, name, image))

    def add_table(self, step: int, name: str, rows: Sequence[TableRow]) -> None:
        """Pass on a table of an evaluation."""
        self._try(lambda: self._writer.add_table(step, name, rows))

    def add_model(self, file: Path, alias: str, metadata: Mapping[str, Any]) -> None:
        """Pass on the weights of a complete run; alias: `best` or `last`."""
        self._try(lambda: self._writer.add_model(file, alias, metadata))

    def close(self, failed: bool = False, *, goes_on: bool = False) -> None:
        """Write the rest; wait a few seconds only where the run goes on later, or has failed."""
        call, self._failed = (lambda: self._writer.close(failed)), False  # also after a failure, to end its process
        thread = threading.Thread(target=self._try, args=(call,), daemon=True)
        thread.start()
        patience = _STOP_SEC if goes_on or failed else self._finish_sec
        thread.join(patience)
        if thread.is_alive():
            _unfinished.add(thread)
            log.warning("%s has not taken everything within %g s; the run folder has it", self._name, patience)

    def _try(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # a server, a disk, a foreign library
            self._failed = True
            log.warning(
                "tracking: %s failed (%s: %s) and is disabled; the run continues, and metrics.jsonl has every row",
                self._name, type(error).__name__, error,
            )  # fmt: skip


def has_unfinished() -> bool:
    """Return whether a tracker of this process still works after its close; its library may hold up the exit."""
    return any(thread.is_alive() for thread in _unfinished)


def check_tracker(options: TrackingConfig) -> None:
    """Raise UserError where W&B is wanted online and no API key is found. Asks no server, and never prompts."""
    if options.name == "wandb":
        choose_mode(options)


def start_tracker(options: TrackingConfig, info: RunInfo) -> Tracker | None:
    """Start what `tracking` names (utils/record/config.py); None for jsonl and for what is disabled or fails."""
    try:
        if options.name == "wandb" and (mode := choose_mode(options)) != "disabled":
            return Tracker("W&B", WandbRun(options, mode, info), options.finish_timeout_sec)
        if options.name == "tensorboard":
            log.info("TensorBoard: tensorboard --logdir %s", info.folder / "tensorboard")
            return Tracker("TensorBoard", _TensorboardWriter(info), _FINISH_SEC)
    except Exception as error:  # a server, a disk, a foreign library
        log.warning("tracking: %s cannot be started (%s); the run continues without it", options.name, error)
    return None


class LoggedWeights(NamedTuple):
    """The weight file that a tracker gets at the end of a run, and its name: best or last."""

    file: Path
    alias: str


def logged_weights(folder: Path) -> LoggedWeights:
    """Return the best weights in a run's weights/, or the last ones where there are no best ones."""
    best = folder / "best_weights.safetensors"
    return LoggedWeights(best, "best") if best.exists() else LoggedWeights(folder / "last_weights.safetensors", "last")
