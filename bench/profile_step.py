"""The kernels of a training step: a profile of the loop's own update, by time.

python bench/profile_step.py [quick]

For each setting: milliseconds per step, peak memory (GPU), and the operations that take most of the step.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile

from bench.finetune_step import make_batch, make_task
from bench.measure import build_bench_run, describe_machine, report, runtime_of, time_ms

# network, pixels, images on a GPU and on a CPU
NETWORKS = {"convnextv2_tiny": (224, 128, 2), "resnet18": (128, 128, 8)}
SETTINGS = {"eager bf16": {"precision": "bf16"}, "compiled bf16": {"precision": "bf16", "compile": True}}
SHOWN = 12


def profile_setting(name, setting, *, quick):
    """Return a row: milliseconds per step, peak memory and the share of each operation."""
    size, on_gpu, on_cpu = NETWORKS[name]
    device = runtime_of("fp32").device
    count, size = (2, 64) if quick else (on_gpu if device.type == "cuda" else on_cpu, size)
    run = build_bench_run(
        make_task(name, size), batch_size=count,
        runtime={"device": "auto", "deterministic": False, "channels_last": True, **SETTINGS[setting]},
    )  # fmt: skip
    batches = [make_batch(size, count, device)]
    steps = 1 if quick else 10 if device.type == "cuda" else 2

    def turn():
        for _ in range(steps):
            run.learner.update(batches)

    time_ms(turn, device)  # warm-up
    per_step = time_ms(turn, device) / steps
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as found:
        turn()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events) or 1
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    return {
        "network": name, "setting": setting, "batch": count, "size": size, "ms": round(per_step, 3),
        "images_per_sec": round(1e3 * count / per_step, 1), "peak_mib": peak and round(peak),
        "launches": sum(event.count for event in events) // steps,
        "percent": {event.key[:80]: round(100 * getattr(event, key) / total, 1) for event in events[:SHOWN]},
    }  # fmt: skip


def main():
    quick = sys.argv[1:] == ["quick"]
    device = runtime_of("fp32").device
    rows = []
    for name in NETWORKS:
        for setting in SETTINGS if not quick else ["eager bf16"]:
            torch.compiler.reset()
            rows.append(profile_setting(name, setting, quick=quick))
    report({"machine": describe_machine(device), "quick": quick, "rows": rows})


if __name__ == "__main__":
    main()
