"""A table of a sweep's jobs, the best first, with mean and spread over seeds.

    python -m utils.record.sweep_table outputs/sweeps/NAME

Each job is a run folder, whether it ran here or on a cluster. Jobs may still be running.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from utils.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR
from utils.record.run_reader import OVERRIDES_FILE, RunReader, settings_of
from utils.text_table import align_columns

_SEED = "seed="
_RESULT = ("metric", "value", "is_lowest_best")


@dataclass(frozen=True)
class SweptRun:
    """A job: its overrides and the best value of its task's metric, or None before the first evaluation."""

    overrides: frozenset[str]
    state: str  # complete, running, not complete, or failed
    metric: str | None = None
    value: float | None = None
    is_lowest_best: bool = False


def read_jobs(folder: Path) -> list[SweptRun]:
    """Return the jobs in a sweep's folder."""
    jobs = []
    for run in [RunReader(file.parent) for file in sorted(folder.glob(f"*/{OVERRIDES_FILE}"))]:
        state = "complete" if run.is_complete else "running" if run.is_alive else "not complete"
        result = {name: value for name, value in (run.result or {}).items() if name in _RESULT}
        jobs.append(SweptRun(run.settings, state, **result))
    return jobs


def with_failures(jobs: Iterable[SweptRun], statuses: Iterable[tuple[Iterable[str], int]]) -> list[SweptRun]:
    """Return the jobs, including failed ones without a run folder. statuses: (overrides, exit status) pairs."""
    runs = {job.overrides: job for job in jobs}
    for words, status in statuses:
        overrides = settings_of(words)
        if status not in (EXIT_OK, EXIT_STOPPED):
            runs[overrides] = replace(runs.get(overrides, SweptRun(overrides, "")), state=f"failed ({status})")
    return list(runs.values())


def sweep_table(jobs: Sequence[SweptRun]) -> str:
    """Return a table of mean and spread of the metric, a row for all jobs that differ only by their seed.

    The best mean comes first, jobs without a value last. Columns without information are omitted.
    """
    shared = frozenset.intersection(*(job.overrides for job in jobs))
    metric = next((job.metric for job in jobs if job.metric is not None), "value")
    sign = 1 if any(job.is_lowest_best for job in jobs) else -1
    groups: dict[str, list[SweptRun]] = {}
    for job in jobs:
        settings = sorted(text for text in job.overrides - shared if not text.startswith(_SEED))
        groups.setdefault(" ".join(settings) or "-", []).append(job)
    rows = []
    for settings, group in groups.items():
        values = [job.value for job in group if job.value is not None]
        states = ", ".join(dict.fromkeys(job.state for job in group))
        spread = f"{min(values):.4f} to {max(values):.4f}" if len(values) > 1 else "-"
        value = f"{mean(values):.4f}" if values else "-"
        rank = sign * mean(values) if values else float("inf")
        rows.append((rank, (settings, str(len(group)), value, spread, states)))
    ranked = [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    table = [("settings", "runs", metric, "least to greatest", "state"), *ranked]
    columns = [column for column in zip(*table) if set(column[1:]) - {"-", "1"}]
    return align_columns(list(zip(*columns)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser("python -m utils.record.sweep_table", description="Rank the jobs of a sweep.")
    parser.add_argument("folder", type=Path, help="outputs/sweeps/NAME")
    folder = parser.parse_args(arguments).folder
    if not (jobs := read_jobs(folder)):
        sys.stderr.write(f"sweep_table: {folder} holds no job of a sweep; give outputs/sweeps/NAME\n")
        return EXIT_USER_ERROR
    sys.stdout.write(sweep_table(jobs) + "\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
