"""Checkpoints that are whole or absent, and that resume on any number of ranks; how they are written and found.

    checkpoints/
        step_00001200/
            weights.safetensors          the exported networks, a complete weight file
            task.safetensors             the rest of the task's state by name
            average_weights.safetensors  averages of the exported networks; averages.safetensors: of other networks
            optimizer.safetensors        `<parameter name>/<state name>`
            scale.safetensors            the loss scale
            state.json                   everything else (engine/run.py: Run.save), and checksums of the files above
            state.sha256                 checksum of state.json
        .step_00001300.tmp-<pid>/        being written, or moved aside; removed by a later save

Rank 0 writes each under a temporary name, flushes it and renames it. Nothing is pickled. There is no random state to
save: all randomness is a function of (seed, step, position) (utils/rng.py). weights/last_weights.safetensors and
weights/ema_weights.safetensors are links to a checkpoint's files: no tensor is written twice.
"""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.config import LoopConfig
from engine.learner import Learner
from engine.parallel import is_sharded
from engine.recorder import Recorder
from utils.errors import UserError, about
from utils.io.files import fsync_path, link_or_copy, sha256_file, sha256_text
from utils.io.weights import read_tensors, refuse_not_finite, weight_metadata, write_tensors, write_weights
from utils.ranks import distributed
from utils.record.logging import get_logger
from utils.record.run_folder import RunFolder

log = get_logger(__name__)

Groups = Mapping[str, Mapping[str, Tensor]]  # tensors by group and name
FORMAT = 2
_NAME = re.compile(r"step_(\d{8,})")
_AGAIN = "\nThe next save tries again"


