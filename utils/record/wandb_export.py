"""An export of a tracked run as a W&B artefact, with its lineage: weights of the run, export, files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from utils.errors import UserError
from utils.record.background import BackgroundTracker, Say
from utils.record.config import WandbTrackingConfig
from utils.record.logging import get_logger
from utils.record.run_config import read_run_config
from utils.record.tracker import RunInfo, logged_weights
from utils.record.wandb_mode import choose_mode
from utils.record.wandb_tracker import ID_FILE, WandbTracker, open_wandb, run_id

log = get_logger(__name__)


def send_export(
    run_dir: Path, name: str, files: Sequence[Path], report: Mapping[str, Any], *, weights: Sequence[str]
) -> None:
    """Log the files of an export to W&B, where the run in `run_dir` was tracked there with `model_artifact`.

    It is a W&B run of its own, `ID-NAME` of job type `export`. name: of the format; weights: what was exported. The
    lineage is noted where that is the artefact of the run. W&B that is down is a warning.
    """
    if not (run_dir / ID_FILE).exists():
        return
    try:
        saved = read_run_config(run_dir)["tracking"]
        if not saved.get("model_artifact"):
            return
        options = WandbTrackingConfig.model_validate(saved).model_copy(update={"job_type": "export"})
        mode = choose_mode(options).mode
    except (UserError, ValidationError) as error:
        log.warning("the export is not sent to W&B: %s", str(error).splitlines()[0])
        return
    if mode == "disabled":
        return
    run = f"{run_id(run_dir)}-{name}"
    info = RunInfo(run_dir, {"script": "export", **report}, sweep=options.group, id=run)

    def start(say: Say) -> WandbTracker:
        tracker = open_wandb(options, mode, info, say)
        if list(weights) == [logged_weights(run_dir / "weights").alias]:
            tracker.use_model(run_dir)
        tracker.log_files(f"export-{run}", files, [], report)
        return tracker

    BackgroundTracker("W&B", start, options.finish_timeout_sec).close()
