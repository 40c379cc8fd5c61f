"""Checkpoints that are whole or absent, and that resume on any number of ranks.

    checkpoints/
        step_00001200/
            task.safetensors        the task's state by name
            optimizer.safetensors   `<parameter name>/<state name>`
            ema.safetensors         where an average is kept
            state.json              step, config, fingerprints, best metric, meters, checksums of the files above
            state.sha256            checksum of state.json
        .step_00001300.tmp-<pid>/   being written, or out of sight; removed by a later save

Written by rank 0 under a temporary name, flushed, renamed. Nothing is pickled. There is no random state to keep: all
randomness is a function of (seed, step, position) (utils/rng.py).
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from utils.errors import UserError
from utils.io.files import fsync_path, read_json, sha256_file, sha256_text
from utils.io.untrusted.safetensors_header import read_header
from utils.io.weights import read_tensors, write_tensors
from utils.record.logging import get_logger

log = get_logger(__name__)

FORMAT = 1
_NAME = re.compile(r"step_(\d{8})")
ELSEWHERE = "give another run_dir, or use init_from=RUN to start from its weights"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's content: where it was read, tensors by file and name, and the JSON state."""

    path: str
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates done when it was made."""
        return self.state["step"]


@contextmanager
def refusals(folder: Path, what: str, needed: int) -> Iterator[None]:
    """Turn what the system refuses while `what`, of so many bytes, is written into a UserError (`run_dir`)."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        raise UserError(
            f"run_dir: {folder} does not take {what}: {needed / 2**20:.1f} MiB are needed, "
            f"{shutil.disk_usage(there).free / 2**20:.1f} MiB are free ({error}). Earlier checkpoints are whole; make "
            "room and give the same command again"
        ) from None


def count_bytes(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Return the size of groups of tensors."""
    return sum(tensor.nbytes for group in tensors.values() for tensor in group.values())


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]
) -> Path:
    """Write `folder/step_XXXXXXXX` and return it; called on rank 0.

    Raises UserError (`run_dir`) with the bytes needed where the disk does not take it; older checkpoints stay.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp-{os.getpid()}"
    if temporary.exists():
        shutil.rmtree(temporary)
    with refusals(folder, f"the checkpoint of step {step}", count_bytes(tensors)):
        try:
            temporary.mkdir(parents=True)
            checksums = {}
            for name, group in tensors.items():
                if not group:  # plain SGD has no state, and safetensors writes no file without tensors that it can read
                    continue
                file = temporary / f"{name}.safetensors"
                write_tensors(file, group)
                checksums[file.name] = sha256_file(file)
            text = json.dumps(
                {"format": FORMAT, "step": step, **state, "groups": list(tensors), "checksums": checksums}, indent=1
            )
            for name, content in (("state.json", text), ("state.sha256", sha256_text(text) + "\n")):
                (temporary / name).write_text(content, encoding="utf-8")
                fsync_path(temporary / name)
            fsync_path(temporary)
            if final.exists():  # made by the run before a kill; the same step has the same content
                hide(final)
            os.rename(temporary, final)
            fsync_path(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def hide(path: Path) -> None:
    """Remove a checkpoint: first out of sight, so that a kill halfway leaves no damaged one."""
    shutil.rmtree(_put_out_of_sight(path))


def _put_out_of_sight(path: Path) -> Path:
    hidden = path.with_name(f".{path.name}.tmp-{os.getpid()}-old")
    shutil.rmtree(hidden, ignore_errors=True)  # an earlier process of the same number left it
    os.rename(path, hidden)
    return hidden


def set_aside_beyond(folder: Path, step: int) -> list[Path]:
    """Put the checkpoints of more than `step` updates out of sight; returns where they lie until the next save.

    For a run that goes on from `step`: they are damaged or of another continuation, so neither a later start nor
    retention may count them.
    """
    return [_put_out_of_sight(path) for path in list_checkpoints(folder) if _step_of(path) > step]


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, None where all agree with their checksums."""
    try:
        text = (path / "state.json").read_text(encoding="utf-8")
        if sha256_text(text) != (path / "state.sha256").read_text(encoding="utf-8").strip():
            return "state.json does not agree with its checksum"
        state = json.loads(text)
        if state["format"] != FORMAT:
            return f"state.json has format {state['format']}, this version reads {FORMAT}"
        named = {f"{group}.safetensors" for group in state["groups"] if re.fullmatch(r"[a-z_]+", group)}
        for name, checksum in state["checksums"].items():
            if name not in named:  # and so no path to another place
                return f"state.json names {name!a}, which is no group of tensors"
            if sha256_file(path / name) != checksum:
                return f"{name} does not agree with its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # or JSON of another shape
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def find_undamaged(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, if any; damaged ones beyond it are named in warnings."""
    for path in reversed(list_checkpoints(folder)):
        problem = damage(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is damaged: %s; trying the one before it", path, problem)
    return None


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, None where there is none at all.

    A damaged one is named in a warning and the one before it taken; all damaged is an error, never a start from zero.
    """
    found = find_undamaged(folder)
    if found is None and (damaged := list_checkpoints(folder)):
        raise UserError(
            f"resume: all {len(damaged)} checkpoints in {folder} are damaged, see the warnings above; mend or remove "
            "them, or start afresh in another folder with run_dir=..."
        )
    return found


def find_continuation(folder: Path, resume: str) -> Path | None:
    """Return the newest undamaged checkpoint where it was made by a run that began with the same `resume=PATH`."""
    found = find_undamaged(folder)
    if found is None:
        return None
    made_with = read_json(found / "state.json")["config"]["resume"]
    return found if Path(made_with) == Path(resume) else None


def find_checkpoint_before(folder: Path, step: int) -> Path | None:
    """Return the newest undamaged checkpoint of fewer than `step` updates, and remove those beyond; None without one.

    For a roll-back: were the process killed, the ones beyond would be resumed from.
    """
    beyond = [path for path in list_checkpoints(folder) if _step_of(path) >= step]
    before = [path for path in list_checkpoints(folder) if _step_of(path) < step and damage(path) is None]
    if not before:
        return None
    for path in beyond:
        hide(path)
    return before[-1]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def load_checkpoint(path: Path, check: Callable[[Checkpoint], None] | None = None) -> Checkpoint:
    """Read a checkpoint that `find_checkpoint` returned, or one that the user named.

    check: called with the checkpoint's state and its tensors on the meta device, before any of them is read, so that
    one of another recipe or of other shapes is refused for the price of its headers.
    """
    if not path.is_dir():
        raise UserError(f"resume: {path} is no checkpoint folder; name one like RUN/checkpoints/step_00001200")
    problem = damage(path)
    if problem is not None:
        raise UserError(f"resume: {path} is damaged: {problem}; name another one or set resume=auto")
    state = read_json(path / "state.json")
    files = {Path(name).stem: path / name for name in state["checksums"]}
    shapes = {name: read_header(files[name], "resume").tensors if name in files else {} for name in state["groups"]}
    if check is not None:
        check(Checkpoint(str(path), shapes, state))
    tensors = {name: read_tensors(files[name], "resume") if name in files else {} for name in state["groups"]}
    return Checkpoint(str(path), tensors, state)


def remove_old(folder: Path, keep: int, step: int, best_step: int | None) -> None:
    """Keep the newest checkpoints up to `step`, the one just saved, and the best one; remove those before them.

    Removes also what a kill left half-written and what a resumption put out of sight.
    """
    for path in folder.glob(".step_*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in [path for path in list_checkpoints(folder) if _step_of(path) <= step][:-keep]:
        if _step_of(path) != best_step:
            hide(path)
