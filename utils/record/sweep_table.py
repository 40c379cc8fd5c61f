"""The jobs of a sweep, the best first, with mean and spread over seeds.

    python -m utils.record.sweep_table outputs/sweeps/NAME

A job is a run folder. It is read from the run's own files, so the table is the same for jobs that ran in turn, at once
or on a cluster, and can be made while some still run.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from utils.config.sweep import JobResult
from utils.errors import EXIT_OK, UserError
from utils.io.files import ignore_write_errors, read_json, write_json
from utils.record.run_config import OVERRIDES_FILE, is_complete, read_settings, settings_of
from utils.text_table import align_columns
from utils.tool import print_result

RESULT_FILE = "result.json"
_SEED = "seed="


@dataclass(frozen=True)
class SweptRun:
    """A job: its overrides, and the best value of its task's metric; None where there is none yet."""

    overrides: frozenset[str]
    state: str  # complete, not complete, why it failed, or the result of a job without a run folder
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
    """Return the jobs whose run folders are in a sweep's folder."""
    return [_read_job(file.parent) for file in sorted(folder.glob(f"*/{OVERRIDES_FILE}"))]


def _read_job(folder: Path) -> SweptRun:
    overrides, result = read_settings(folder), read_result(folder)
    state = "complete" if is_complete(folder) else "not complete"
    if result is None:
        return SweptRun(overrides, state)
    return SweptRun(overrides, state, result["metric"], result["value"], result["is_lowest_best"])


def with_results(jobs: Iterable[SweptRun], results: Iterable[JobResult]) -> list[SweptRun]:
    """Return jobs with how some have ended: those that failed say why, and those without a run folder are added."""
    runs = {job.overrides: job for job in jobs}
    for result in results:
        overrides = settings_of(result.overrides)
        if result.status != EXIT_OK:
            state = f"failed ({result.status}): {result.text}"
            runs[overrides] = replace(runs.get(overrides, SweptRun(overrides, state)), state=state)
        else:
            runs.setdefault(overrides, SweptRun(overrides, result.text))
    return list(runs.values())


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
    """Return the table: what a group's overrides have of their own, its jobs, mean and spread of the metric.

    Columns that say nothing, such as the spread where no group has two jobs, are left out.
    """
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
    columns = [column for column in zip(*rows) if set(column[1:]) - {"-", "1"}]
    return align_columns(list(zip(*columns)))


def find_table(folder: Path) -> str:
    """Return the table of a sweep's folder. Raises UserError where it holds no job."""
    if not (jobs := read_jobs(folder)):
        raise UserError(f"{folder} holds no job of a sweep; give outputs/sweeps/NAME")
    return sweep_table(jobs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser("python -m utils.record.sweep_table", description="Rank the jobs of a sweep.")
    parser.add_argument("folder", type=Path, help="outputs/sweeps/NAME")
    folder = parser.parse_args(arguments).folder
    return print_result("sweep_table", lambda: find_table(folder))


if __name__ == "__main__":
    sys.exit(main())
