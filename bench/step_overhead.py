"""What train_step costs over a loop written by hand: same network, batch, optimiser and precision, in one run.

python bench/step_overhead.py [quick]            (`make bench`; on an idle machine)

Both sides run in turns, after a warm-up of each; reported are milliseconds per step (median) and the ratio of each
turn's pair with its spread. The hand-written side does what a minimal script does: forward, mean, backward, clip, step.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

from bench.measure import describe_machine, read_group, row_of, runtime_of, take_turns, write
from engine.meters import Meter
from engine.step import LossScale, train_step
from engine.tasks.classification import ClassificationTask, ClassificationTaskConfig
from engine.tasks.kind import Setup
from models.config import ModelConfig

CLASSES, SIZE, BATCH, STEPS, TURNS = 100, 64, 32, 15, 5
PREPROCESSING = {"image_size_hw": [SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3}


def make(device):
    """Return a task and its optimiser, alike on both sides."""
    torch.manual_seed(0)
    task = ClassificationTask(
        Setup(
            read_group(ModelConfig, "model", "convnextv2_atto", drop_path_rate=0.1),
            read_group(ClassificationTaskConfig, "task", "classification", label_smoothing=0.0),
            PREPROCESSING,
            {"class_names": [str(k) for k in range(CLASSES)]},
        )
    ).to(device)
    return task, torch.optim.AdamW(task.parameters(), lr=1e-4, fused=True)


def main():
    quick = sys.argv[1:] == ["quick"]
    runtime, steps = runtime_of("fp32"), 2 if quick else STEPS
    device = runtime.device
    batch = {
        "images": torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, device=device),
        "labels": torch.randint(0, CLASSES, (BATCH,), device=device),
        "weight": torch.ones(BATCH, device=device),
    }
    ours, our_optimizer = make(device)
    plain, plain_optimizer = make(device)
    scale, meter = LossScale(runtime), Meter(device)

    def our_step(step):
        result = train_step(
            ours, ours, [batch], our_optimizer, scale, {}, step=step, seed=0, clip_grad_norm=1.0, runtime=runtime
        )
        meter.add(result)

    def plain_step(step):
        loss = F.cross_entropy(plain.network(plain.normalise(batch["images"])), batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain_optimizer.step()
        plain_optimizer.zero_grad(set_to_none=True)

    def turn_of(step):
        return lambda: [step(number) for number in range(steps)]

    sides = {"train_step": turn_of(our_step), "by hand": turn_of(plain_step)}
    found = take_turns(sides, steps=steps, warmup=1, turns=2 if quick else TURNS, device=device)
    rows = [row_of(f"convnextv2_atto, {BATCH} x {SIZE} px, fp32", found, "train_step", "by hand")]
    write("step_overhead", rows, machine=describe_machine(device), quick=quick)


if __name__ == "__main__":
    main()
