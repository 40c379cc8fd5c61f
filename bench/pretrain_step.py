"""FCMAE in sparse against dense execution of the same network at 224 px: a whole step's seconds, activation memory.

python bench/pretrain_step.py [SIZE ...] [quick]        (on an idle machine; quick: no compiling)

Sizes: atto, tiny, base; all three by default.

Both sides run `train_step` with AdamW on the same weights, images and masks, in turns, after a warm-up. The bound is
the ratio of their multiply-adds, counted by torch's flop counter over the forward pass. Activation memory is what
autograd keeps for the backward pass: bytes of saved tensors, each storage counted once, without parameters. The
profile of the sparse step says what remains.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import compare, read_group, report, runtime_of
from engine.step import LossScale, train_step
from engine.tasks.fcmae import FCMAETask, FCMAETaskConfig
from engine.tasks.kind import Setup
from models.config import ConvNeXtV2Config
from models.fcmae import draw_mask

BATCH = {"cpu": {"atto": 8, "tiny": 4, "base": 2}, "cuda": {"atto": 256, "tiny": 128, "base": 64}}
SETTINGS = {"eager fp32": ("fp32", False), "compiled bf16": ("bf16", True)}


def make_task(size, execution, device):
    """Return the task with the weights of seed 0."""
    model = read_group(ConvNeXtV2Config, "model", f"convnextv2_{size}")
    config = read_group(FCMAETaskConfig, "task", "fcmae", execution=execution)
    torch.manual_seed(0)
    preprocessing = {"image_size_hw": [224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
    return FCMAETask(Setup(model, config, preprocessing)).to(device)


def make_batch(size, device):
    """Return images of noise with masks drawn as the loader draws them."""
    count, generator = BATCH[device.type][size], torch.Generator().manual_seed(0)
    return {
        "images": torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8).to(device),
        "mask": torch.stack([draw_mask(generator, 49, 0.6) for _ in range(count)]).to(device),
        "weight": torch.ones(count, device=device),
    }


def count_macs(task, batch):
    """Return the multiply-adds of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task(batch, {})
    return counter.get_total_flops() / 2


def saved_bytes(task, batch, runtime):
    """Return the bytes that autograd keeps between the passes, without parameters and the batch."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*task.parameters(), *task.buffers(), *batch.values()]}
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), runtime.autocast():
        output = task(batch, {})  # held, so that no storage is freed and its address used again
    found = sum(storages.values())
    del output
    return found


def stepper(task, batch, runtime):
    """Return a function that makes one whole step of the engine."""
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-4, fused=True)
    scale = LossScale(runtime)

    def step(number):
        train_step(task, task, [batch], optimizer, scale, {}, step=number, seed=0, clip_grad_norm=None, runtime=runtime)

    return step


def shares(step, device):
    """Return the operations that take most of a step, in percent of their own time."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as found:
        step(0)
    time = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, time))
    total = sum(getattr(event, time) for event in events)
    return {event.key[:60]: round(100 * getattr(event, time) / total, 1) for event in events[:8]}


def measure_size(size, setting, quick):
    """Return one row: seconds and bytes of both executions, their ratios, and the bound."""
    precision, compiled = SETTINGS[setting]
    runtime = runtime_of(precision)
    device = runtime.device
    batch = make_batch(size, device)
    tasks = {execution: make_task(size, execution, device) for execution in ("sparse", "dense")}
    macs = {name: count_macs(task, batch) for name, task in tasks.items()}
    memory = {name: saved_bytes(task, batch, runtime) for name, task in tasks.items()}
    for task in tasks.values():
        if compiled:
            task.compile()
    steps = {name: stepper(task, batch, runtime) for name, task in tasks.items()}
    found = compare(steps["dense"], steps["sparse"], device, quick=quick)
    bound = macs["dense"] / macs["sparse"]
    return {
        "size": size,
        "setting": setting,
        "batch": len(batch["weight"]),
        "dense_ms": found["first_ms"],
        "sparse_ms": found["second_ms"],
        "speedup": found["ratio"],
        "speedup_min_max": found["ratio_min_max"],
        "bound_by_macs": round(bound, 2),
        "share_of_bound": round(found["ratio"] / bound, 2),
        "activation_mib_dense": round(memory["dense"] / 2**20, 1),
        "activation_mib_sparse": round(memory["sparse"] / 2**20, 1),
        "activation_ratio": round(memory["sparse"] / memory["dense"], 2),
        "profile_percent": shares(steps["sparse"], device),
    }


def main():
    words = sys.argv[1:]
    sizes = [word for word in words if word != "quick"] or ["atto", "tiny", "base"]
    for size in sizes:
        for setting in ["eager fp32"] if "quick" in words else SETTINGS:
            torch.compiler.reset()
            report(measure_size(size, setting, "quick" in words))


if __name__ == "__main__":
    main()
