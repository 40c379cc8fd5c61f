"""What train_step costs over a loop written by hand: same network, batch, optimiser and precision, in one run.

python bench/step_overhead.py            (`make bench`; on an idle machine)

Both sides run in turns, after a warm-up of each; reported are milliseconds per step (median) and the ratio of each
turn's pair with its spread. The hand-written side does what a minimal script does: forward, mean, backward, clip, step.
"""

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

from engine.config import RuntimeConfig
from engine.meters import Meter
from engine.runtime import choose_runtime
from engine.step import LossScale, train_step
from engine.tasks.classification import ClassificationTask
from engine.tasks.config import ClassificationTaskConfig
from models.config import ConvNeXtV2Config

CLASSES, SIZE, BATCH, WARMUP, STEPS, TURNS = 100, 64, 32, 5, 15, 5
PREPROCESSING = {"image_size_hw": [SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3}
MODEL = ConvNeXtV2Config(
    family="convnextv2", name="convnextv2_atto", in_channels=3, depths=[2, 2, 6, 2], dims=[40, 80, 160, 320],
    stem_stride=4, drop_path_rate=0.1, head_init_scale=0.001,
)  # fmt: skip
TASK = ClassificationTaskConfig(
    name="classification",
    label_smoothing=0.0,
    mixup_alpha=0.0,
    cutmix_alpha=0.0,
    allow_missing_classes=False,
    keep_head=False,
)
RUNTIME = RuntimeConfig(
    device="auto", precision="fp32", compile=False, channels_last=False, workers=0, prefetch_batches=1, threads=None,
    deterministic=False, sync_batchnorm=False, grad_checkpointing=False, hang_timeout_sec=1800.0,
)  # fmt: skip


def make():
    """Return a task and its optimiser, alike on both sides."""
    torch.manual_seed(0)
    task = ClassificationTask(
        MODEL, TASK, class_names=[str(k) for k in range(CLASSES)], preprocessing=PREPROCESSING
    ).to(choose_runtime(RUNTIME).device)
    return task, torch.optim.AdamW(task.parameters(), lr=1e-4, fused=True)


def main():
    runtime = choose_runtime(RUNTIME)
    device = runtime.device
    batch = {
        "images": torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, device=device),
        "labels": torch.randint(0, CLASSES, (BATCH,), device=device),
        "weight": torch.ones(BATCH, device=device),
    }
    ours, our_optimizer = make()
    plain, plain_optimizer = make()
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

    def measure(step, count):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for number in range(count):
            step(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - started) / count

    for side in (our_step, plain_step):
        measure(side, WARMUP)
    pairs = [(measure(our_step, STEPS), measure(plain_step, STEPS)) for _ in range(TURNS)]
    ratios = [ours_ms / plain_ms for ours_ms, plain_ms in pairs]
    found = {
        "train_step_ms": round(statistics.median(pair[0] for pair in pairs), 2),
        "by_hand_ms": round(statistics.median(pair[1] for pair in pairs), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
        "setting": f"convnextv2_atto, {BATCH} x {SIZE} px, fp32, {device.type}, {torch.get_num_threads()} threads",
    }
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
