"""A table of a sweep's jobs, the best first, with mean and spread over seeds.

    python -m utils.record.sweep_table outputs/sweeps/NAME

Each job is a run folder, whether it ran here or on a cluster. Jobs may still be running.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from utils.errors import EXIT_OK, EXIT_USER_ERROR
from utils.io.files import Json
from utils.record.figures import align_columns
from utils.record.run_reader import OVERRIDES_FILE, RunReader

_SEED = "seed="


class SweptRun(NamedTuple):
    """A job: its overrides, its state (one of STATES) and `RunReader.result`."""

    overrides: frozenset[str]
    state: str
    result: Json | None = None


def read_jobs(folder: Path) -> list[SweptRun]:
    """Return the jobs in a sweep's folder that have a run folder."""
    runs = [RunReader(file.parent) for file in sorted(folder.glob(f"*/{OVERRIDES_FILE}"))]
    return [SweptRun(run.settings, run.state, run.result) for run in runs]


def sweep_table(jobs: Sequence[SweptRun]) -> str:
    """Return a table of mean and spread of the metric, a row for all jobs that differ only by their seed.

    The best mean comes first, jobs without a value last.
    """
    shared = frozenset.intersection(*(job.overrides for job in jobs))
    groups = {}
    for job in jobs:
        settings = sorted(text for text in job.overrides - shared if not text.startswith(_SEED))
        groups.setdefault(" ".join(settings) or "-", []).append(job)
    metric = next((str(job.result["metric"]) for job in jobs if job.result), "value")
    rows = []
    for settings, group in groups.items():
        results = [job.result for job in group if job.result and job.result["value"] is not None]
        values = [result["value"] for result in results]
        order = math.inf
        average = spread = "-"
        if values:
            order = mean(values) * (1 if results[0]["is_lowest_best"] else -1)
            average = f"{mean(values):.4f}"
        if len(values) > 1:
            spread = f"{min(values):.4f} to {max(values):.4f}"
        states = ", ".join(dict.fromkeys(job.state for job in group))
        rows.append((order, [settings, str(len(group)), average, spread, states]))
    head = ["settings", "runs", metric, "least to greatest", "state"]
    return align_columns([head, *(row for _, row in sorted(rows))])


def main(folder: str) -> int:
    """Print the table of a sweep's folder and return the exit status."""
    if not (jobs := read_jobs(Path(folder))):
        sys.stderr.write(f"sweep_table: {folder} holds no job of a sweep; give outputs/sweeps/NAME\n")
        return EXIT_USER_ERROR
    sys.stdout.write(sweep_table(jobs) + "\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main("".join(sys.argv[1:2])))
