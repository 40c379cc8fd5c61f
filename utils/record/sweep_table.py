"""A table of a sweep's jobs, the best first, with mean and spread over seeds.

    python -m utils.record.sweep_table outputs/sweeps/NAME

Each job is a run folder, whether it ran here or on a cluster. Jobs may still be running.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from utils.errors import EXIT_OK, EXIT_USER_ERROR
from utils.record.figures import align_columns
from utils.record.run_reader import OVERRIDES_FILE, RunReader

_SEED = "seed="


@dataclass(frozen=True)
class SweptRun:
    """A job: its overrides, its state (of STATES, or `failed` with a status), `RunReader.result` and its folder."""

    overrides: frozenset[str]
    state: str
    result: dict[str, Any] | None = None
    path: Path | None = None

    @property
    def value(self) -> float | None:
        """Its best value."""
        return self.result and self.result["value"]


@dataclass(frozen=True)
class Ranked:
    """All jobs that differ only by their seed. settings: the overrides that are not common to the whole sweep."""

    settings: str
    jobs: list[SweptRun]

    @property
    def values(self) -> list[float]:
        """The best values of the jobs that have one."""
        return [job.value for job in self.jobs if job.value is not None]


def is_job(path: Path) -> bool:
    """Return whether a run is a job of a sweep: its folder has the name of its values, such as `lr=0.001,seed=0`."""
    return "=" in path.name


def read_jobs(folder: Path, failed: Mapping[frozenset[str], int] | None = None) -> list[SweptRun]:
    """Return the jobs in a sweep's folder. failed: exit statuses by overrides, also of jobs without a run folder."""
    runs = [RunReader(file.parent) for file in sorted(folder.glob(f"*/{OVERRIDES_FILE}"))]
    jobs = {run.settings: SweptRun(run.settings, run.state, run.result, run.path) for run in runs}
    for overrides, status in (failed or {}).items():
        jobs[overrides] = replace(jobs.get(overrides, SweptRun(overrides, "")), state=f"failed ({status})")
    return list(jobs.values())


def rank_jobs(jobs: Sequence[SweptRun]) -> list[Ranked]:
    """Return the jobs of a sweep, at least one, with the best mean first and those without a value last."""
    shared = frozenset.intersection(*(job.overrides for job in jobs))
    sign = 1 if any(job.result["is_lowest_best"] for job in jobs if job.result) else -1
    groups: dict[str, list[SweptRun]] = {}
    for job in jobs:
        settings = sorted(text for text in job.overrides - shared if not text.startswith(_SEED))
        groups.setdefault(" ".join(settings) or "-", []).append(job)
    ranked = [Ranked(settings, group) for settings, group in groups.items()]
    return sorted(ranked, key=lambda group: sign * mean(group.values) if group.values else math.inf)


def metric_of(jobs: Sequence[SweptRun]) -> str:
    """Return the name of the value by which jobs are ranked."""
    return next((str(job.result["metric"]) for job in jobs if job.result), "value")


def sweep_table(jobs: Sequence[SweptRun]) -> str:
    """Return a table of mean and spread of the metric, a row for all jobs that differ only by their seed.

    Columns without information are omitted.
    """
    table = [("settings", "runs", metric_of(jobs), "least to greatest", "state")]
    for group in rank_jobs(jobs):
        values = group.values
        spread = f"{min(values):.4f} to {max(values):.4f}" if len(values) > 1 else "-"
        value = f"{mean(values):.4f}" if values else "-"
        states = ", ".join(dict.fromkeys(job.state for job in group.jobs))
        table.append((group.settings, str(len(group.jobs)), value, spread, states))
    columns = [column for column in zip(*table) if set(column[1:]) - {"-", "1"}]
    return align_columns(list(zip(*columns)))


def main(folder: str) -> int:
    """Print the table of a sweep's folder and return the exit status."""
    if not (jobs := read_jobs(Path(folder))):
        sys.stderr.write(f"sweep_table: {folder} holds no job of a sweep; give outputs/sweeps/NAME\n")
        return EXIT_USER_ERROR
    sys.stdout.write(sweep_table(jobs) + "\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main("".join(sys.argv[1:2])))
