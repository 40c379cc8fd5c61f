"""A table of a sweep's jobs, the best first, with mean and spread over seeds.

    python -m utils.record.sweep_table outputs/sweeps/NAME

Each job is a run folder, whether it ran here or on a cluster. Jobs may still be running.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from utils.errors import EXIT_OK, EXIT_USER_ERROR
from utils.record.figures import align_columns
from utils.record.run_reader import OVERRIDES_FILE, RunReader

_SEED = "seed="


@dataclass(frozen=True)
class SweptRun:
    """A job: its overrides, its state (one of STATES, or `failed` with a status) and `RunReader.result`."""

    overrides: frozenset[str]
    state: str
    result: dict[str, Any] | None = None


def read_jobs(folder: Path, failed: Mapping[frozenset[str], int] | None = None) -> list[SweptRun]:
    """Return the jobs in a sweep's folder. failed: exit statuses by overrides, also of jobs without a run folder."""
    states: dict[frozenset[str], str] = {}
    results = {}
    for run in [RunReader(file.parent) for file in sorted(folder.glob(f"*/{OVERRIDES_FILE}"))]:
        settings = run.settings
        states[settings] = run.state
        results[settings] = run.result
    states |= {overrides: f"failed ({status})" for overrides, status in (failed or {}).items()}
    return [SweptRun(overrides, state, results.get(overrides)) for overrides, state in states.items()]


def sweep_table(jobs: Sequence[SweptRun]) -> str:
    """Return a table of mean and spread of the metric, a row for all jobs that differ only by their seed.

    The best mean comes first, jobs without a value last. Columns without information are omitted.
    """
    shared = frozenset.intersection(*(job.overrides for job in jobs))
    results = [job.result for job in jobs if job.result is not None]
    metric = str(results[0]["metric"]) if results else "value"
    sign = 1 if any(result["is_lowest_best"] for result in results) else -1
    groups: dict[str, list[SweptRun]] = {}
    for job in jobs:
        settings = sorted(text for text in job.overrides - shared if not text.startswith(_SEED))
        groups.setdefault(" ".join(settings) or "-", []).append(job)
    ranked = []
    for settings, group in groups.items():
        values = [job.result["value"] for job in group if job.result and job.result["value"] is not None]
        cells = [settings, str(len(group)), "-", "-", ", ".join(dict.fromkeys(job.state for job in group))]
        rank = float("inf")
        if values:
            rank = sign * mean(values)
            cells[2] = f"{mean(values):.4f}"
        if len(values) > 1:
            cells[3] = f"{min(values):.4f} to {max(values):.4f}"
        ranked.append((rank, len(ranked), cells))
    rows = [["settings", "runs", metric, "least to greatest", "state"], *(cells for *_, cells in sorted(ranked))]
    columns = [column for column in zip(*rows) if set(column[1:]) - {"-", "1"}]
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
