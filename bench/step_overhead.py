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

SIZE = 64
BATCH = 32
STEPS = 15


def compare(device, quick):
    """Return the comparison; both sides have the same task."""
    batch = make_batch(SIZE, BATCH, device)
    plain = make_task("convnextv2_atto", SIZE, label_smoothing=0.0).to(device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
    task = make_task("convnextv2_atto", SIZE, label_smoothing=0.0).to(device)
    run = build_bench_run(
        task, batch_size=BATCH, runtime={"device": "auto", "precision": "fp32", "deterministic": False}
    )

    def our_step():
        run.recorder.log_meter.add(run.learner.update([batch]))

    def plain_step():
        loss = F.cross_entropy(plain.network(plain.normalise(batch["images"])), batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    steps = 2 if quick else STEPS
    return Comparison({"update": repeated(our_step, steps), "by hand": repeated(plain_step, steps)}, steps)


def settings(device, quick):
    """Yield the one setting."""
    yield f"convnextv2_atto, {BATCH} x {SIZE} px, fp32", lambda: compare(device, quick)


if __name__ == "__main__":
    run_bench(settings)
