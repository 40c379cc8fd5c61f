"""Trackers: where a run's figures and pictures go beside metrics.jsonl, which is always written.

    check_tracker(config.tracking)                         before anything is made
    tracker = start_tracker(config.tracking, run_info)     on rank 0; None for tracking=jsonl
    tracker.add_row(step, "train", {"loss": 0.5})
    tracker.add_image(step, "reconstructions", image)
    tracker.close()

A tracker works in a thread of its own (utils/record/background.py): once started, it neither slows nor ends a run.
"""

from utils.record.background import BackgroundTracker
from utils.record.config import TrackingConfig
from utils.record.logging import get_logger
from utils.record.tensorboard_tracker import TensorboardTracker
from utils.record.tracker import RunInfo
from utils.record.wandb_mode import choose_mode
from utils.record.wandb_tracker import open_wandb

log = get_logger(__name__)

_FINISH_SEC = 60.0  # for TensorBoard's last events to reach the disk


def check_tracker(options: TrackingConfig) -> None:
    """Raise UserError where W&B is wanted online and no API key is found. Asks no server, and never prompts."""
    if options.name == "wandb":
        choose_mode(options)


def start_tracker(options: TrackingConfig, info: RunInfo) -> BackgroundTracker | None:
    """Start what `tracking` names (utils/record/config.py); None for jsonl and for a W&B that is disabled."""
    match options.name:
        case "wandb":
            chosen = choose_mode(options)
            log.info("W&B: %s, because %s", chosen.mode, chosen.reason)
            if chosen.mode == "disabled":
                return None
            patience = options.finish_timeout_sec
            return BackgroundTracker("W&B", lambda say: open_wandb(options, chosen.mode, info, say), patience)
        case "tensorboard":
            log.info("TensorBoard: tensorboard --logdir %s", info.folder / "tensorboard")
            return BackgroundTracker("TensorBoard", lambda say: TensorboardTracker(info.folder, info.step), _FINISH_SEC)
    return None
