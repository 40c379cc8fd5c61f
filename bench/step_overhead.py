"""What an update costs over a loop written by hand: same network, batch, optimiser and precision, in one run.

python bench/step_overhead.py [quick]            (`make bench`; on an idle machine)

The hand-written side does what a minimal script does: forward, mean, backward, clip, step.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

from bench.finetune_step import make_batch, make_task
from bench.measure import Comparison, build_bench_run, repeated, run_bench

SIZE, BATCH, STEPS = 64, 32, 15


def make(device):
    """Return the task, alike on both sides."""
    return make_task("convnextv2_atto", SIZE, label_smoothing=0.0).to(device)


def comparisons(device, quick):
    """Yield the one comparison."""
    steps, batch, plain = 2 if quick else STEPS, make_batch(SIZE, BATCH, device), make(device)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
    machine = {"device": "auto", "precision": "fp32", "deterministic": False}
    run = build_bench_run(make(device), batch_size=BATCH, runtime=machine)

    def our_step(step):
        run.recorder.log_meter.add(run.learner.update([batch]))

    def plain_step(step):
        loss = F.cross_entropy(plain.network(plain.normalise(batch["images"])), batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain_optimizer.step()
        plain_optimizer.zero_grad(set_to_none=True)

    sides = {"update": repeated(our_step, steps), "by hand": repeated(plain_step, steps)}
    yield Comparison(f"convnextv2_atto, {BATCH} x {SIZE} px, fp32", sides, steps)


if __name__ == "__main__":
    run_bench(comparisons)
