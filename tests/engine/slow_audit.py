"""job=audit in real processes: runs of each kind that were killed and resumed."""

import pytest

from tests import support


@pytest.mark.parametrize(
    ("task", "ranks", "words"),
    [("classification", 2, ["model.drop_path_rate=0.3"]), ("diffusion", 1, ["task.lora.rank=2"])],
)
def test_a_killed_and_resumed_run_is_repeated_through_torchrun(task, ranks, words, tmp_path):
    data = support.make_collection(tmp_path / "data")
    steps = ["loop.total_steps=4", "loop.batch_size=8", "loop.checkpoint_every_steps=1", "loop.audit_every=2"]
    overrides = support.common(task, data, "run", *steps, *words)
    script = support.SCRIPTS[task]
    support.run(script, overrides, tmp_path, ranks, expect=-9, kill_at_step=3)
    support.run(script, overrides, tmp_path, ranks)
    assert support.run("evaluate.py", ["job=audit", "run_dir=run", "verify=1"], tmp_path).count("equal") == 1
