"""Runs below some folders, and what one line says of each, also while they train."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.io.files import links_out
from utils.io.safe_text import escape_controls
from utils.record.curves import Curves, thin
from utils.record.metrics_log import METRICS_FILE
from utils.record.run_reader import CONFIG_FILE, RunReader

_DEEPEST = 6  # folders below a root
_TAIL = 16_384  # bytes at the end of log.txt
_STEP = re.compile(r" INFO step (\d+)/(\d+) .* (\S+) left$", re.MULTILINE)  # as engine/recorder.py writes it
_STOPPED = re.compile(r" WARNING stopped at step ")
_SPARK_POINTS = 60


@dataclass(frozen=True)
class RunState:
    """One run. step and total: of updates; left: time as the log has it; spark: training losses for a small curve."""

    path: Path
    state: str  # running, finished, stopped, or dead
    script: str
    task: str
    model: str
    step: int
    total: int | None
    left: str | None
    metric: str | None
    best: float | None
    changed: float  # seconds since 1970
    spark: tuple[float, ...]


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
            folders[:] = sorted(name for name in folders if name[0] != ".")


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
            except (OSError, UserError):
                continue
        return sorted(states, key=lambda state: -state.changed)

    def _read(self, path: Path) -> RunState:
        run, log = RunReader(path), _read_tail(path / "log.txt")
        config, result = run.config, run.result or {}
        lines = [*_STEP.finditer(log)]
        step, total, left = lines[-1].groups() if lines else (0, None, None)
        curves = self.curves(path)
        steps, losses = curves.series("train", "loss")
        is_stopped = _STOPPED.search(log, lines[-1].end() if lines else 0) is not None
        state = "finished" if run.is_complete else "running" if run.is_alive else "stopped" if is_stopped else "dead"
        value = result.get("value")
        return RunState(
            path=path,
            state=state,
            script=_name(config.get("script")),
            task=_name(config.get("task")),
            model=_name(config.get("model")),
            step=max(int(step), int(steps[-1]) if len(steps) else 0),
            total=None if total is None else int(total),
            left=left if state == "running" else None,
            metric=escape_controls(str(result["metric"])) if result else None,
            best=float(value) if isinstance(value, int | float) else None,
            changed=max(file.stat().st_mtime for file in (path / CONFIG_FILE, path / "log.txt") if file.exists()),
            spark=_spark(steps, losses),
        )


def _read_tail(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return file.read().decode("utf-8", errors="replace")


def _name(part: Any) -> str:
    return escape_controls(str(part.get("name", "") if isinstance(part, dict) else part or ""))


def _spark(steps: np.ndarray, losses: np.ndarray) -> tuple[float, ...]:
    values = thin(steps, losses, _SPARK_POINTS)[1]
    return tuple(values[np.isfinite(values)].tolist())
