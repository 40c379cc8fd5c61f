"""Runs below some folders, and what one line says of each, also while they train."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.io.files import links_out
from utils.io.safe_text import escape_controls
from utils.record.curves import Curves, thin
from utils.record.metrics_log import METRICS_FILE
from utils.record.run_reader import CONFIG_FILE, PROGRESS_FILE, RunReader
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
    """The runs below some folders. Figures are read on from where the last call ended."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = [root.resolve() for root in roots]
        self._curves = dict[Path, Curves]()

    def curves(self, path: Path) -> Curves:
        """Return the figures of a run, read to their end."""
        curves = self._curves.setdefault(path, Curves(path / METRICS_FILE))
        curves.read()
        return curves

    def states(self) -> list[RunState]:
        """Return all runs, those that changed last first; without those that are deleted meanwhile."""
        states = []
        for path in find_runs(self.roots):
            try:
                states.append(self.read(path))
            except (OSError, OverflowError, ValueError):
                continue
        return sorted(states, key=lambda state: -state.changed)

    def read(self, path: Path) -> RunState:
        """Return what one line says of a run. Raises OSError, OverflowError, ValueError for odd or deleted files."""
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


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and abs(value) < _MOST else None


def _name(part: Any) -> str:
    return escape_controls(str(part.get("name", "") if isinstance(part, dict) else part or ""))
