"""Survival, the long form: killed again and again at random steps, a run ends as an undisturbed one does."""

import random

import pytest

from tests.engine.test_exactness import assert_same_tensors
from tests.support import SCRIPTS, checkpoint_tensors, common, rows, run


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "fcmae"])
def test_fifteen_kills_leave_no_trace(task, collection, tmp_path):
    settings = [
        "loop.total_steps=120", "loop.global_batch_size=8", "loop.batch_size=4", "loop.ema_decay=0.95",
        "loop.checkpoint_every_steps=4", "runtime.workers=2", "model.drop_path_rate=0.2",
    ]  # fmt: skip
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run(SCRIPTS[task], common(task, collection, undisturbed, *settings), tmp_path)
    draw, step = random.Random(0), 0
    for _ in range(15):
        step = min(118, step + draw.randint(3, 10))
        run(SCRIPTS[task], common(task, collection, killed, *settings), tmp_path, expect=-9, kill_at_step=step)
    run(SCRIPTS[task], common(task, collection, killed, *settings), tmp_path)
    assert_same_tensors(checkpoint_tensors(undisturbed, 120), checkpoint_tensors(killed, 120))
    assert rows(undisturbed / "metrics.jsonl") == rows(killed / "metrics.jsonl")
