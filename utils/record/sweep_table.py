"""The jobs of a sweep, the best first, with mean and spread over seeds.

    python -m utils.record.sweep_table outputs/sweeps/NAME

A job is a run folder. It is read from the run's own files, so the table is the same for jobs that ran in turn, at once
or on a cluster, and can be made while some still run.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from utils.errors import UserError
from utils.io.files import ignore_write_errors, read_json, write_json
from utils.record.run_config import is_complete
from utils.text_table import align_columns
from utils.tool import print_result

RESULT_FILE = "result.json"
_SEED = "seed="


@dataclass(frozen=True)
class SweptRun:
    """A job: its overrides, and the best value of its task's metric; None where there is none yet."""

    overrides: frozenset[str]
    state: str  # complete, or not complete
    metric: str | None = None
    value: float | None = None
    is_lowest_best: bool = False


def write_result(folder: Path, metric: str, best: Any, *, is_lowest_best: bool) -> None:
    """Write a run's best value (`best.value` at `best.step`) beside its other files; a write error is a warning."""
    with ignore_write_errors(folder / RESULT_FILE):
        values = {"metric": metric, "value": best.value, "step": best.step, "is_lowest_best": is_lowest_best}
        write_json(folder / RESULT_FILE, values)


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return a run's best value as it was written; None where there is none, or it cannot be read."""
    try:
        found = read_json(folder / RESULT_FILE)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"metric", "value", "is_lowest_best"} <= found.keys() else None


def read_jobs(folder: Path) -> list[SweptRun]:
    """Return the jobs whose run folders are in a sweep's folder. Raises UserError where there is none."""
    files = sorted(folder.glob("*/overrides.txt"))
    if not files:
        raise UserError(f"{folder} holds no job of a sweep; give outputs/sweeps/NAME")
    return [_read_job(file.parent) for file in files]


def _read_job(folder: Path) -> SweptRun:
    given = (folder / "overrides.txt").read_text(encoding="utf-8").splitlines()
    overrides = frozenset(text for text in given if not text.startswith(("run_dir=", "sweep.")))
    state = "complete" if is_complete(folder) else "not complete"
    result = read_result(folder)
    if result is None:
        return SweptRun(overrides, state)
    return SweptRun(overrides, state, result["metric"], result["value"], result["is_lowest_best"])


def rank_jobs(jobs: Sequence[SweptRun]) -> list[list[SweptRun]]:
    """Return the jobs in groups that differ by the seed alone, the best mean first, those without a value last."""
    groups: dict[frozenset[str], list[SweptRun]] = {}
    for job in jobs:
        groups.setdefault(frozenset(text for text in job.overrides if not text.startswith(_SEED)), []).append(job)

    def place(group: list[SweptRun]) -> tuple[bool, float]:
        values = _values(group)
        if not values:
            return True, 0.0
        return False, mean(values) if group[0].is_lowest_best else -mean(values)

    return sorted(groups.values(), key=place)


def _values(group: Sequence[SweptRun]) -> list[float]:
    return [job.value for job in group if job.value is not None]


def sweep_table(jobs: Sequence[SweptRun]) -> str:
    """Return the table: what a group's overrides have of their own, its jobs, mean and spread of the metric."""
    shared = frozenset.intersection(*(job.overrides for job in jobs))
    metric = next((job.metric for job in jobs if job.metric is not None), "value")
    rows = [("settings", "runs", metric, "least to greatest", "state")]
    for group in rank_jobs(jobs):
        own = sorted(text for text in group[0].overrides - shared if not text.startswith(_SEED))
        values = _values(group)
        states = ", ".join(dict.fromkeys(job.state for job in group))
        spread = f"{min(values):.4f} to {max(values):.4f}" if len(values) > 1 else "-"
        value = f"{mean(values):.4f}" if values else "-"
        rows.append((" ".join(own) or "-", str(len(group)), value, spread, states))
    return align_columns(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser("python -m utils.record.sweep_table", description="Rank the jobs of a sweep.")
    parser.add_argument("folder", type=Path, help="outputs/sweeps/NAME")
    folder = parser.parse_args(arguments).folder
    return print_result("sweep_table", lambda: sweep_table(read_jobs(folder)))


if __name__ == "__main__":
    sys.exit(main())
