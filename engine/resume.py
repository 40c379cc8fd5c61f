"""Resuming: choose a checkpoint, check it against this run, restore it."""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.checkpoint import (
    Checkpoint,
    describe_checkpoint,
    find_checkpoint,
    find_continuation,
    list_checkpoints,
    load_checkpoint,
    move_aside_beyond,
)
from engine.config import TrainingConfig
from engine.run_parts import Run
from utils.config.recipe import check_resumable
from utils.errors import UserError
from utils.ranks import distributed
from utils.ranks.slurm_step import restart_count
from utils.record.logging import get_logger
from utils.record.run_folder import RunFolder

log = get_logger(__name__)


class _Part(BaseModel):
    """A part of a checkpoint's state: strict, with keys of its own beside the stated ones."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Optim(_Part):
    name: str


class _Config(_Part):
    optim: _Optim
    resume: str


_Sums = dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]]


class _Meters(_Part):
    log: _Sums
    epoch: _Sums


class _Best(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    value: float | None = None
    step: int | None = None


class _Clock(_Part):
    seconds: float
    epoch_step: float
    epoch_seconds: float


class _State(_Part):
    """What is read of a checkpoint's state.json, which may be forged."""

    step: Annotated[int, Field(ge=0)]
    config: _Config
    fingerprints: dict[str, str]
    precision: str
    threads: int
    optimizer: dict[str, Any]
    meters: _Meters
    skipped: list[int]
    skipped_empty: list[int]
    best: _Best
    best_raw: _Best = _Best()
    last_report: dict[str, float]
    last_evaluated: int = 0
    clock: _Clock | None = None
    peak_memory_gib: float | None = None
    found_lr: float | None = None
    origin: dict[str, Any] | None = None


def _is_auto(config: TrainingConfig) -> bool:
    """Return whether the run continues from its own last checkpoint; in a requeued job also with resume=never."""
    return config.resume == "auto" or (config.resume == "never" and restart_count() > 0)


def will_resume(config: TrainingConfig, folder: Path) -> bool:
    """Return whether the run continues from a checkpoint, so that no initial weights are loaded."""
    if _is_auto(config):
        return bool(list_checkpoints(folder / "checkpoints"))
    return config.resume != "never"


def resume(run: Run, config: TrainingConfig) -> None:
    """Continue from the checkpoint that `resume` chooses, if there is one; on all ranks.

    Raises UserError where that checkpoint does not fit this run.
    """
    folder = run.saver.folder
    found = distributed.rank_zero_call(lambda: _choose(config, folder))
    if found is None:
        return
    checkpoint = load_checkpoint(Path(found), lambda described: _check(described, run, config))
    _restore(run, checkpoint)
    log.info("resumed from %s at step %d", found, run.step)
    if run.found_lr is not None:
        log.info("the peak rate is %.3g, which the range test of this run found", run.found_lr)
    distributed.rank_zero_call(lambda: _move_aside(folder, run.step))


def check_resume(config: TrainingConfig, folder: RunFolder, total_steps: int) -> None:
    """Check in a dry run what can be checked of the checkpoint that the run would continue from. Raises as `resume`."""
    found = _choose(config, folder)
    if found is not None:
        _check_recipe(describe_checkpoint(Path(found)), folder, config, total_steps)


def _choose(config: TrainingConfig, folder: RunFolder) -> str | None:
    """Return the checkpoint to continue from; on rank 0."""
    if _is_auto(config):
        found = find_checkpoint(folder.checkpoints)
        return str(found) if found else None
    if config.resume != "never":
        # After a kill, the same command continues from what it has saved since.
        found = find_continuation(folder.checkpoints, folder.config["resume"])
        if found is None:
            return config.resume
        log.info("resume: %s was made by this command, so the run continues from it, not from %s", found, config.resume)
        return str(found)
    existing = list_checkpoints(folder.checkpoints)
    if existing:
        raise UserError(
            f"resume: never was given, but {folder.path} holds {len(existing)} checkpoints (up to "
            f"{existing[-1].name}); nothing is overwritten: give another run_dir, or set resume=auto"
        )
    return None


def _move_aside(folder: RunFolder, step: int) -> None:
    """Move checkpoints beyond the one that is resumed aside; on rank 0."""
    hidden = move_aside_beyond(folder.checkpoints, step)
    if hidden:
        log.warning(
            "resume: checkpoints beyond step %d are moved aside and removed by the next save; until then they are %s",
            step, ", ".join(map(str, hidden)),
        )  # fmt: skip