# ------------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    folder: Path, step: int, tensors: Groups, state: dict[str, Any], texts: Mapping[str, Mapping[str, str]]
) -> Path:
    """Write `folder/step_XXXXXXXX` and return it. texts: the metadata of some groups' files."""
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        checksums = {}
        for name, group in tensors.items():
            if group:  # plain SGD has no state, and safetensors cannot read a file without tensors
                file = temporary / f"{name}.safetensors"
                write_tensors(file, group, texts.get(name))
                checksums[file.name] = sha256_file(file)
        about = {"format": FORMAT, "step": step, **state, "groups": list(tensors), "checksums": checksums}
        text = json.dumps(about, indent=1)
        for name, content in (("state.json", text), ("state.sha256", sha256_text(text) + "\n")):
            (temporary / name).write_text(content, encoding="utf-8")
            fsync_path(temporary / name)
        fsync_path(temporary)
        if final.exists():  # made by the run before a kill; the same step has the same content
            shutil.rmtree(_move_aside(final))
        os.rename(temporary, final)
        fsync_path(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


@contextmanager
def _write_errors(folder: Path, what: str, tensors: Groups) -> Iterator[None]:
    """Turn a write error into a UserError (`run_dir`) that names `what` and how many bytes the tensors need."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        raise UserError(
            f"run_dir: {what} cannot be written to {folder}: it needs {needed / 2**20:.1f} MiB, "
            f"{shutil.disk_usage(existing).free / 2**20:.1f} MiB are free ({error}). Earlier checkpoints are complete; "
            "free some space and give the same command again"
        ) from None


class Writer:
    """Write one state after another in a thread, each as it was when it was given; on rank 0.

    At most one write is running; the next one waits for it. Errors are logged by the main thread, so that a process
    forked meanwhile inherits no lock of the logger. Host memory is kept for the next save, pinned for a GPU's tensors.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._message = ""

    def submit(self, groups: Groups, write: Callable[[Groups], None], message: str, *, copied: bool = False) -> None:
        """Call `write` with the groups as they are now, and log `message` when it is done.

        copied: nothing else holds the groups' tensors, so they need no copy here.
        """
        self.wait()
        copies, event = (groups, None) if copied else self.copy(groups)

        def run() -> None:
            try:
                if event is not None:
                    event.synchronize()
                write(copies)
            except Exception as error:  # logged or raised by the main thread
                self._error = error

        self._message = message
        self._thread = threading.Thread(target=run, name="checkpoint writer")
        self._thread.start()

    def copy(self, groups: Groups) -> tuple[Groups, torch.cuda.Event | None]:
        """Return contiguous copies, and the event after which copies from a GPU, queued by now, are complete."""
        copies: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
        event = None
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                copy = self._kept.get((group, name))
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copies[group][name] = self._kept[group, name] = copy.copy_(tensor.detach(), non_blocking=True)
                event = event or (torch.cuda.Event() if tensor.is_cuda else None)
        if event is not None:
            event.record()
        return copies, event

    def poll(self) -> None:
        """Log the end of a write that is over; cheap."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self, *, last: bool = False) -> None:
        """Wait for the running write. An error is logged; it is raised after the `last` one, which no other follows."""
        if self._thread is None:
            return
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is None:
            log.debug("%s", self._message)
        elif last:
            raise error
        else:
            log.error("%s%s", error, _AGAIN, exc_info=None if isinstance(error, UserError) else error)


class Saver:
    """Write checkpoints and weight files into a run folder. helpers: fingerprints of the task's helpers."""

    def __init__(self, folder: RunFolder, loop: LoopConfig, helpers: dict[str, str]) -> None:
        self.folder, self._helpers, self._loop = folder, helpers, loop
        self.writer = Writer()
        self._saved_at, self._has_asked = time.monotonic(), False

    def is_due(self) -> bool:
        """Return, once, whether `loop.checkpoint_every_minutes` have passed since the last checkpoint; on rank 0."""
        self.writer.poll()
        minutes = self._loop.checkpoint_every_minutes
        if minutes is None or self._has_asked or not distributed.is_main():
            return False
        self._has_asked = time.monotonic() - self._saved_at >= 60.0 * minutes
        return self._has_asked

    def save(self, learner: Learner, tensors: Groups, state: dict[str, Any], recorder: Recorder, *, last: bool) -> None:
        """Write a checkpoint of this step in the background, link its weights, and remove old checkpoints.

        The rows that a run resumed from here keeps are flushed before it. last: wait until everything is on the disk.
        Raises UserError where the disk refuses the last checkpoint, or the rows before it.
        """
        step, folder = learner.step, self.folder
        if not self._sync_samples(recorder, last=last):
            return
        names = {"weights": "last"} | ({"average_weights": "ema"} if learner.exports_average else {})
        metadata = {group: self._metadata(learner, averaged=name == "ema") for group, name in names.items()}

        def write(groups: Groups) -> None:
            with _write_errors(folder.checkpoints, f"the checkpoint of step {step}", groups):
                recorder.sync()
                texts = {group: weight_metadata(values, groups[group]) for group, values in metadata.items()}
                path = save_checkpoint(folder.checkpoints, step, groups, state, texts)
                for group, name in names.items():
                    link_or_copy(path / f"{group}.safetensors", folder.weights / f"{name}_weights.safetensors")
                remove_old(folder.checkpoints, self._loop.keep_checkpoints, step, state["best"]["step"])

        if distributed.is_main():
            message = f"saved {folder.checkpoints}/step_{step:08d}"
            self.writer.submit(tensors, write, message, copied=is_sharded(learner.model))
        if last:
            distributed.rank_zero_call(lambda: self.writer.wait(last=True))
        self._saved_at, self._has_asked = time.monotonic(), False

    def _sync_samples(self, recorder: Recorder, *, last: bool) -> bool:
        """Flush every rank's record of samples; returns False, or raises for the `last` save, where a disk refuses."""
        problem = None
        try:
            with _write_errors(self.folder.path / "samples", "the record of samples", {}):
                recorder.sync_samples()
        except UserError as error:
            problem = error
        problem = next((found for found in distributed.gather_objects(problem) if found is not None), None)
        if problem is not None and last:
            raise problem
        if problem is not None:
            log.error("%s%s", problem, _AGAIN)
        return problem is None

    def write_best(self, learner: Learner) -> bool:
        """Write the exported networks as they are now as the best weights; on all ranks.

        Returns False where the disk refuses them, so that the best weights before them stay.
        """
        tensors, metadata = learner.exported_tensors(), self._metadata(learner, averaged=learner.exports_average)

        def write() -> bool:
            try:
                with _write_errors(self.folder.weights, f"the best weights of step {learner.step}", {"best": tensors}):
                    write_weights(self.folder.weights / "best_weights.safetensors", tensors, metadata)
            except UserError as error:
                log.error("%s%s", error, _AGAIN)
                return False
            return True

        return distributed.rank_zero_call(write)

    def _metadata(self, learner: Learner, *, averaged: bool) -> dict[str, Any]:
        """Return the metadata of a weight file."""
        return {
            "format": 1,
            "script": self.folder.job.script,
            "task": self.folder.config["task"],
            "model": self.folder.config["model"],
            "step": learner.step,
            "average": averaged,
            "precision": learner.runtime.precision,
            **({"frozen": self._helpers} if self._helpers else {}),
            **({"origin": learner.task.origin} if learner.task.origin else {}),
            **learner.task.metadata,
        }


# ------------------------------------------------------------------------------------------------ keeping and removing


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    every = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in every if path.is_dir() and _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def _move_aside(path: Path) -> Path:
    """Rename a checkpoint so that nothing finds it; a kill while it is removed then leaves no damaged one."""
    hidden = path.with_name(f".{path.name}.tmp-{os.getpid()}-old")
    shutil.rmtree(hidden, ignore_errors=True)  # from an earlier process with the same number
    os.rename(path, hidden)
    return hidden


def move_aside_beyond(folder: Path, step: int) -> None:
    """Hide the checkpoints of more than `step` updates: damaged ones, or those of another continuation.

    For a run that continues from `step`: neither a later start nor retention may count them.
    """
    hidden = [_move_aside(path) for path in list_checkpoints(folder) if step_of(path) > step]
    if hidden:
        log.warning(
            "resume: checkpoints beyond step %d are moved aside and removed by the next save; until then they are %s",
            step, ", ".join(map(str, hidden)),
        )  # fmt: skip


def remove_old(folder: Path, keep: int, step: int, best_step: int | None) -> None:
    """Keep the newest `keep` checkpoints up to `step`, the one just saved, and the best one; remove those before them.

    Also removes half-written folders of killed runs and checkpoints that a resumed run has moved aside.
    """
    for path in folder.glob(".step_*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in [path for path in list_checkpoints(folder) if step_of(path) <= step][:-keep]:
        if step_of(path) != best_step:
            shutil.rmtree(_move_aside(path))


# ------------------------------------------------------------------------------------------------------------- reading


def find_damage(path: Path) -> str | None:
    """Return the first error in a checkpoint's files, None where all agree with their checksums."""
    try:
        text = (path / "state.json").read_text(encoding="utf-8")
        if sha256_text(text) != (path / "state.sha256").read_text(encoding="utf-8").strip():
            return "state.json does not match its checksum"
        state = json.loads(text)
        if state["format"] != FORMAT:
            return f"state.json has format {state['format']}, this version reads {FORMAT}"
        for name, checksum in state["checksums"].items():
            if sha256_file(path / name) != checksum:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, RecursionError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, None where there is none at all; a warning names each damaged one.

    Raises UserError where all checkpoints are damaged: the run never starts again unasked.
    """
    every = list_checkpoints(folder)
    for path in reversed(every):
        problem = find_damage(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is damaged: %s; trying the one before it", path, problem)
    if every:
        raise UserError(
            f"resume: all {len(every)} checkpoints in {folder} are damaged, see the warnings above; restore or "
            "remove them (a checkpoint that resume names is then used), or start in another folder with run_dir=..."
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Return the state.json of a checkpoint."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


@about("resume")
def read_groups(path: Path, state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Read a checkpoint's tensors. Raises UserError (`resume`) where values are not finite."""
    groups: dict[str, dict[str, Tensor]] = {}
    for group in state["groups"]:
        file = path / f"{group}.safetensors"
        groups[group] = read_tensors(file) if file.name in state["checksums"] else {}
        refuse_not_finite(groups[group], file)
    return groups
