"""Write, find and read checkpoints. They are written atomically and resume on any number of ranks.

    checkpoints/
        step_00001200/
            weights.safetensors          the exported networks, a complete weight file
            task.safetensors             the rest of the task's state by name
            average_weights.safetensors  averages of the exported networks; averages.safetensors: of other networks
            optimizer.safetensors        `<parameter name>/<state name>`
            scale.safetensors            the loss scale
            state.json                   all other state (loop.py: Run.save), and checksums of the files above
            state.sha256                 checksum of state.json
        .step_00001300.tmp-<pid>/        a checkpoint that is written or removed; a later save removes leftovers

Rank 0 writes a checkpoint under a temporary name, flushes it and renames it. Nothing is pickled. There is no random
state: random numbers are functions of (seed, step, position) (utils/rng.py). weights/last_weights.safetensors and
weights/ema_weights.safetensors are links to a checkpoint's files.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.config import TrainingConfig
from engine.update.learner import Groups, Learner
from utils.config.recipe import check_resumable
from utils.config.versions import read_saved
from utils.errors import UserError, about
from utils.io.files import (
    Json,
    Values,
    fsync_path,
    ignore_write_errors,
    link_or_copy,
    output_errors,
    read_json,
    sha256_file,
    sha256_text,
    write_text,
)
from utils.io.safe_text import hide_secrets_in
from utils.io.weights import (
    read_tensors,
    refuse_not_finite,
    weight_metadata,
    write_tensors,
    write_weights,
)
from utils.ranks import distributed
from utils.record.logging import log, restart_count
from utils.record.run_folder import RunFolder
from utils.record.run_reader import RunReader
from utils.start import open_name

FORMAT = 2
KEPT = 2  # newest checkpoints that stay, beside the best one
_NAME = re.compile(r"step_(\d{8,})")


# ------------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(final: Path, tensors: Groups, state: Json, texts: Mapping[str, Mapping[str, str]]) -> None:
    """Write a checkpoint folder, `.../step_XXXXXXXX`. texts: metadata by group."""
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        checksums = {}
        for name, group in tensors.items():
            if group:  # plain SGD has no state, and safetensors cannot read a file without tensors
                file = temporary / f"{name}.safetensors"
                write_tensors(file, group, texts.get(name))
                checksums[file.name] = sha256_file(file)
        numbers = {"format": FORMAT, "step": step_of(final)}
        text = json.dumps({**numbers, **state, "groups": list(tensors), "checksums": checksums}, indent=1)
        write_text(temporary / "state.json", text)
        write_text(temporary / "state.sha256", sha256_text(text) + "\n")
        if final.exists():  # written before a kill; the same step has the same content
            _remove(final)
        os.rename(temporary, final)
        fsync_path(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_to_host(groups: Groups) -> Groups:
    """Return contiguous copies on the CPU, of GPU tensors in pinned memory, which torch reuses for the next save."""

    def copy(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor.detach())

    return {group: {name: copy(tensor) for name, tensor in tensors.items()} for group, tensors in groups.items()}


class Saver:
    """Write checkpoints and weight files into a run folder. facts: about the run, for metadata of weight files.

    A thread of rank 0 writes one checkpoint at a time. The main thread logs its errors: a process forked while the
    thread logs would inherit the logger's lock.
    """

    def __init__(self, folder: RunFolder, config: TrainingConfig, facts: Json) -> None:
        self.folder = folder
        self._facts = facts
        self._loop = config.loop
        self.remote_copy = None
        if config.loop.checkpoint_mirror:
            open_copy = open_name("engine.run.remote_copy:RemoteCopy")
            self.remote_copy = open_copy(config.loop.checkpoint_mirror, folder.path)
        self._written = None
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Return whether `loop.checkpoint_every_minutes` have passed since the last save, by this rank's clock."""
        if self._written is not None and self._written.done():
            self.wait()
        minutes = self._loop.checkpoint_every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60.0 * minutes

    def save(self, learner: Learner, tensors: Groups, state: Json, sync: Callable[[], None], *, last: bool) -> None:
        """Write a checkpoint of this step in the background, link its weights, and remove old checkpoints.

        sync: flushes the rows of this rank before the checkpoint is published. last: wait for the write, and raise
        UserError if it fails.
        """
        if distributed.is_main():
            self._start(learner, tensors, state, sync)
        else:
            with ignore_write_errors(self.folder.path / "samples"):
                sync()
        if last:
            distributed.rank_zero_call(lambda: self.wait(last=True))
        self._saved_at = time.monotonic()

    def _start(self, learner: Learner, tensors: Groups, state: Json, sync: Callable[[], None]) -> None:
        """Wait for the previous write, copy the state and begin to write it."""
        step = learner.step
        folder = self.folder.path
        names = {"weights": "last"} | ({"average_weights": "ema"} if learner.exports_average else {})
        metadata = {group: self._metadata(learner, averaged=name == "ema") for group, name in names.items()}
        self.wait()
        for kept, file in RunReader(folder).kept.items():
            if kept > step:  # written by a continuation that this run replaces
                file.unlink(missing_ok=True)
        path = folder / f"checkpoints/step_{step:08d}"
        log.debug("saving %s", path)
        copies = copy_to_host(tensors)

        def write() -> None:
            with output_errors("run_dir", path):
                sync()
                texts = {group: weight_metadata(values, copies[group]) for group, values in metadata.items()}
                save_checkpoint(path, copies, state, texts)
                for group, name in names.items():
                    link_or_copy(path / f"{group}.safetensors", folder / f"weights/{name}_weights.safetensors")
                copied = self.remote_copy.checkpoint if self.remote_copy else Path()
                remove_others(path.parent, step, state["best"]["step"], copied)

        writer = ThreadPoolExecutor(1, "checkpoint writer")
        self._written = writer.submit(write)
        writer.shutdown(wait=False)  # its thread ends after the write

    def wait(self, *, last: bool = False) -> None:
        """Wait for the current write. Log its error, or raise it if this is the `last` write."""
        if self._written is None:
            return
        error = self._written.exception()
        self._written = None
        if error is None:
            if self.remote_copy:
                self.remote_copy.copy(last=False)
            return
        if last:
            raise error
        trace = None if isinstance(error, UserError) else error
        log.error("%s\nThe next save tries again", error, exc_info=trace)

    def write_alone(self, learner: Learner, name: str) -> str:
        """Write the evaluated weights as weights/<name>, on all ranks. Return the checksum; "" if the disk refuses."""
        tensors = learner.exported_tensors()
        metadata = self._metadata(learner, averaged=learner.exports_average)
        path = self.folder.path / "weights" / name

        def write() -> str:
            try:
                learner.task.write_beside(path, metadata)
                return write_weights(path, tensors, metadata)
            except (OSError, SafetensorError) as error:
                log.error("%s cannot be written (%s); make room there: the run goes on without it", path, error)
                return ""

        return distributed.rank_zero_call(write)

    def _metadata(self, learner: Learner, *, averaged: bool) -> Json:
        """Return the metadata of a weight file."""
        task = learner.task
        run = self.folder
        metadata = {
            "format": 1,
            "script": run.job.script,
            "task": run.config["task"],
            "model": run.config["model"],
            "step": learner.step,
            "lr": learner.schedule.lr,
            "average": averaged,
            "precision": learner.runtime.precision,
        }
        metadata["epoch"] = round(learner.plan.epoch_at(learner.step), 2)
        origin = {"origin": task.origin} if task.origin else {}
        return {**metadata, **self._facts, **origin, **task.metadata}


