"""Runs below some folders, and what one line says of each, also while they train."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from utils.io.files import is_locked, links_out
from utils.io.safe_text import escape_controls
from utils.record.curves import Curves, thin
from utils.record.metrics_log import METRICS_FILE
from utils.record.run_reader import CONFIG_FILE, LOCK_FILE, PROGRESS_FILE, RunReader
from utils.record.sweep_table import SweptRun

_DEEPEST = 6  # folders below a root
_JOB = re.compile(r"[\w.,+-]+=[\w.,=+-]*")  # the folder of a sweep's job, as utils/config/sweep.py names it
_SPARK_POINTS = 60
_MOST = 2**53  # of a number in progress.json: a damaged file may have any


class RunState(NamedTuple):
    """One run. step and total: of updates; spark: training losses for a small curve; job: if it belongs to a sweep."""

    path: Path
    state: str  # one of STATES
    task: str
    model: str
    step: int
    total: int | None
    left_sec: float | None
    changed: float  # seconds since 1970
    spark: tuple[float, ...]
    metric: str | None = None
    best: float | None = None
    job: SweptRun | None = None


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a file lies in a folder, also where links lead."""
    return path.resolve().is_relative_to(folder)


def is_own_run(path: Path) -> bool:
    """Return whether a folder is a run whose files lie in it: a link to another file would show that file."""
    return (path / CONFIG_FILE).is_file() and not any(links_out(path))


def find_runs(roots: Sequence[Path]) -> Iterator[Path]:
    """Yield the run folders below some folders; links are not followed."""
    for root in roots:
        for folder, folders, files in os.walk(root):
            path = Path(folder)
            if CONFIG_FILE in files and "weights" in folders:
                folders.clear()
                if is_own_run(path):
                    yield path
            elif len(path.relative_to(root).parts) >= _DEEPEST:
                folders.clear()
            # Names that are not UTF-8 fit into no page and no address.
            folders[:] = sorted(name for name in folders if name[0] != "." and not re.search("[\ud800-\udfff]", name))


class RunIndex:
    """The runs below some folders. Figures are read on from where the last call ended. Threads may share it.

    total: the runs when they are read for the first time.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = [root.resolve() for root in roots]
        self.total = 0
        self._lock = Lock()
        self._curves = dict[Path, Curves]()
        self._known = dict[Path, tuple[list, RunState]]()

    def curves(self, path: Path) -> Curves:
        """Return the figures of a run, read to their end."""
        curves = self._curves.setdefault(path, Curves(path / METRICS_FILE))
        curves.read()
        return curves

    def states(self) -> list[RunState]:
        """Return all runs, those that changed last first; without odd runs, and those that are deleted meanwhile."""
        states = []
        with self._lock:
            paths = [*find_runs(self.roots)]
            self.total = self.total or len(paths)
            for path in paths:
                with suppress(OSError, OverflowError, ValueError):
                    states.append(self.read(path))
        return _newest_first(states)

    def known(self) -> list[RunState]:
        """Return the runs that are read so far; the run that changed last is the first."""
        return _newest_first([state for _, state in [*self._known.values()]])

    def read(self, path: Path) -> RunState:
        """Return what one line says of a run; it is read again if a file of the run or the process has changed.

        Raises OSError, OverflowError, ValueError for odd or deleted files.
        """
        with os.scandir(path) as entries:
            status = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        files = sorted((name, file.st_mtime_ns, file.st_size) for name, file in status)
        stamp = [is_locked(path / LOCK_FILE), *files]
        known = self._known.get(path, ([], None))
        if known[0] != stamp:
            known = self._known[path] = stamp, self._read(path)
        return known[1]

    def _read(self, path: Path) -> RunState:
        run = RunReader(path)
        config = run.config
        state = run.state
        result = run.result
        said = run.progress
        step, total, left_sec = (_number(said.get(name)) for name in ("step", "total_steps", "left_sec"))
        steps, losses = self.curves(path).series("train", "loss")
        files = (path / name for name in (PROGRESS_FILE, CONFIG_FILE, "log.txt"))
        changed = max(file.stat().st_mtime if file.exists() else 0.0 for file in files)
        names = {key: _name(config.get(key)) for key in ("task", "model")}
        if (named := result or said).get("metric"):  # the result is written at the end
            names["metric"] = escape_controls(str(named["metric"]))
            names["best"] = _number(said.get("best", named.get("value")))
        job = SweptRun(run.settings, state, result) if _JOB.fullmatch(path.name) else None
        last = int(max([step or 0, *steps[-1:]]))
        times = {"changed": changed, "left_sec": left_sec if state == "running" else None}
        _, spark = thin(steps, losses, _SPARK_POINTS)
        spark = tuple(spark[np.isfinite(spark)].tolist())
        return RunState(path, state, step=last, total=total and int(total), spark=spark, job=job, **names, **times)


def _newest_first(states: Sequence[RunState]) -> list[RunState]:
    return sorted(states, key=lambda state: -state.changed)


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and abs(value) < _MOST else None


def _name(part: Any) -> str:
    return escape_controls(str(part.get("name", "") if isinstance(part, dict) else part or ""))
