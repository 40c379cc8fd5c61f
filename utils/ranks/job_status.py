"""What the variables of a SLURM job or of a sweep say."""

import os

SWEEP_VARIABLE = "ATELIER_SWEEP"  # the name of the sweep that a job is of


def restart_count() -> int:
    """Return how often the job was requeued, 0 without SLURM."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
