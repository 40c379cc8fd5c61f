"""Every task, optimiser and precision on CUDA tensors that do not exist (tests/fake_cuda.py)."""

import pytest

from tests.engine.test_fake_cuda import OPTIMISERS, PRECISIONS, TASKS, check, pytestmark, run_cases  # noqa: F401


@pytest.mark.parametrize("task", TASKS)
def test_every_optimiser_and_every_precision(task):
    """Each pair of them with one task at least."""
    turn = TASKS.index(task)
    pairs = zip(OPTIMISERS, (*PRECISIONS[turn % 3 :], *PRECISIONS[: turn % 3]))
    check(run_cases(*[f"{task}:{optim}:{precision}" for optim, precision in pairs]))
