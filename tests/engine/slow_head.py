"""A fitted head of two processes is that of one."""

import pytest

from tests.support import common, make_collection, rows, run


@pytest.mark.ddp
def test_one_head_on_any_number_of_ranks(tmp_path):
    data, losses = make_collection(tmp_path / "images", per_class=8), []
    for ranks in (1, 2):
        folder = tmp_path / f"run{ranks}"
        run(
            "finetune.py", common("classification", data, folder, "task.head=fitted", "loop.total_steps=1"), tmp_path,
            ranks=ranks,
        )  # fmt: skip
        losses.append(rows(folder / "metrics.jsonl", "train")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