# ------------------------------------------------------------------------------------------------ keeping and removing


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    paths = (path for path in folder.glob("step_*") if path.is_dir())
    return sorted((path for path in paths if _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def _remove(path: Path) -> None:
    """Rename a checkpoint, then remove it, so that a kill leaves no damaged checkpoint."""
    hidden = path.with_name(f".{path.name}.tmp-{os.getpid()}-old")
    shutil.rmtree(hidden, ignore_errors=True)  # from an earlier process with the same number
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def remove_others(folder: Path, step: int, best_step: int | None, used: Path = Path()) -> None:
    """Keep the newest checkpoints up to `step` (just saved), the best one and the `used` one; remove all others.

    Checkpoints beyond `step` are damaged, or the run resumed from an earlier one.
    """
    for path in folder.glob(".step_*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    checkpoints = list_checkpoints(folder)
    newest = [path for path in checkpoints if step_of(path) <= step][-KEPT:]
    for path in checkpoints:
        if path not in (used, *newest) and step_of(path) != best_step:
            _remove(path)


# ------------------------------------------------------------------------------------------------------------- reading


def find_damage(path: Path) -> str | None:
    """Return the first error in a checkpoint's files, or None if all match their checksums."""
    try:
        text = (path / "state.json").read_text("utf-8")
        if sha256_text(text) != (path / "state.sha256").read_text("utf-8").strip():
            return "state.json does not match its checksum"
        state = json.loads(text)
        if state["format"] != FORMAT:
            return f"state.json has format {state['format']}; this version reads {FORMAT}"
        for name in ("step", "config", "fingerprints", "origin", "best", "optimizer", "groups"):
            state[name]  # a KeyError names the first missing key
        for name, checksum in state["checksums"].items():
            if sha256_file(path / name) != checksum:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, RecursionError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, or None if the folder has none; warn about each damaged one.

    Raises UserError if all are damaged, because a run must not silently start again from step 0.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        if (problem := find_damage(path)) is None:
            return path
        log.warning("checkpoint %s is damaged: %s; trying the one before it", path, problem)
    if checkpoints:
        raise UserError(
            f"resume: all {len(checkpoints)} checkpoints in {folder} are damaged, see the warnings above; restore or "
            "remove them (a checkpoint that resume names is then used), or start in another folder with run_dir=..."
        )
    return None


def read_state(path: Path) -> Json:
    """Return the state.json of a checkpoint."""
    return read_json(path / "state.json")


@about("resume")
def read_groups(path: Path, state: Values) -> Groups:
    """Read a checkpoint's tensors. Raises UserError (`resume`) if a value is not finite."""
    groups = {}
    for group in state["groups"]:
        file = path / f"{group}.safetensors"
        groups[group] = read_tensors(file) if file.name in state["checksums"] else {}
        refuse_not_finite(groups[group], file)
    return groups


# ------------------------------------------------------------------------------------------------------------ resuming


def _resume_of(config: TrainingConfig) -> str:
    """Return `resume`, with auto for never in a requeued job."""
    return "auto" if config.resume == "never" and restart_count() > 0 else config.resume


def will_resume(config: TrainingConfig, folder: Path) -> bool:
    """Return whether the run resumes and loads no initial weights. Rank 0 asks before any work.

    `choose_checkpoint` chooses the checkpoint later, under the folder's lock: an earlier process may still save. Raises
    UserError if the newest checkpoint has another recipe. A damaged checkpoint is ignored: an earlier one is chosen.
    """
    resume = _resume_of(config)
    if resume != "auto":
        return resume != "never"
    existing = list_checkpoints(folder / "checkpoints")
    if existing:
        try:
            saved = read_state(existing[-1])["config"]
        except (OSError, ValueError, KeyError):
            return True
        _check_recipe(config, saved, existing[-1])
    return bool(existing)


def check_copy(config: TrainingConfig, saved: Values, place: str) -> None:
    """Raise UserError if the run of a copy (`loop.checkpoint_mirror`) must not continue here. saved: its keys."""
    if _resume_of(config) == "never":
        raise UserError(f"resume: never was given, but {place} holds checkpoints; give another run_dir, or set auto")
    _check_recipe(config, saved, Path(place))


def _check_recipe(config: TrainingConfig, saved: Values, path: Path) -> list[str]:
    """Return the differences from a checkpoint's recipe that `resume_allow` names. Raises UserError for other ones."""
    values = hide_secrets_in(config.model_dump(mode="json"))
    return check_resumable(read_saved(saved), values, config.resume_allow, str(path))


def choose_checkpoint(config: TrainingConfig, folder: Path, total_steps: int) -> Path | None:
    """Return the checkpoint to resume from, or None for a new run. Rank 0 calls it.

    Raises UserError if it cannot be read, or its recipe or length does not fit.
    """
    resume = _resume_of(config)
    existing = list_checkpoints(folder / "checkpoints")
    if resume == "never" and existing:
        raise UserError(
            f"resume: never was given, but {folder} holds {len(existing)} checkpoints (up to {existing[-1].name}), "
            "which are never overwritten; give another run_dir, or set resume=auto"
        )
    chosen = find_checkpoint(folder / "checkpoints")
    if resume not in ("auto", "never"):
        named = Path(resume)
        # After a kill, the same command resumes from its own newer checkpoints.
        if chosen is not None and Path(read_state(chosen)["config"]["resume"]) == named:
            log.info("resume: %s was written by this command; the run continues from it, not from %s", chosen, named)
        elif (problem := find_damage(named)) is not None:
            raise UserError(
                f"resume: {named} is not a complete checkpoint: {problem}; name one like "
                "RUN/checkpoints/step_00001200, or set resume=auto"
            )
        else:
            chosen = named
    if chosen is None:
        return None
    state = read_state(chosen)
    for line in _check_recipe(config, state["config"], chosen):
        log.warning("resume_allow accepts %s", line)
    if state["step"] > total_steps:
        raise UserError(
            f"loop.total_steps: the run is already at step {state['step']}, beyond the {total_steps} requested; "
            "request more, or give another run_dir (a sweep: another sweep.name)"
        )
    if existing and step_of(existing[-1]) > state["step"]:  # damaged, or the user named an earlier one
        log.warning("resume: the next save removes the checkpoints beyond step %d", state["step"])
    return chosen
