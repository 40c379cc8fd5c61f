"""Atelier's fine-tuning step against timm's training script: milliseconds per update, ratio with its spread.

python bench/finetune_step.py [quick] [TEXT OF A SETTING]      (on an idle machine; six minutes on two CPU cores)

`quick`: the settings of a GPU with a tiny network at 64 px, eager.

Ours is the loop itself (engine/run/loop.py) on a batch on the device: scheduled values, the update
with its finite decision and clipping, EMA, meters. Theirs is one update as timm's script makes it, of timm's own parts:
the prefetching loader's normalisation, autocast, forward and loss, backward, gradient clipping, the optimiser of
`create_optimizer_v2`, reading the loss, EMA, the schedule per update. Both normalise uint8 images, smooth labels by
0.1, clip at 1 and use AdamW, timm's with `--opt-kwargs fused=True`; neither draws augmentations or drop path. Weights
are fresh on both sides: their values do not change the time. A setting says what both sides have in common.

Source of the order of an update: huggingface/pytorch-image-models:train.py train_one_epoch.
"""

import itertools
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
from timm.data.loader import PrefetchLoader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, dispatch_clip_grad

from bench.measure import SMALL_NETWORK, Comparison, build_bench_run, count_flops, read_group, run_bench
from engine.tasks.classification import ClassificationTask
from engine.tasks.config import ClassificationTaskConfig
from engine.tasks.kind import Setup
from models.config import ModelConfig
from utils.hardware import missing_for_compile

CLASSES = 1000
SMOOTHING = 0.1
CLIP = 1.0
EMA_DECAY = 0.9998
MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]
NETWORKS = {
    "cpu": {"convnextv2_atto": 224, "resnet18": 128},
    "cuda": {"convnextv2_tiny": 224},
}
COUNT = {"cpu": 16, "cuda": 128}
STEPS = {"cpu": 2, "cuda": 10}


@dataclass(frozen=True)
class Setting:
    """What both sides have in common, and which of them are compiled."""

    precision: str = "fp32"
    channels_last: bool = False
    ema: bool = False
    compiles_ours: bool = False
    compiles_theirs: bool = False


def make_task(name, size, label_smoothing=SMOOTHING, shape=None):
    """Return our task with the network; shape: other depths and dims of a ConvNeXt."""
    if name.startswith("convnextv2"):
        model = read_group(ModelConfig, "model", name, **(shape or {}))
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
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    numbers = torch.arange(count)
    batch = {"sample_id": numbers, "key": numbers, "weight": torch.ones(count), "images": images, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def our_turn(task, batch, steps, setting):
    """Return a function that makes `steps` updates by the loop of every entry point."""
    machine = {
        "device": "auto",
        "deterministic": False,
        "cuda_graphs": True,
        "precision": setting.precision,
        "channels_last": setting.channels_last,
        "compile": setting.compiles_ours,
    }
    loop = {"clip_grad_norm": CLIP, "ema_decay": EMA_DECAY if setting.ema else None}
    run = build_bench_run(task, batch_size=len(batch["weight"]), epoch_steps=steps, runtime=machine, loop=loop)
    stream = itertools.repeat([batch])
    return lambda: run.train_one_epoch(stream)


class TimmScript:
    """timm's script as it trains one epoch of `steps` batches; a call makes one."""

    def __init__(self, network, batch, steps, setting):
        device = batch["images"].device
        self.setting = setting
        self.network = network.to(device).train()
        if setting.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.criterion = LabelSmoothingCrossEntropy(smoothing=SMOOTHING).to(device)
        self.optimizer = create_optimizer_v2(self.network, opt="adamw", lr=1e-3, weight_decay=0.05, fused=True)
        self.ema = ModelEmaV3(self.network, decay=EMA_DECAY) if setting.ema else None
        self.model = torch.compile(self.network, backend="inductor") if setting.compiles_theirs else self.network
        batches = [(batch["images"], batch["labels"])] * steps
        self.loader = PrefetchLoader(batches, mean=tuple(MEAN), std=tuple(STD), device=device)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched="cosine", num_epochs=10**4, warmup_epochs=5, step_on_epochs=False,
            updates_per_epoch=steps,
        )  # fmt: skip
        self.amp = nullcontext()
        if setting.precision == "bf16":
            self.amp = torch.autocast(device.type, dtype=torch.bfloat16)
        self.updates = 0

    def __call__(self):
        losses = AverageMeter()
        self.optimizer.zero_grad()
        for images, labels in self.loader:
            if self.setting.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with self.amp:
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


def compare(name, setting, device, quick):
    """Return the comparison of a network in a setting, with a new network on each side."""
    size = 64 if quick else NETWORKS[device.type][name]
    count = 2 if quick else COUNT[device.type]
    steps = 1 if quick else STEPS[device.type]
    torch.compiler.reset()
    shape = SMALL_NETWORK if quick else {}
    batch = make_batch(size, count, device)
    task = make_task(name, size, shape=shape).to(device)
    flops = count_flops(task, batch)
    ours = our_turn(task, batch, steps, setting)
    theirs = TimmScript(timm.create_model(name, num_classes=CLASSES, **shape), batch, steps, setting)
    sides = {"atelier": ours, "timm fused": theirs}
    return Comparison(sides, steps, 3 if setting.compiles_theirs else 1, dict.fromkeys(sides, flops))


def settings(device, quick):
    """Yield the settings of the networks. On a GPU, one has timm's best beside ours without a compiler."""
    kind = "cuda" if quick else device.type
    known = {"eager bf16": Setting("bf16", channels_last=kind == "cuda")}
    if kind == "cpu":
        known["eager fp32"] = Setting()
    if not missing_for_compile(device.type):
        if kind == "cuda":
            known["timm compiled, bf16"] = Setting("bf16", channels_last=True, compiles_theirs=True)
        known["compiled bf16, channels-last, EMA"] = Setting(
            "bf16", channels_last=True, ema=True, compiles_ours=True, compiles_theirs=True
        )
    for name in NETWORKS[kind]:
        for text, setting in known.items():
            yield f"{name}, {text}", lambda name=name, setting=setting: compare(name, setting, device, quick)


if __name__ == "__main__":
    run_bench(settings)
