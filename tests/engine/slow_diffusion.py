"""task=diffusion resumes bit for bit on two ranks."""

from tests.engine.test_diffusion import RESUMED, SHORT, place  # noqa: F401 (a fixture)
from tests.support import assert_equal_runs
from tests.support import run as run_process


def test_two_ranks_resume_bit_for_bit(place):  # noqa: F811
    own = [*SHORT, *RESUMED, "data.root=images"]
    run_process("finetune_sdxl.py", [*own, "run_dir=straight_2"], place, ranks=2)
    run_process("finetune_sdxl.py", [*own, "run_dir=killed_2"], place, ranks=2, expect=-9, kill_at_step=4)
    assert "at step 3" in run_process("finetune_sdxl.py", [*own, "run_dir=killed_2"], place, ranks=2)
    assert_equal_runs(place / "straight_2", place / "killed_2", 6)
