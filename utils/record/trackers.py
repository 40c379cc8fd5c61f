"""Trackers: where a run's figures and pictures go beside metrics.jsonl, which is always written.

    check_tracker(config.tracking)                                        before anything is made
    tracker = start_tracker(config.tracking, run_dir, run_config, step)   on rank 0; None for tracking=jsonl
    tracker.add_row(step, "train", {"loss": 0.5})
    tracker.add_image(step, "reconstructions", image)
    tracker.close()

A tracker that fails during the run is named in one warning and disabled: it never ends a run.
"""

import math
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.errors import UserError
from utils.io.files import write_text
from utils.io.safe_text import hide_secrets_in
from utils.record.config import TrackingConfig, WandbTrackingConfig
from utils.record.logging import get_logger

log = get_logger(__name__)

ID_FILE = "wandb_run_id.txt"
_START_SEC = 60.0  # for W&B's server to answer
_FINISH_SEC = 120.0  # to upload the rest, which also stays in the run folder


class Tracker(Protocol):
    """A tracker as the engine uses it; figures are numbers, null where they were not finite."""

    def add_row(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        """Take a row of metrics of kind train, evaluate or epoch."""

    def add_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Take a picture [H, W, 3] uint8."""

    def close(self, failed: bool = False) -> None:
        """Write the rest; `failed`: the run ended by an error."""


def name_figures(kind: str, figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers under `kind/name`."""
    return {
        f"{kind}/{name}": value
        for name, value in figures.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def check_tracker(options: TrackingConfig) -> None:
    """Raise UserError where W&B is wanted online and has no key that its server takes.

    It never prompts for a key.
    """
    if options.name != "wandb" or options.mode != "online":
        return
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    reason = "no API key is configured"
    try:
        known = wandb.login(prompt=False)
    except wandb.errors.Error as error:
        known, reason = False, str(error).splitlines()[0].rstrip(".")
    if not known:
        raise UserError(
            f"tracking.mode: online was asked for, and W&B refuses this user ({reason}); run `wandb login` "
            "once, or set tracking.mode=offline and send the run later with `wandb sync`"
        )


class WandbTracker:
    """Weights & Biases, online or offline. The W&B run has the run folder's name, and keeps its id on resume.

    W&B's own step only grows, while a resumed run goes back to its checkpoint. So `step` is logged as a figure and is
    the axis of all others.
    """

    def __init__(self, options: WandbTrackingConfig, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb  # takes 0.6 s

        self._wandb = wandb
        id_file = folder / ID_FILE
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4) + "\n")
        command = sys.argv
        sys.argv = hide_secrets_in(command)  # W&B keeps the command line
        try:
            self._run = wandb.init(
                project=options.project, entity=options.entity, mode=options.mode, tags=options.tags or None,
                id=id_file.read_text(encoding="utf-8").strip(), resume="allow", allow_val_change=True,
                # Absolute: W&B's own process writes, and its working directory is that of the first job of a multirun.
                name=folder.resolve().name, dir=folder.resolve(), config=dict(config),
                # We keep the console (progress bar, log.txt) and the state of the code (environment.json) ourselves.
                settings=wandb.Settings(
                    silent=True, console="off", save_code=False, disable_git=True, x_save_requirements=False,
                    init_timeout=_START_SEC, finish_timeout=_FINISH_SEC,
                ),
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise UserError(
                f"tracking.mode: {options.mode} was asked for, and W&B does not start this run ("
                f"{str(error).splitlines()[0]}); fix that, or set tracking.mode=offline and send the run later with "
                "`wandb sync`"
            ) from None
        finally:
            sys.argv = command
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if options.mode == "online":
            log.info("W&B: %s", self._run.url)
        else:
            log.info("W&B: offline; send it later: wandb sync %s", folder / "wandb" / "offline-run-*")

    def add_row(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        """Log the row's figures."""
        self._run.log({"step": step, **name_figures(kind, figures)})

    def add_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log a picture."""
        self._run.log({"step": step, f"images/{name}": self._wandb.Image(image)})

    def close(self, failed: bool = False) -> None:
        """Upload the rest (online), end W&B's run, and wait until its process has ended."""
        self._run.finish(exit_code=1 if failed else 0)
        self._wandb.teardown()


class TensorboardTracker:
    """TensorBoard event files in <run>/tensorboard/; a resumed run hides the events beyond its checkpoint."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes 0.5 s

        path = folder / "tensorboard"
        resumed = path.exists()
        self._writer = SummaryWriter(str(path), purge_step=step + 1 if resumed else None, flush_secs=30)
        log.info("TensorBoard: tensorboard --logdir %s", path)

    def add_row(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        """Write the row's figures."""
        for name, value in name_figures(kind, figures).items():
            self._writer.add_scalar(name, value, step)

    def add_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a picture."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self, failed: bool = False) -> None:
        """Write the rest."""
        self._writer.close()


class GuardedTracker:
    """Pass calls on to a tracker until one fails; then warn once and drop the rest."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker: Tracker | None = tracker

    def _guard(self, call: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except Exception as error:  # a server, a disk, a foreign library: none of them is worth the run
            name, self._tracker = type(self._tracker).__name__, None
            log.warning(
                "tracking: %s failed (%s: %s) and is disabled; the run continues, and metrics.jsonl has every row",
                name, type(error).__name__, error,
            )  # fmt: skip

    def add_row(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        """Pass a row on."""
        self._guard(lambda tracker: tracker.add_row(step, kind, figures))

    def add_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Pass a picture on."""
        self._guard(lambda tracker: tracker.add_image(step, name, image))

    def close(self, failed: bool = False) -> None:
        """Close the tracker."""
        self._guard(lambda tracker: tracker.close(failed))


def start_tracker(options: TrackingConfig, folder: Path, config: Mapping[str, Any], step: int) -> Tracker | None:
    """Start what `tracking` names (utils/record/config.py), for a run that begins or resumes at `step`; None for jsonl.

    Raises UserError (`tracking.mode`) where W&B cannot start.
    """
    match options.name:
        case "wandb":
            return GuardedTracker(WandbTracker(options, folder, config))
        case "tensorboard":
            return GuardedTracker(TensorboardTracker(folder, step))
    return None
