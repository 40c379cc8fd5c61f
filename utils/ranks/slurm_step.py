"""What SLURM's variables say of the step that this process belongs to."""

import os
from collections.abc import Mapping

_FIRST, _COUNT = 10_000, 20_000  # below 32768, where Linux begins to give ports to any program that asks


def slurm_port(environment: Mapping[str, str]) -> int:
    """Return a port for the ranks to meet: the same on all tasks of a step, another one for the next step or job."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _FIRST + (job + 1009 * step) % _COUNT


def restart_count() -> int:
    """Return how often the job was requeued, 0 without SLURM."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
