"""The run folder: everything about one run, readable without the repository.

outputs/<script>/<model>-<data>-<recipe hash>/
    config.json  overrides.txt  environment.json       what ran, and where
    log.txt  metrics.jsonl  training_log.txt           messages and figures; progress.json, complete.json: its state
    checkpoints/step_00001200/                         what resumes
    weights/{last,best,ema}_weights.safetensors        the weights to use; step_000500.safetensors: kept ones
    plots/  tables/  unreadable.jsonl  samples/        pictures, tables, unreadable images, samples of each step
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from utils.config.command_line import Job
from utils.config.help import ROOT
from utils.config.recipe import recipe_hash
from utils.io.files import (
    AppendFile,
    Json,
    file_lock,
    ignore_write_errors,
    output_errors,
    read_json,
    refuse_links_out,
    remove_temporary,
    write_json,
    write_text,
)
from utils.io.safe_text import hide_secrets, hide_secrets_in
from utils.ranks import distributed
from utils.record.logging import log_copied_to, restart_count
from utils.record.run_reader import (
    COMPLETE_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    LOCK_FILE,
    NOTE_VARIABLE,
    OVERRIDES_FILE,
)

GIT_FILE = "git_state.json"
_REQUEUED_SEC = 120.0  # for the processes of a job's earlier start to end, such as on a lost node
_READER_SEC = 1.0  # for a reader that tests the lock


class RunFolder(NamedTuple):
    """A run's folder and configuration."""

    path: Path
    config: Json
    job: Job

    @property
    def saved_config(self) -> Json:
        """The content of config.json."""
        return {"script": self.job.script, **self.config}


def default_run_dir(config: Json, job: Job) -> Path:
    """Return `run_dir`, or a folder named by the recipe, so that the same command finds its run; it may not exist."""
    model, data = (job.choices.get(group, config[group]["name"]) for group in ("model", "data"))
    if job.script == "train" and config["loop"]["minutes"] and not job.states("model"):
        model = "planned"  # the plan may take any network
    return Path(config["run_dir"] or f"outputs/{job.script}/{model}-{data}-{recipe_hash(config)}")


@cache  # a start needs it at three places
def git_state() -> Json:
    """Return the commit and the changed files of the code; both are None outside a git checkout.

    A copy of the code (submit/slurm.py) has them in a file.
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


def environment_state(**more: Any) -> Json:
    """Return the environment of a run: command, versions, platform, devices."""
    import torch

    state = {"command": hide_secrets_in([Path(sys.argv[0]).name, *sys.argv[1:]])}
    state |= {"python": platform.python_version(), "platform": platform.platform()}
    state |= {name: version(name) for name in ("torch", "torchvision", "numpy", "pillow", "simplejpeg")}
    state["threads"] = torch.get_num_threads()
    state["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**state, "world_size": distributed.world_size(), "git": git_state(), **more}


@contextmanager
def open_run_folder(path: Path, config: Json, job: Job) -> Iterator[RunFolder]:
    """Create or reopen the run folder on rank 0, lock it, and copy the log into it.

    Secrets in the configuration are hidden. Raises UserError if the folder is not writable or another run uses it.
    """
    with ExitStack() as stack:
        distributed.rank_zero_call(lambda: _open(path, stack))
        yield RunFolder(path, hide_secrets_in(config), job)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder, which is created if it is absent. Raises UserError (`run_dir`) if another process uses it."""
    refusal = f"run_dir: another run is writing to {folder}; wait for it or give another run_dir"
    with file_lock(folder / LOCK_FILE, refusal, _REQUEUED_SEC if restart_count() else _READER_SEC):
        yield


def _open(path: Path, stack: ExitStack) -> None:
    refuse_links_out("run_dir", path)
    with output_errors("run_dir", path):
        for name in ("checkpoints", "weights", "plots"):
            (path / name).mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(path))
        remove_temporary([path, path / "weights"])
        if note := os.environ.get(NOTE_VARIABLE):
            write_text(Path(note), str(path.absolute()))
        stack.enter_context(log_copied_to(AppendFile(path / "log.txt")))


def write_config(folder: RunFolder, environment: Json) -> None:
    """Write overrides, configuration and, at the first start, environment. Raises UserError for a full disk."""
    with output_errors("run_dir", folder.path):
        write_text(folder.path / OVERRIDES_FILE, "".join(f"{hide_secrets(text)}\n" for text in folder.job.overrides))
        write_json(folder.path / CONFIG_FILE, folder.saved_config)
        if not (folder.path / ENVIRONMENT_FILE).is_file():
            write_json(folder.path / ENVIRONMENT_FILE, environment)


def mark_complete(path: Path, step: int | None) -> None:
    """Mark a run as complete at `step`, or with None as not complete. Write errors are logged."""
    with ignore_write_errors(path / COMPLETE_FILE):
        if step is None:
            (path / COMPLETE_FILE).unlink(missing_ok=True)
        else:
            write_json(path / COMPLETE_FILE, {"step": step})
