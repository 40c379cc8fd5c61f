"""What a training step on a CPU gains where the C library keeps freed memory, against its default.

python bench/freed_memory.py [quick]            (Linux with glibc; on an idle machine)

The default returns tensors of more than 32 MiB to the system, once its rules have adapted; the other side sets that.
Our scripts leave the default: glibc before 2.38 does not find the hole that an aligned block has left, and may grow.
"""

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.finetune_step import make_batch, make_task
from bench.measure import Comparison, repeated, run_bench, runtime_of
from engine.meters import Meter
from engine.step import LossScale, train_step

STEPS = 2
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h


def keep_freed_memory():
    """Have glibc keep what is freed for what is allocated next. Source: mallopt(3)."""
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)


def return_freed_memory():
    """Set what glibc's rules come to in a process with large tensors."""
    library = ctypes.CDLL(None)
    for name, value in ((_MMAP_MAX, 65_536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20)):
        library.mallopt(name, value)
    library.malloc_trim(0)


def make_side(choose, size, count, device):
    """Return a function that makes two steps of a task of its own."""
    batch, task = make_batch(size, count, device), make_task("convnextv2_atto", size, label_smoothing=0.0)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-4, fused=True)
    runtime, scale, meter = runtime_of("fp32"), LossScale(runtime_of("fp32")), Meter(device)

    def update(step):
        result = train_step(
            task, task, [batch], optimizer, scale, {}, step=step, seed=0, clip_grad_norm=1.0, runtime=runtime
        )
        meter.add(result)

    steps = repeated(update, STEPS)

    def turn():
        choose()
        steps()

    return turn


def comparisons(device, quick):
    """Yield a comparison for each batch size."""
    for size, count in ((64, 8),) if quick else ((128, 32), (224, 64)):
        choices = {"kept": keep_freed_memory, "glibc's": return_freed_memory}
        sides = {name: make_side(choose, size, count, device) for name, choose in choices.items()}
        yield Comparison(f"convnextv2_atto, {count} x {size} px, fp32", sides, STEPS)


if __name__ == "__main__":
    run_bench(comparisons)
