"""task=diffusion resumes bit for bit on two ranks, which count tags as one."""

import pytest
import torch

from tests.engine.test_diffusion import RESUMED, SHORT, assert_equal_runs, place  # noqa: F401 (a fixture)
from tests.engine.test_tag_balance import OWN, WEIGHTS
from tests.in_process import run
from tests.support import checkpoint_tensors
from tests.support import run as run_process


@pytest.mark.ddp
def test_two_ranks_resume_bit_for_bit(place):  # noqa: F811
    own = [*SHORT, *RESUMED, "data.root=images"]
    run_process("finetune_sdxl.py", [*own, "run_dir=straight_2"], place, ranks=2)
    run_process("finetune_sdxl.py", [*own, "run_dir=killed_2"], place, ranks=2, expect=-9, kill_at_step=4)
    assert "at step 3" in run_process("finetune_sdxl.py", [*own, "run_dir=killed_2"], place, ranks=2)
    assert_equal_runs(place / "straight_2", place / "killed_2", 6)


@pytest.mark.ddp
def test_two_ranks_count_tags_as_one(place):  # noqa: F811
    run("finetune_sdxl", [*OWN, WEIGHTS, "run_dir=one"], place)
    run_process("finetune_sdxl.py", [*OWN, WEIGHTS, "run_dir=ranks"], place, ranks=2)
    one, two = (checkpoint_tensors(place / name, 6) for name in ("one", "ranks"))
    balance = [name for name in one if "tag_balance" in name]
    assert len(balance) == 3 and all(torch.equal(one[name], two[name]) for name in balance)
