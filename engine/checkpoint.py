"""Checkpoints that are whole or absent, and that resume on any number of ranks.

    checkpoints/
        step_00001200/
            weights.safetensors          the exported networks, a complete weight file
            task.safetensors             the rest of the task's state by name
            average_weights.safetensors  averages of the exported networks; averages.safetensors: of other networks
            optimizer.safetensors        `<parameter name>/<state name>`
            scale.safetensors            the loss scale
            state.json                   step, config, fingerprints, best metric, meters, checksums of the files above
            state.sha256                 checksum of state.json
        .step_00001300.tmp-<pid>/        being written, or moved aside; removed by a later save

Rank 0 writes each under a temporary name, flushes it and renames it. Nothing is pickled. There is no random state to
save: all randomness is a function of (seed, step, position) (utils/rng.py).
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
from utils.io.weights import read_header, read_tensors, refuse_not_finite, write_tensors
from utils.record.logging import get_logger

log = get_logger(__name__)

FORMAT = 2
_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's content: its path, tensors by group and name, and the JSON state."""

    path: str
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates done when it was made."""
        return self.state["step"]


@contextmanager
def write_errors(folder: Path, what: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
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


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    metadata: Mapping[str, Mapping[str, str]] | None = None,
) -> Path:
    """Write `folder/step_XXXXXXXX` and return it; called on rank 0. `metadata`: of some groups' files.

    Raises UserError (`run_dir`) with the bytes needed where the disk refuses it; older checkpoints remain.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp-{os.getpid()}"
    if temporary.exists():
        shutil.rmtree(temporary)
    with write_errors(folder, f"the checkpoint of step {step}", tensors):
        try:
            temporary.mkdir(parents=True)
            checksums = {}
            for name, group in tensors.items():
                if not group:  # plain SGD has no state, and safetensors cannot read a file without tensors
                    continue
                file = temporary / f"{name}.safetensors"
                write_tensors(file, group, (metadata or {}).get(name))
                checksums[file.name] = sha256_file(file)
            content = {"format": FORMAT, "step": step, **state, "groups": list(tensors), "checksums": checksums}
            text = json.dumps(content, indent=1)
            for name, content in (("state.json", text), ("state.sha256", sha256_text(text) + "\n")):
                (temporary / name).write_text(content, encoding="utf-8")
                fsync_path(temporary / name)
            fsync_path(temporary)
            if final.exists():  # made by the run before a kill; the same step has the same content
                remove_checkpoint(final)
            os.rename(temporary, final)
            fsync_path(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint: rename it first, so that a kill halfway leaves no damaged one."""
    shutil.rmtree(_move_aside(path))


def _move_aside(path: Path) -> Path:
    hidden = path.with_name(f".{path.name}.tmp-{os.getpid()}-old")
    shutil.rmtree(hidden, ignore_errors=True)  # from an earlier process with the same number
    os.rename(path, hidden)
    return hidden


def move_aside_beyond(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of more than `step` updates so that nothing finds them; returns their new paths.

    For a run that continues from `step`: they are damaged or belong to another continuation, so neither a later start
    nor retention may count them. The next save removes them.
    """
    return [_move_aside(path) for path in list_checkpoints(folder) if _step_of(path) > step]


def find_damage(path: Path) -> str | None:
    """Return the first error in a checkpoint's files, None where all agree with their checksums."""
    for file in path.iterdir():
        if not file.is_file():  # reading a FIFO would wait for ever
            return f"{file.name} is not a regular file"
    try:
        text = (path / "state.json").read_text(encoding="utf-8")
        if sha256_text(text) != (path / "state.sha256").read_text(encoding="utf-8").strip():
            return "state.json does not match its checksum"
        state = json.loads(text)
        if state["format"] != FORMAT:
            return f"state.json has format {state['format']}, this version reads {FORMAT}"
        named = {f"{group}.safetensors" for group in state["groups"] if re.fullmatch(r"[a-z_]+", group)}
        for name, checksum in state["checksums"].items():
            if name not in named:  # this also refuses a path to another folder
                return f"state.json names {name!a}, which is not a group of tensors"
            if sha256_file(path / name) != checksum:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # of any shape
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def find_undamaged(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, if any; a warning names each damaged one beyond it."""
    for path in reversed(list_checkpoints(folder)):
        problem = find_damage(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is damaged: %s; trying the one before it", path, problem)
    return None


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, None where there is none at all.

    Raises UserError where all checkpoints are damaged: the run never starts again unasked.
    """
    found = find_undamaged(folder)
    if found is None and (damaged := list_checkpoints(folder)):
        raise UserError(
            f"resume: all {len(damaged)} checkpoints in {folder} are damaged, see the warnings above; restore or "
            "remove them (a checkpoint that resume names is then used), or start in another folder with run_dir=..."
        )
    return found


def find_continuation(folder: Path, resume: str) -> Path | None:
    """Return the newest undamaged checkpoint if it was made by a run that began with the same `resume=PATH`.

    Raises UserError where all checkpoints are damaged.
    """
    found = find_checkpoint(folder)
    if found is None:
        return None
    made_with = read_json(found / "state.json")["config"]["resume"]
    return found if Path(made_with) == Path(resume) else None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def describe_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint that `find_checkpoint` returned, or one that the user named, with tensors on the meta device.

    Raises UserError (`resume`) where it is none, or is damaged.
    """
    if not path.is_dir():
        raise UserError(f"resume: {path} is not a checkpoint folder; name one like RUN/checkpoints/step_00001200")
    problem = find_damage(path)
    if problem is not None:
        raise UserError(f"resume: {path} is damaged: {problem}; name another one or set resume=auto")
    state = read_json(path / "state.json")
    shapes = {name: read_header(file, "resume").tensors if file else {} for name, file in _files(path, state).items()}
    return Checkpoint(str(path), shapes, state)


def load_checkpoint(path: Path, check: Callable[[Checkpoint], None] | None = None) -> Checkpoint:
    """Read a checkpoint.

    check: called with what `describe_checkpoint` returns before any tensor is read, so that a checkpoint of another
    recipe or of other shapes is refused at the cost of its headers.
    """
    described = describe_checkpoint(path)
    if check is not None:
        check(described)
    files = _files(path, described.state)
    tensors = {name: read_tensors(file, "resume") if file else {} for name, file in files.items()}
    for name, group in tensors.items():
        refuse_not_finite(group, path / f"{name}.safetensors", "resume")
    return Checkpoint(str(path), tensors, described.state)


def _files(path: Path, state: Mapping[str, Any]) -> dict[str, Path | None]:
    """Return the file of each group; None for a group without tensors."""
    names = {group: f"{group}.safetensors" for group in state["groups"]}
    return {group: path / name if name in state["checksums"] else None for group, name in names.items()}


def remove_old(folder: Path, keep: int, step: int, best_step: int | None) -> None:
    """Keep the newest `keep` checkpoints up to `step`, the one just saved, and the best one; remove those before them.

    Also removes half-written folders of killed runs and checkpoints that a resumed run has moved aside.
    """
    for path in folder.glob(".step_*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in [path for path in list_checkpoints(folder) if _step_of(path) <= step][:-keep]:
        if _step_of(path) != best_step:
            remove_checkpoint(path)
