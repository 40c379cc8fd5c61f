"""The run folder: everything about one run, explaining itself without the repository.

outputs/<script>/<model>-<data>-<recipe hash>/
    config.json  overrides.txt  environment.json       what ran, and where
    log.txt  metrics.jsonl  training_log.txt           messages and figures
    checkpoints/step_00001200/                         what resumes
    weights/{last,best,ema}_weights.safetensors               the weights to use
    plots/  tables/  unreadable.jsonl  samples/        pictures, tables, unreadable images, audits
"""

import fcntl
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from utils.config.entry_point import ROOT, Job
from utils.config.recipe import recipe_hash
from utils.config.sweep import SWEEP_VARIABLE
from utils.errors import UserError
from utils.io.files import read_json, set_aside, write_json, write_text
from utils.io.safe_text import hide_secrets, hide_secrets_in
from utils.ranks import distributed
from utils.ranks.slurm_step import restart_count
from utils.record.logging import get_logger, log_to_file, stop_logging_to
from utils.record.run_config import CONFIG_FILE, OVERRIDES_FILE, read_run_config

log = get_logger(__name__)

GIT_FILE = "git_state.json"
# What a run reads or appends to, and where it writes.
_RECORDS = (
    CONFIG_FILE, "overrides.txt", "environment.json", "log.txt", "metrics.jsonl", "training_log.txt",
    "unreadable.jsonl", "skipped_steps.jsonl", "lr_finder.json", "result.json", "complete.json", "wandb_run_id.txt",
)  # fmt: skip
_FOLDERS = ("checkpoints", "weights", "plots", "tables", "samples")
_REQUEUED_SEC = 120.0  # for the processes of a job's start before to end


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and the configuration that it was opened with."""

    path: Path
    config: dict[str, Any]
    job: Job

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """The folder of weight files."""
        return self.path / "weights"

    @property
    def plots(self) -> Path:
        """The folder of pictures."""
        return self.path / "plots"


def sweep_of(folder: Path, job: Job) -> str | None:
    """Return the name of the sweep that a run belongs to: of a --multirun, or of a job that one has started."""
    return folder.parent.name if job.sweep_name is not None else os.environ.get(SWEEP_VARIABLE)


def default_run_dir(config: dict[str, Any], job: Job) -> str:
    """Return the folder of a recipe: the same command finds its run, and another recipe gets another folder."""
    if job.sweep_name is not None:
        base = config["run_dir"] or f"outputs/sweeps/{config['sweep']['name']}"
        return f"{base}/{job.sweep_name}"
    if config["run_dir"] is not None:
        return config["run_dir"]
    model, data = (job.choices.get(group, config[group]["name"]) for group in ("model", "data"))
    return f"outputs/{job.script}/{model}-{data}-{recipe_hash(config)}"


def git_state() -> dict[str, Any]:
    """Return the commit of the code and whether files were changed; nulls outside a git checkout.

    A copy of the code (submit/snapshot.py) has them in a file.
    """
    if (ROOT / GIT_FILE).exists():
        return read_json(ROOT / GIT_FILE)

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": ask("rev-parse", "HEAD"), "changed_files": None if status is None else status.splitlines()}


def environment_state(**more: Any) -> dict[str, Any]:
    """Return the environment behind a run's figures: versions, platform, command."""
    import numpy
    import PIL
    import torch
    import torchvision

    return {
        "command": hide_secrets_in([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "simplejpeg": version("simplejpeg") if find_spec("simplejpeg") else None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "world_size": distributed.world_size(),
        "git": git_state(),
        **more,
    }


_locks: set[Any] = set()


def _forget_locks() -> None:
    """Close the locks in a forked process: a loader's worker may outlive a killed rank."""
    while _locks:
        _locks.pop().close()


os.register_at_fork(after_in_child=_forget_locks)


def _lock(path: Path) -> Any:
    """Lock the run folder for this run; the kernel releases it when the process ends."""
    stream = open(path / ".lock", "a+")  # noqa: SIM115 (held until the run ends)
    # Processes of a requeued job may outlive its first start, such as on a node that the scheduler has lost.
    until = time.monotonic() + (_REQUEUED_SEC if restart_count() else 0.0)
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(1.0)
                continue
            stream.close()
            raise UserError(f"run_dir: another run is writing to {path}; wait for it or give another run_dir") from None
        except OSError as error:  # such as Lustre mounted without flock
            log.warning(
                "run_dir: %s cannot be locked (%s): two runs in it would not notice each other", path, error.strerror
            )
        _locks.add(stream)
        return stream


def _set_aside_damaged(path: Path) -> None:
    """Set aside what is in the place of a record or folder of the run and is none, or cannot be read."""
    for name in _RECORDS:
        file = path / name
        if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
            set_aside(file, "is not a regular file")
    for name in _FOLDERS:
        folder = path / name
        if os.path.lexists(folder) and not folder.is_dir():
            set_aside(folder, "is not a folder")
    if (path / CONFIG_FILE).exists():
        try:
            read_run_config(path)
        except UserError:
            set_aside(path / CONFIG_FILE, "is damaged")
    place, checkpoints = os.path.realpath(path), os.path.realpath(path / "checkpoints")
    if os.path.dirname(checkpoints) != place:
        raise UserError(
            f"run_dir: {path / 'checkpoints'} is a link out of the run folder, to {checkpoints}, where saving could "
            "remove what belongs to others; move that folder into its place, or give another run_dir"
        )


def _open(path: Path, config: dict[str, Any], job: Job, environment: dict[str, Any]) -> Any:
    try:
        if path.is_dir():
            _set_aside_damaged(path)
        for folder in (path, path / "checkpoints", path / "weights", path / "plots"):
            folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        for name, value in ((CONFIG_FILE, {"script": job.script, **config}), ("environment.json", environment)):
            if not (path / name).exists():
                write_json(path / name, value)
        if not (path / OVERRIDES_FILE).exists():
            _write_overrides(path, job)
    except OSError as error:
        raise UserError(f"run_dir: {path} cannot be written ({error.strerror}); give another run_dir") from None
    return lock


def _write_overrides(path: Path, job: Job) -> None:
    write_text(path / OVERRIDES_FILE, "".join(f"{hide_secrets(text)}\n" for text in job.overrides))


@contextmanager
def open_run_folder(config: dict[str, Any], job: Job, environment: dict[str, Any]) -> Iterator[RunFolder]:
    """Make or find the folder on rank 0, lock it, and copy the log into it while it is open.

    Secrets in the configuration, the command and the environment are hidden. Raises UserError where
    it cannot be written or another run holds it.
    """
    path = Path(default_run_dir(config, job))
    config = hide_secrets_in(config)
    held: list[Any] = []

    def open_on_main() -> str:
        held.append(_open(path, config, job, environment))
        return str(path)

    path = Path(distributed.rank_zero_call(open_on_main))
    handler = log_to_file(path / "log.txt") if distributed.is_main() else None
    try:
        log.debug("run folder: %s", path)
        yield RunFolder(path, config, job)
    finally:
        if handler is not None:
            stop_logging_to(handler)
        for lock in held:
            _locks.discard(lock)
            lock.close()


def update_saved_config(path: Path, config: dict[str, Any], job: Job) -> None:
    """Replace the saved configuration and overrides by those of the resumption; the old configuration stays beside it.

    config.json is there at every moment. Raises UserError where the disk refuses it.
    """
    saved, now = path / CONFIG_FILE, {"script": job.script, **config}
    before = read_run_config(path)
    try:
        _write_overrides(path, job)
        if before == now:
            return
        write_json(path / "config.before_resume.json", before)
        write_json(saved, now)
    except OSError as error:
        raise UserError(
            f"run_dir: {saved} cannot be written ({error.strerror}); make room, and give the same command"
        ) from None
