"""task=diffusion resumes bit for bit on two ranks, which count tags as one."""

import torch

from tests.engine.test_diffusion import RESUMED, SHORT, assert_equal_runs, place  # noqa: F401 (a fixture)
from tests.engine.test_tag_balance import OWN, WEIGHTS
from tests.in_process import run, run_until_killed
from tests.support import checkpoint_tensors, rows
from tests.support import run as run_process


def test_two_ranks_resume_bit_for_bit(place):  # noqa: F811
    own = [*SHORT, *RESUMED, "data.root=images"]
    run_process("finetune_sdxl.py", [*own, "run_dir=straight_2"], place, ranks=2)
    run_process("finetune_sdxl.py", [*own, "run_dir=killed_2"], place, ranks=2, expect=-9, kill_at_step=4)
    assert "at step 3" in run_process("finetune_sdxl.py", [*own, "run_dir=killed_2"], place, ranks=2)
    assert_equal_runs(place / "straight_2", place / "killed_2", 6)


def test_a_run_weighs_tags_anew_and_resumes_bit_for_bit_with_other_workers_and_two_ranks_count_as_one(place):  # noqa: F811
    run("finetune_sdxl", [*OWN, WEIGHTS, "run_dir=one"], place)
    state = {step: checkpoint_tensors(place / "one", step) for step in (3, 6)}
    weights, shown = ("task/tag_balance.weights", "task/tag_balance.shown")
    assert not torch.equal(state[3][weights], state[6][weights]) and state[6][shown].sum() > state[3][shown].sum()
    shares = [row["effective_share"] for row in rows(place / "one/metrics.jsonl", "train")]
    assert len(shares) == 6 and all(0.2 < share < 1 for share in shares[2:])

    killed = [*OWN, WEIGHTS, "run_dir=killed"]
    run_until_killed("finetune_sdxl", killed, place, step=5)  # of steps 3 to 6, the weights are those of step 2 and 4
    run("finetune_sdxl", [*killed, "runtime.workers=2", "runtime.prefetch_batches=3"], place)
    assert_equal_runs(place / "one", place / "killed", 6)

    run_process("finetune_sdxl.py", [*OWN, WEIGHTS, "run_dir=ranks"], place, ranks=2)
    two = checkpoint_tensors(place / "ranks", 6)
    balance = [name for name in two if "tag_balance" in name]
    assert len(balance) == 3 and all(torch.equal(state[6][name], two[name]) for name in balance)
