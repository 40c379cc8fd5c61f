"""How a run continues: choose a checkpoint, and check it against this run. Run.restore loads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import find_checkpoint, find_damage, list_checkpoints, read_state
from engine.config import TrainingConfig
from utils.config.recipe import check_resumable
from utils.errors import UserError
from utils.io.safe_text import hide_secrets_in
from utils.ranks.job_status import restart_count
from utils.record.logging import get_logger

log = get_logger(__name__)


def _is_auto(config: TrainingConfig) -> bool:
    """Return whether the run continues from its own last checkpoint; in a requeued job also with resume=never."""
    return config.resume == "auto" or (config.resume == "never" and restart_count() > 0)


def will_resume(config: TrainingConfig, folder: Path) -> bool:
    """Return whether the run continues from a checkpoint, so that no initial weights are loaded.

    Which one is chosen later, when the folder is locked: until then an earlier process may save and remove some.
    """
    if _is_auto(config):
        return bool(list_checkpoints(folder / "checkpoints"))
    return config.resume != "never"


def choose_checkpoint(config: TrainingConfig, folder: Path, total_steps: int) -> Path | None:
    """Return the checkpoint to continue from, of this recipe and length, None for a new run; on rank 0.

    Raises UserError where it cannot be read, or does not fit.
    """
    existing = list_checkpoints(folder / "checkpoints")
    if config.resume == "never" and not _is_auto(config):
        if existing:
            raise UserError(
                f"resume: never was given, but {folder} holds {len(existing)} checkpoints (up to "
                f"{existing[-1].name}); nothing is overwritten: give another run_dir, or set resume=auto"
            )
        return None
    found = find_checkpoint(folder / "checkpoints")
    if not _is_auto(config):
        named = Path(config.resume)
        # After a kill, the same command continues from what it has saved since.
        if found is not None and Path(read_state(found)["config"]["resume"]) == named:
            log.info("resume: %s was made by this command, so the run continues from it, not from %s", found, named)
        elif (problem := find_damage(named)) is not None:
            raise UserError(
                f"resume: {named} is no whole checkpoint: {problem}; name one like RUN/checkpoints/step_00001200, or "
                "set resume=auto"
            )
        else:
            found = named
    if found is None:
        return None
    state = read_state(found)
    values = hide_secrets_in(config.model_dump(mode="json"))
    for line in check_resumable(state["config"], values, config.resume_allow, str(found)):
        log.warning("resume_allow accepts %s", line)
    if state["step"] > total_steps:
        raise UserError(
            f"loop.total_steps: the run is already at step {state['step']}, beyond the {total_steps} "
            "requested; request more, or give another run_dir (a sweep: another sweep.name)"
        )
    return found


def check_start(state: dict[str, Any], fingerprints: Mapping[str, str], precision: str, config: TrainingConfig) -> None:
    """Compare a checkpoint's data, facts, helpers and machine with this run's. Raises UserError where they differ."""
    for name, now in {**fingerprints, "runtime.precision": precision}.items():
        saved = {**state["fingerprints"], "runtime.precision": state["precision"]}.get(name)
        if saved == now:
            continue
        if name not in config.resume_allow:
            raise UserError(
                f"{name}: it was {saved} when the checkpoint was made and is {now} now, so the run would not be the "
                f"same; restore it, set 'resume_allow=[{name}]', or start another run with run_dir=..."
            )
        log.warning("resume_allow accepts a changed %s: %s in the run, %s now", name, saved, now)
    if state["threads"] != torch.get_num_threads():
        log.warning(
            "resume: %d threads now, %d before: results agree to rounding, not bit for bit",
            torch.get_num_threads(), state["threads"],
        )  # fmt: skip
