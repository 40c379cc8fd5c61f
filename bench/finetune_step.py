"""Atelier's fine-tuning step against timm's training script: milliseconds per update, ratio with its spread.

python bench/finetune_step.py [quick]          (on an idle machine; six minutes on two CPU cores; quick: no compiling)

Ours is the loop itself (engine/run/loop.py) on a batch on the device: scheduled values, the update
with its finite decision and clipping, EMA, meters. Theirs is one update as timm's script makes it, of timm's own parts:
the prefetching loader's normalisation, autocast, forward and loss, backward, gradient clipping, the optimiser of
`create_optimizer_v2`, reading the loss, EMA, the schedule per update. Both normalise uint8 images, smooth labels by
0.1, clip at 1 and use AdamW; neither draws augmentations or drop path. Weights are fresh on both sides: their values do
not change the time. Each line begins with the network and says what both sides have in common.

Source of the order of an update: huggingface/pytorch-image-models:train.py train_one_epoch.
"""

import itertools
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
from timm.data.loader import PrefetchLoader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, dispatch_clip_grad
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import Comparison, build_bench_run, read_group, run_bench
from engine.tasks.classification import ClassificationTask, ClassificationTaskConfig
from engine.tasks.kind import Setup
from models.config import ModelConfig
from utils.hardware import missing_for_compile

CLASSES, SMOOTHING, CLIP, EMA_DECAY = 1000, 0.1, 1.0, 0.9998
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NETWORKS = {
    "cpu": {"convnextv2_atto": 224, "resnet18": 128},
    "cuda": {"convnextv2_tiny": 224},
}
DEFAULTS, BEST = {}, {"fused": True}  # of timm's --opt-kwargs


def make_task(name, size, label_smoothing=SMOOTHING):
    """Return our task with the network."""
    if name.startswith("convnextv2"):
        model = read_group(ModelConfig, "model", name)
    else:
        model = read_group(ModelConfig, "model", "timm", name=name)
    config = read_group(ClassificationTaskConfig, "task", "classification", label_smoothing=label_smoothing)
    torch.manual_seed(0)
    preprocessing = {"image_size_hw": [size, size], "mean": MEAN, "std": STD}
    facts = {"class_names": [str(index) for index in range(CLASSES)]}
    return ClassificationTask(Setup(model, config, preprocessing, facts))


def make_batch(size, count, device):
    """Return images of noise and labels, on the device."""
    generator = torch.Generator().manual_seed(0)
    return {
        "sample_id": torch.arange(count, device=device),
        "key": torch.arange(count, device=device),
        "weight": torch.ones(count, device=device),
        "images": torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator).to(device),
        "labels": torch.randint(0, CLASSES, (count,), generator=generator).to(device),
    }


def our_turn(task, batch, steps, *, ema, runtime="reference", **machine):
    """Return a function that makes `steps` updates by the loop of every entry point."""
    if runtime == "reference":
        machine = {"device": "auto", "deterministic": False, "cuda_graphs": True, **machine}
    run = build_bench_run(
        task, batch_size=len(batch["weight"]), epoch_steps=steps, runtime={"option": runtime, **machine},
        loop={"clip_grad_norm": CLIP, "ema_decay": EMA_DECAY if ema else None},
    )  # fmt: skip
    stream = itertools.repeat([batch])
    return lambda: run.train_one_epoch(stream)


class TimmScript:
    """timm's script as it trains one epoch of `steps` batches; a call makes one."""

    def __init__(self, network, batch, steps, *, ema, precision="fp32", compile=False, channels_last=False, optim):
        self.device = batch["images"].device
        self.network = network.to(self.device).train()
        self.channels_last, self.precision = channels_last, precision
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.criterion = LabelSmoothingCrossEntropy(smoothing=SMOOTHING).to(self.device)
        self.optimizer = create_optimizer_v2(self.network, opt="adamw", lr=1e-3, weight_decay=0.05, **optim)
        self.ema = ModelEmaV3(self.network, decay=EMA_DECAY) if ema else None
        self.model = torch.compile(self.network, backend="inductor") if compile else self.network
        self.loader = PrefetchLoader(
            [(batch["images"], batch["labels"])] * steps, mean=tuple(MEAN), std=tuple(STD), device=self.device
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched="cosine", num_epochs=10**4, warmup_epochs=5, step_on_epochs=False,
            updates_per_epoch=steps,
        )  # fmt: skip
        self.updates = 0

    def autocast(self):
        """Return the script's amp_autocast."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def __call__(self):
        losses = AverageMeter()
        self.optimizer.zero_grad()
        for images, labels in self.loader:
            if self.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with self.autocast():
                loss = self.criterion(self.model(images), labels)
            loss.backward()
            dispatch_clip_grad(self.network.parameters(), value=CLIP, mode="norm")
            self.optimizer.step()
            losses.update(loss.item(), images.shape[0])
            self.updates += 1
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.update(self.network, step=self.updates)
            self.scheduler.step_update(num_updates=self.updates, metric=losses.avg)


class Sides:
    """The sides of one network: a new network for each unless one is given."""

    def __init__(self, name, device, quick):
        self.name, self.size = name, 64 if quick else NETWORKS[device.type][name]
        self.count, self.steps = (2, 1) if quick else (128, 10) if device.type == "cuda" else (16, 2)
        self.batch = make_batch(self.size, self.count, device)

    def ours(self, **settings):
        """Return our side."""
        return our_turn(make_task(self.name, self.size), self.batch, self.steps, **settings)

    def theirs(self, optim=BEST, **settings):
        """Return timm's side, with timm's own network."""
        network = timm.create_model(self.name, num_classes=CLASSES)
        return TimmScript(network, self.batch, self.steps, optim=optim, **settings)

    def compare(self, setting, sides, warmup=1):
        """Return the comparison of a setting."""
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            timm.create_model(self.name, num_classes=CLASSES)(torch.empty(self.count, 3, self.size, self.size))
        facts = {"teraflop": 3 * counter.get_total_flops() / 1e12}  # a backward pass takes twice a forward pass
        return Comparison(f"{self.name}, {setting}", sides, self.steps, warmup, facts)


def comparisons(device, quick):
    """Yield all settings of both networks."""
    for name in NETWORKS[device.type]:
        sides = Sides(name, device, quick)
        for ema in (False, True) if device.type == "cpu" else ():
            theirs = {"timm": sides.theirs(ema=ema, optim=DEFAULTS), "timm fused": sides.theirs(ema=ema)}
            yield sides.compare("eager fp32, EMA" if ema else "eager fp32", {"atelier": sides.ours(ema=ema), **theirs})
        fast = {"ema": False, "precision": "bf16", "channels_last": device.type == "cuda"}
        yield sides.compare("eager bf16", {"atelier": sides.ours(**fast), "timm fused": sides.theirs(**fast)})
        if not missing_for_compile(device.type) and not quick:
            fast = {"ema": True, "precision": "bf16", "compile": True, "channels_last": True}
            both = {"atelier": sides.ours(**fast), "timm fused": sides.theirs(**fast)}
            yield sides.compare("compiled bf16, channels-last, EMA", both, warmup=3)
            torch.compiler.reset()


if __name__ == "__main__":
    run_bench(comparisons)
