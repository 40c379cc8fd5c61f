"""One cycle in a whole run: torch's rate and momentum at every update, with micro-batches, and over a resumption."""

import pytest
import torch

from engine.run_parts import Run
from tests.in_process import TINY, make_images, run
from tests.support import checkpoint_tensors, rows

STEPS, PEAK = 12, 0.1


@pytest.fixture
def settings(tmp_path):
    images = make_images(tmp_path / "images")
    more = [f"loop.total_steps={STEPS}", f"loop.checkpoint_every_steps={STEPS}"]
    return [*TINY, f"data.root={images}", "schedule=onecycle", "optim=sgd", f"optim.lr={PEAK}", *more]


def torchs_values(steps=STEPS, peak=PEAK):
    """Return (rate, momentum) of torch's OneCycleLR at each update, by its own defaults, which are ours."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak, momentum=0.9)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=steps)
    found = []
    for step in range(steps):
        found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        if step < steps - 1:
            cycle.step()
    return found


def assert_torchs_values(folder):
    found = [(row["lr"], row["momentum"]) for row in rows(folder / "metrics.jsonl", "train")]
    assert len(found) == STEPS
    for ours, theirs in zip(found, torchs_values()):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_cycle_counts_updates_and_not_micro_batches_and_goes_on_where_it_was(settings, tmp_path, monkeypatch):
    """Rates, momentum and weights of a resumed run are those of the undisturbed one."""
    run("finetune", [*settings, f"run_dir={tmp_path}/quarters", "loop.batch_size=1"], tmp_path)
    assert_torchs_values(tmp_path / "quarters")
    run("finetune", [*settings, f"run_dir={tmp_path}/through"], tmp_path)
    words = [*settings, f"run_dir={tmp_path}/stopped"]
    with monkeypatch.context() as patched:
        patched.setattr(Run, "must_stop", property(lambda self: self.step >= 6))
        with pytest.raises(SystemExit, match="75"):
            run("finetune", words, tmp_path)
    assert not (tmp_path / "stopped/complete.json").exists()
    run("finetune", words, tmp_path)
    assert_torchs_values(tmp_path / "stopped")
    through, stopped = (checkpoint_tensors(tmp_path / name, STEPS) for name in ("through", "stopped"))
    assert through.keys() == stopped.keys() and all(torch.equal(through[name], stopped[name]) for name in through)
