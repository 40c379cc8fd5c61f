"""Runs below some folders, and what one line says of each, also while they train."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class RunState:
    """One run. step and total: of updates; spark: training losses for a small curve; job: if it belongs to a sweep."""

    path: Path
    state: str  # one of STATES
    script: str
    task: str
    model: str
    step: int
    total: int | None
    left_sec: float | None
    metric: str | None
    best: float | None
    changed: float  # seconds since 1970
    told: float  # when it has written its progress
    spark: tuple[float, ...]
    job: SweptRun | None


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a file lies in a folder, also where links lead."""
    return path.resolve().is_relative_to(folder)


def is_run(path: Path) -> bool:
    """Return whether a folder is a run whose files lie in it: a link to another file would show that file."""
    return (path / CONFIG_FILE).is_file() and not any(links_out(path))


def find_runs(roots: Sequence[Path]) -> Iterator[Path]:
    """Yield the run folders below some folders; links are not followed."""
    for root in roots:
        for folder, folders, files in os.walk(root):
            path = Path(folder)
            if CONFIG_FILE in files and "weights" in folders:
                folders.clear()
                if is_run(path):
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
                states.append(self._read(path))
            except (OSError, OverflowError, ValueError):
                continue
        return sorted(states, key=lambda state: -state.changed)

    def _read(self, path: Path) -> RunState:
        run = RunReader(path)
        config, said, result, state = run.config, run.progress, run.result or {}, run.state
        step, total, left = (_number(said.get(name)) for name in ("step", "total_steps", "left_sec"))
        steps, losses = self.curves(path).series("train", "loss")
        times = [_changed(path / name) for name in (PROGRESS_FILE, CONFIG_FILE, "log.txt")]
        return RunState(
            path=path,
            state=state,
            script=_name(config.get("script")),
            task=_name(config.get("task")),
            model=_name(config.get("model")),
            step=max(int(step or 0), int(steps[-1]) if len(steps) else 0),
            total=None if total is None else int(total),
            left_sec=left if state == "running" else None,
            metric=escape_controls(str(result["metric"])) if result else None,
            best=None if result.get("value") is None else float(result["value"]),
            changed=max(times),
            told=times[0] or max(times),
            spark=_spark(steps, losses),
            job=SweptRun(run.settings, state, run.result) if _JOB.fullmatch(path.name) else None,
        )


def _changed(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and abs(value) < _MOST else None


def _name(part: Any) -> str:
    return escape_controls(str(part.get("name", "") if isinstance(part, dict) else part or ""))


def _spark(steps: np.ndarray, losses: np.ndarray) -> tuple[float, ...]:
    values = thin(steps, losses, _SPARK_POINTS)[1]
    return tuple(values[np.isfinite(values)].tolist())
