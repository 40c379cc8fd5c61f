"""What train_step costs over a loop written by hand: same network, batch, optimiser and precision, in one run.

python bench/step_overhead.py [quick]            (`make bench`; on an idle machine)

The hand-written side does what a minimal script does: forward, mean, backward, clip, step.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

from bench.finetune_step import make_batch, make_task
from bench.measure import Comparison, repeated, run_bench, runtime_of
from engine.recorder import Meter
from engine.step import Buffers, LossScale, train_step

SIZE, BATCH, STEPS = 64, 32, 15


def make(device):
    """Return a task and its optimiser, alike on both sides."""
    task = make_task("convnextv2_atto", SIZE, label_smoothing=0.0).to(device)
    return task, torch.optim.AdamW(task.parameters(), lr=1e-4, fused=True)


def comparisons(device, quick):
    """Yield the one comparison."""
    runtime, steps, batch = runtime_of("fp32"), 2 if quick else STEPS, make_batch(SIZE, BATCH, device)
    ours, our_optimizer = make(device)
    plain, plain_optimizer = make(device)
    meter, progress = Meter(device), torch.zeros((), device=device)
    learner = SimpleNamespace(
        task=ours, model=ours, buffers=Buffers(ours), optimizer=our_optimizer, scale=LossScale(runtime), seed=0,
        clip_grad_norm=1.0, runtime=runtime,
    )  # fmt: skip

    def our_step(step):
        learner.step = step
        meter.add(train_step(learner, [batch], progress))

    def plain_step(step):
        loss = F.cross_entropy(plain.network(plain.normalise(batch["images"])), batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain_optimizer.step()
        plain_optimizer.zero_grad(set_to_none=True)

    sides = {"train_step": repeated(our_step, steps), "by hand": repeated(plain_step, steps)}
    yield Comparison(f"convnextv2_atto, {BATCH} x {SIZE} px, fp32", sides, steps)


if __name__ == "__main__":
    run_bench(comparisons)
