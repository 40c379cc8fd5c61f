"""FCMAE against the same network on all sites at 224 px: a whole step's time.

python bench/pretrain_step.py [quick] [TEXT OF A SETTING]        (on an idle machine; quick: a GPU's, of a tiny network)

Both sides run `Learner.update` with AdamW on the same weights, images and masks, on a GPU as a CUDA graph. `bound`: the
ratio of their multiply-adds, counted by torch's flop counter over the forward pass.
"""

import itertools
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.measure import SMALL_NETWORK, Comparison, build_bench_run, count_flops, read_group, repeated, run_bench
from engine.tasks.config import FCMAETaskConfig
from engine.tasks.fcmae import FCMAETask
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


def make_task(model, network, side_px, device):
    """Return the task with the weights of seed 0. network: the class of its network."""
    config = read_group(FCMAETaskConfig, "task", "fcmae")
    torch.manual_seed(0)
    preprocessing = {"image_size_hw": [side_px, side_px], "mean": [0.5] * 3, "std": [0.5] * 3}
    task = FCMAETask(Setup(model, config, preprocessing)).to(device)
    task.network.__class__ = network
    return task


def make_batch(count, side_px, device):
    """Return images of noise with masks drawn as the loader draws them."""
    generator = torch.Generator().manual_seed(0)
    sites = (side_px // 32) ** 2
    batch = {
        "images": torch.randint(0, 256, (count, 3, side_px, side_px), dtype=torch.uint8),
        "mask": torch.stack([draw_mask(generator, sites, 0.6) for _ in range(count)]),
        "weight": torch.ones(count),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def stepper(task, batch, precision):
    """Return a function that makes one whole update."""
    machine = {"device": "auto", "precision": precision, "deterministic": False, "cuda_graphs": True}
    run = build_bench_run(task, batch_size=len(batch["weight"]), runtime=machine, loop={"clip_grad_norm": None})
    return lambda: run.learner.update([batch])


def compare(size, setting, device, quick):
    """Return the comparison of sparse and dense for a size."""
    precision, compiled = setting
    count, side_px = (2, 64) if quick else (BATCH[device.type][size], 224)
    model = read_group(ConvNeXtV2Config, "model", f"convnextv2_{size}", **(SMALL_NETWORK if quick else {}))
    batch = make_batch(count, side_px, device)
    torch.compiler.reset()
    networks = {"sparse": FCMAE, "dense": DenseFCMAE}
    tasks = {name: make_task(model, network, side_px, device) for name, network in networks.items()}
    flops = {name: count_flops(task, batch) for name, task in tasks.items()}
    if compiled:
        for task in tasks.values():
            task.compile()
    facts = {"bound": round(flops["sparse"] / flops["dense"], 3)}
    sides = {name: repeated(stepper(task, batch, precision), STEPS) for name, task in tasks.items()}
    return Comparison(sides, STEPS, 2, flops, facts)


def settings(device, quick):
    """Yield sparse against dense for each size and setting."""
    kind = "cuda" if quick else device.type
    for (size, count), (text, setting) in itertools.product(BATCH[kind].items(), SETTINGS[kind].items()):
        yield f"{size}, batch {count}, {text}", partial(compare, size, setting, device, quick)


if __name__ == "__main__":
    run_bench(settings)
