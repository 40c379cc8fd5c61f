"""Names of checkpoints over a long run."""

import torch

from engine.checkpoint import find_checkpoint, read_state, save_checkpoint
from tests.engine.test_checkpoint import steps_in

STEPS = [1, 10, 99_999, 100_000, 123_456_789]


def test_checkpoints_of_a_long_run_are_found_in_the_order_of_their_steps(tmp_path):
    for step in reversed(STEPS):
        save_checkpoint(tmp_path, step, {"weights": {"w": torch.full((1,), float(step))}}, {}, {})
    assert steps_in(tmp_path) == STEPS
    assert read_state(find_checkpoint(tmp_path))["step"] == STEPS[-1]