def _check(checkpoint: Checkpoint, run: Run, config: TrainingConfig) -> None:
    """Compare a checkpoint's recipe, data, machine and tensors with this run's."""
    state = checkpoint.state
    _check_recipe(checkpoint, run.saver.folder, config, run.plan.total_steps)
    _check_fingerprints(state["fingerprints"], run, config)
    saved, found = state["precision"], run.learner.runtime.precision
    if saved != found:
        if "runtime.precision" not in config.resume_allow:
            raise UserError(
                f"runtime.precision: auto chose {found} here, the run began with {saved}; set "
                f"runtime.precision={saved} or 'resume_allow=[runtime.precision]'"
            )
        log.warning("resume_allow accepts runtime.precision: %s in the run, %s now", saved, found)
    if state["threads"] != torch.get_num_threads():
        log.warning(
            "resume: %d threads now, %d before: results agree to rounding, not bit for bit",
            torch.get_num_threads(),
            state["threads"],
        )
    others = state["optimizer"] if _has_own_optimizer(checkpoint, run) else None
    run.learner.check_state(checkpoint.tensors, others, checkpoint.path)


def _check_recipe(checkpoint: Checkpoint, folder: RunFolder, config: TrainingConfig, total_steps: int) -> None:
    """Compare a checkpoint's recipe and length with those of the run that continues from it."""
    state = checkpoint.state
    try:
        _State.model_validate(state)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"resume: {checkpoint.path} has a wrong state.json ({where}: {error.errors()[0]['msg']}), though its "
            "checksum is right; name another checkpoint, or start another run with run_dir=..."
        ) from None
    for line in check_resumable(state["config"], folder.config, config.resume_allow, checkpoint.path):
        log.warning("resume_allow accepts %s", line)
    if state.get("passed_over"):
        raise UserError(
            f"resume: {checkpoint.path} is of a run that has rolled back, which this release cannot continue; start "
            "another run with run_dir=... and init_from=RUN"
        )
    _check_found_rate(state, folder.config)
    if checkpoint.step > total_steps:
        raise UserError(
            f"loop.total_steps: the run is already at step {checkpoint.step}, beyond the {total_steps} "
            "requested; request more, or give another run_dir (a sweep: another sweep.name)"
        )


def _check_found_rate(state: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse what nothing would read: another rate, where a range test has found it, and a range test afterwards."""
    test = state["config"]["lr_finder"]
    if config["lr_finder"]["enabled"] and not test["enabled"]:
        raise UserError(
            "lr_finder.enabled: true has no effect on a run that began without a range test; set "
            "lr_finder.enabled=false, or start another run with run_dir=..."
        )
    if state.get("found_lr") is None:  # older checkpoints have none
        return
    for key in ("lr", "base_lr"):
        saved, now = state["config"]["optim"].get(key), config["optim"].get(key)
        if saved != now:
            raise UserError(
                f"optim.{key}: {now} has no effect, because the range test of this run found {state['found_lr']:.3g}, "
                f"which stays for the whole run; remove optim.{key}, or start another run with run_dir=... and "
                f"lr_finder.enabled=false"
            )


def _check_fingerprints(saved: dict[str, str], run: Run, config: TrainingConfig) -> None:
    """Compare fingerprints of the data, of facts and of frozen networks; one that an older run lacks is not known."""
    for name, found in run.fingerprints.items():
        if saved.get(name, found) == found:
            continue
        if name not in config.resume_allow:
            raise UserError(
                f"resume: {name} of {run.saver.folder.path} has changed since the checkpoint (fingerprint "
                f"{saved.get(name)} then, {found} now), so the run would not be the same; restore it, or start another "
                "run with run_dir=..."
            )
        log.warning(
            "resume_allow accepts a changed %s: fingerprint %s in the run, %s now", name, saved.get(name), found
        )


def _has_own_optimizer(checkpoint: Checkpoint, run: Run) -> bool:
    """Return whether a checkpoint's optimiser is of this run's kind, so that its state can be loaded."""
    saved, now = checkpoint.state["config"]["optim"], run.saver.folder.config["optim"]
    return (saved["name"], saved.get("opt")) == (now["name"], now.get("opt"))


def _restore(run: Run, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into the run."""
    state, others = checkpoint.state, checkpoint.state["optimizer"]
    if not _has_own_optimizer(checkpoint, run):
        names = (config["optim"]["name"] for config in (run.saver.folder.config, state["config"]))
        log.warning("resume: %s starts without state: the checkpoint's optimiser is %s", *names)
        others = None
    run.learner.load_state(checkpoint.tensors, others, checkpoint.path)
    run.learner.step = checkpoint.step
    run.learner.task.origin = state.get("origin")  # older checkpoints have none
    run.recorder.load_state(state)
    run.evaluator.load_state(state)
    if state.get("found_lr") is not None:  # older checkpoints have none
        run.use_lr(state["found_lr"])
