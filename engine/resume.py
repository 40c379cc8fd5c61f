"""What a run saves, and how it continues: choose a checkpoint, check it against this run, restore it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import find_checkpoint, find_damage, list_checkpoints, move_aside_beyond, read_groups, read_state
from engine.config import TrainingConfig
from engine.evaluator import Best
from engine.run_parts import Run
from utils.config.recipe import check_resumable
from utils.errors import UserError
from utils.ranks import distributed
from utils.ranks.slurm_step import restart_count
from utils.record.logging import get_logger
from utils.record.run_folder import RunFolder

log = get_logger(__name__)


def save(run: Run, *, last: bool) -> None:
    """Save everything that the run continues from, on all ranks; `last` and errors: as `Saver.save`.

    The files that the checkpoint names or is beyond are on the disk before it: best weights, rows, samples.
    """
    learner, recorder, evaluator, plan = run.learner, run.recorder, run.evaluator, run.plan
    evaluator.settle()
    recorder.phase(run.step, "saving")
    learner.sync_buffers()
    recorder.skips.read(run.step)
    tensors, optimizer = learner.state()
    state = {
        "config": run.saver.folder.config,
        "precision": learner.runtime.precision,
        "threads": torch.get_num_threads(),
        "world_size": plan.world_size,
        "position": run.step * plan.global_batch_size,
        "fingerprints": run.fingerprints,
        "origin": learner.task.origin,
        "found_lr": run.found_lr,
        "best": asdict(evaluator.best),
        "last_report": evaluator.last_report,
        "last_evaluated": evaluator.last_step,
        **recorder.state(),
        "optimizer": optimizer,  # what of its state is not tensors
    }
    if run.saver.sync_samples(recorder.sync_samples, last=last):
        run.saver.save(learner, tensors, state, recorder.sync, last=last)


def resume(run: Run, config: TrainingConfig) -> None:
    """Continue from the checkpoint that `resume` chooses, if there is one; on all ranks.

    Raises UserError where that checkpoint does not fit this run.
    """
    folder = run.saver.folder
    found = distributed.rank_zero_call(lambda: _choose(config, folder))
    if found is None:
        return
    state = read_state(found)
    _check_recipe(found, state, folder, config, run.plan.total_steps)
    _check_start(state, run, config)
    _restore(run, found, state)
    log.info("resumed from %s at step %d", found, run.step)
    if run.found_lr is not None:
        log.info("the peak rate is %.3g, which the range test of this run found", run.found_lr)
    distributed.rank_zero_call(lambda: move_aside_beyond(folder.checkpoints, run.step))


def _restore(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Load what `save` has saved into the run."""
    saved, now = (config["optim"] for config in (state["config"], run.saver.folder.config))
    optimizer = state["optimizer"]
    if (saved["name"], saved.get("opt")) != (now["name"], now.get("opt")):
        log.warning("resume: %s starts without state: the checkpoint's optimiser is %s", now["name"], saved["name"])
        optimizer = None
    run.learner.load_state(read_groups(path, state), optimizer, str(path))
    run.learner.step = state["step"]
    run.learner.task.origin = state["origin"]
    run.recorder.load_state(state)
    run.evaluator.best = Best(**state["best"])
    run.evaluator.last_report, run.evaluator.last_step = state["last_report"], state["last_evaluated"]
    if state["found_lr"] is not None:
        run.use_lr(state["found_lr"])


# ------------------------------------------------------------------------------------------------------------ choosing


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


def _choose(config: TrainingConfig, folder: RunFolder) -> Path | None:
    """Return the checkpoint to continue from; on rank 0. Raises UserError (`resume`) where it cannot be read."""
    existing = list_checkpoints(folder.checkpoints)
    if config.resume == "never" and not _is_auto(config):
        if existing:
            raise UserError(
                f"resume: never was given, but {folder.path} holds {len(existing)} checkpoints (up to "
                f"{existing[-1].name}); nothing is overwritten: give another run_dir, or set resume=auto"
            )
        return None
    found, named = find_checkpoint(folder.checkpoints), Path(config.resume)
    if _is_auto(config):
        return found
    # After a kill, the same command continues from what it has saved since.
    if found is not None and Path(read_state(found)["config"]["resume"]) == named:
        log.info("resume: %s was made by this command, so the run continues from it, not from %s", found, named)
        return found
    if not named.is_dir():
        raise UserError(f"resume: {named} is not a checkpoint folder; name one like RUN/checkpoints/step_00001200")
    problem = find_damage(named)
    if problem is not None:
        raise UserError(f"resume: {named} is damaged: {problem}; name another one or set resume=auto")
    return named


# ------------------------------------------------------------------------------------------------------------ checking


def check_resume(config: TrainingConfig, folder: RunFolder, total_steps: int) -> None:
    """Check in a dry run what can be checked of the checkpoint that the run would continue from. Raises as `resume`."""
    found = _choose(config, folder)
    if found is not None:
        _check_recipe(found, read_state(found), folder, config, total_steps)


def _check_recipe(
    path: Path, state: dict[str, Any], folder: RunFolder, config: TrainingConfig, total_steps: int
) -> None:
    """Compare a checkpoint's recipe and length with those of the run that continues from it."""
    saved, now = state["config"], folder.config
    for line in check_resumable(saved, now, config.resume_allow, str(path)):
        log.warning("resume_allow accepts %s", line)
    # Refuse what nothing would read: a range test afterwards, and another rate where a range test has found it.
    if config.lr_finder.enabled and not saved["lr_finder"]["enabled"]:
        raise UserError(
            "lr_finder.enabled: true has no effect on a run that began without a range test; set "
            "lr_finder.enabled=false, or start another run with run_dir=..."
        )
    for key in ("lr", "base_lr"):
        if state["found_lr"] is not None and saved["optim"].get(key) != now["optim"].get(key):
            raise UserError(
                f"optim.{key}: {now['optim'].get(key)} has no effect, because the range test of this run found "
                f"{state['found_lr']:.3g}, which stays for the whole run; remove optim.{key}, or start another run "
                "with run_dir=... and lr_finder.enabled=false"
            )
    if state["step"] > total_steps:
        raise UserError(
            f"loop.total_steps: the run is already at step {state['step']}, beyond the {total_steps} "
            "requested; request more, or give another run_dir (a sweep: another sweep.name)"
        )


def _check_start(state: dict[str, Any], run: Run, config: TrainingConfig) -> None:
    """Compare a checkpoint's data, facts, frozen networks and machine with this run's."""
    for name, now in run.fingerprints.items():
        saved = state["fingerprints"].get(name)
        if saved == now:
            continue
        if name not in config.resume_allow:
            raise UserError(
                f"resume: {name} of {run.saver.folder.path} has changed since the checkpoint (fingerprint {saved} "
                f"then, {now} now), so the run would not be the same; restore it, or start another run with run_dir=..."
            )
        log.warning("resume_allow accepts a changed %s: fingerprint %s in the run, %s now", name, saved, now)
    saved, now = state["precision"], run.learner.runtime.precision
    if saved != now:
        if "runtime.precision" not in config.resume_allow:
            raise UserError(
                f"runtime.precision: auto chose {now} here, the run began with {saved}; set "
                f"runtime.precision={saved} or 'resume_allow=[runtime.precision]'"
            )
        log.warning("resume_allow accepts runtime.precision: %s in the run, %s now", saved, now)
    if state["threads"] != torch.get_num_threads():
        log.warning(
            "resume: %d threads now, %d before: results agree to rounding, not bit for bit",
            torch.get_num_threads(), state["threads"],
        )  # fmt: skip
