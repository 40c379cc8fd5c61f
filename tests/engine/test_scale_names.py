"""Names at the size of a cluster: checkpoints over a long run, and the files of 1,024 ranks, in one process."""

import torch

from engine.checkpoint import find_checkpoint, read_state, save_checkpoint
from tests.engine.test_checkpoint import steps_in
from utils.ranks import distributed
from utils.record.logging import place_of
from utils.record.sample_log import SampleLog

RANKS = 1024
STEPS = [1, 10, 99_999, 100_000, 123_456_789]


def test_checkpoints_of_a_long_run_are_found_in_the_order_of_their_steps(tmp_path):
    for step in reversed(STEPS):
        save_checkpoint(tmp_path, step, {"weights": {"w": torch.full((1,), float(step))}}, {}, {})
    assert steps_in(tmp_path) == STEPS
    assert read_state(find_checkpoint(tmp_path))["step"] == 123_456_789


def test_every_rank_has_a_file_and_a_mark_of_its_own_and_one_of_them_is_main(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", str(RANKS))
    writers, marks = [], []
    for rank in range(RANKS):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        SampleLog(tmp_path, 0).close()
        marks.append(place_of(rank))
        writers += [rank] if distributed.is_main() else []
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"rank_{rank:05d}.jsonl" for rank in range(RANKS)]
    assert len(set(marks)) == RANKS and writers == [0]
