"""One cycle in a whole run: torch's rate and momentum at every update of four micro-batches."""

import pytest
import torch

from tests.in_process import TINY, make_images, run
from tests.support import rows

STEPS, PEAK = 12, 0.1


def torchs_values(steps=STEPS, peak=PEAK):
    """Return (rate, momentum) of torch's OneCycleLR at each update, by its own defaults, which are ours."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak, momentum=0.9)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=steps)
    for step in range(steps):
        yield optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
        optimizer.step()
        if step < steps - 1:
            cycle.step()


def test_a_cycle_counts_updates_and_not_micro_batches(tmp_path):
    data = [f"data.root={make_images(tmp_path / 'images')}", f"loop.total_steps={STEPS}", "loop.batch_size=1"]
    words = [*TINY, *data, "schedule=onecycle", "optim=sgd", f"optim.lr={PEAK}", f"run_dir={tmp_path}/run"]
    run("finetune", words, tmp_path)
    found = [(row["lr"], row["momentum"]) for row in rows(tmp_path / "run/metrics.jsonl", "train")]
    assert found == [pytest.approx(values, rel=1e-9) for values in torchs_values()]
