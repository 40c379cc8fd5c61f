"""What SLURM's variables say of a job."""

import os


def restart_count() -> int:
    """Return how often the job was requeued, 0 without SLURM."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
