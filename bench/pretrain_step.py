"""FCMAE against the same network on all sites at 224 px: a whole step's time.

python bench/pretrain_step.py [quick] [TEXT OF A SETTING]        (on an idle machine; quick: the smallest network)

Both sides run `Learner.update` with AdamW on the same weights, images and masks, on a GPU as a CUDA graph. `bound`: the
ratio of their multiply-adds, counted by torch's flop counter over the forward pass.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import Comparison, build_bench_run, read_group, repeated, run_bench
from engine.tasks.fcmae import FCMAETask, FCMAETaskConfig
from engine.tasks.kind import Setup
from models.config import ConvNeXtV2Config
from models.fcmae import FCMAE, draw_mask

BATCH = {"cpu": {"atto": 8, "tiny": 4, "base": 2}, "cuda": {"tiny": 128, "base": 64}}
SETTINGS = {
    "cpu": {"eager fp32": ("fp32", False), "compiled bf16": ("bf16", True)},
    "cuda": {"eager bf16": ("bf16", False)},  # compiling takes minutes
}
STEPS = 3


class DenseFCMAE(FCMAE):
    """FCMAE that computes all sites."""

    def encode(self, images, visible):
        return self.proj(self.encoder.forward_features(images))


def make_task(size, network, device):
    """Return the task with the weights of seed 0. network: the class of its network."""
    model = read_group(ConvNeXtV2Config, "model", f"convnextv2_{size}")
    config = read_group(FCMAETaskConfig, "task", "fcmae")
    torch.manual_seed(0)
    preprocessing = {"image_size_hw": [224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
    task = FCMAETask(Setup(model, config, preprocessing)).to(device)
    task.network.__class__ = network
    return task


def make_batch(size, device):
    """Return images of noise with masks drawn as the loader draws them."""
    generator = torch.Generator().manual_seed(0)
    count = BATCH[device.type][size]
    batch = {
        "images": torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8),
        "mask": torch.stack([draw_mask(generator, 49, 0.6) for _ in range(count)]),
        "weight": torch.ones(count),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def count_flops(task, batch):
    """Return the arithmetic of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task(batch, 0.0)
    return counter.get_total_flops()


def stepper(task, batch, precision):
    """Return a function that makes one whole update."""
    machine = {"device": "auto", "precision": precision, "deterministic": False, "cuda_graphs": True}
    run = build_bench_run(task, batch_size=len(batch["weight"]), runtime=machine, loop={"clip_grad_norm": None})
    return lambda: run.learner.update([batch])


def compare(size, precision, compiled, device):
    """Return the comparison of sparse and dense for a size."""
    batch = make_batch(size, device)
    torch.compiler.reset()
    tasks = {"sparse": make_task(size, FCMAE, device), "dense": make_task(size, DenseFCMAE, device)}
    flops = {name: count_flops(task, batch) for name, task in tasks.items()}
    if compiled:
        for task in tasks.values():
            task.compile()
    facts = {"bound": round(flops["sparse"] / flops["dense"], 3)}
    sides = {name: repeated(stepper(task, batch, precision), STEPS) for name, task in tasks.items()}
    return Comparison(sides, STEPS, 2, facts)


def settings(device, quick):
    """Yield sparse against dense for each size and setting."""
    names = [(size, text) for size in BATCH[device.type] for text in SETTINGS[device.type]]
    for size, text in names[:1] if quick else names:
        name = f"{size}, batch {BATCH[device.type][size]}, {text}"
        yield name, lambda size=size, text=text: compare(size, *SETTINGS[device.type][text], device)


if __name__ == "__main__":
    run_bench(settings)
