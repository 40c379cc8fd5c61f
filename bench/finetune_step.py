"""The fine-tuning step against that of timm's training script: milliseconds per update, ratio with its spread.

python bench/finetune_step.py [quick]          (on an idle machine; six minutes on two CPU cores; quick: no compiling)

Ours is the loop itself (engine/train_one_epoch.py) on a batch on the device: scheduled values, train_step
with its finite decision and clipping, EMA, meters. Theirs is one update as timm's script makes it, of timm's own parts:
the prefetching loader's normalisation, autocast, forward and loss, backward, gradient clipping, the optimiser of
`create_optimizer_v2`, reading the loss, EMA, the schedule per update. Both normalise uint8 images, smooth labels by
0.1, clip at 1 and use AdamW; neither draws augmentations or drop path. Weights are fresh on both sides: their values do
not change the time. Each line begins with the network and says what both sides have in common.

Source of the order of an update: huggingface/pytorch-image-models:train.py train_one_epoch.
"""

import copy
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

from bench.measure import (
    bench_loop,
    build_bench_run,
    describe_machine,
    read_group,
    row_of,
    runtime_of,
    take_turns,
    write,
)
from engine.runtime import can_compile
from engine.tasks.classification import ClassificationTask, ClassificationTaskConfig
from engine.tasks.kind import Setup
from engine.train_one_epoch import StopVote, train_one_epoch
from models.config import ModelConfig

CLASSES, SMOOTHING, CLIP, EMA_DECAY = 1000, 0.1, 1.0, 0.9998
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NETWORKS = {"convnextv2_atto": 224, "resnet18": 128}
DEFAULTS, BEST = {}, {"fused": True}  # of timm's --opt-kwargs


def make_task(name, size):
    """Return our task with the network."""
    if name.startswith("convnextv2"):
        model = read_group(ModelConfig, "model", name)
    else:
        model = read_group(ModelConfig, "model", "timm", name=name)
    config = read_group(ClassificationTaskConfig, "task", "classification", label_smoothing=SMOOTHING)
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
        machine = {"device": "auto", "deterministic": False, **machine}
    run = build_bench_run(
        task,
        batch_size=len(batch["weight"]),
        epoch_steps=steps,
        runtime={"option": runtime, **machine},
        loop={"clip_grad_norm": CLIP, "ema_decay": EMA_DECAY if ema else None},
    )
    stream, epochs, vote = itertools.repeat([batch]), itertools.count(), StopVote()
    return lambda: train_one_epoch(run, stream, bench_loop(), next(epochs), vote)


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
            self.optimizer,
            sched="cosine",
            num_epochs=10**4,
            warmup_epochs=5,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
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


class Bench:
    """The rows of one network: sizes by device, new sides for each."""

    def __init__(self, name, size, quick):
        self.name, self.size, self.quick = name, 64 if quick else size, quick
        self.device = runtime_of("fp32").device
        on_gpu = self.device.type == "cuda"
        self.count, self.steps, self.turns = (2, 1, 2) if quick else (128, 20, 7) if on_gpu else (16, 2, 5)
        self.batch = make_batch(self.size, self.count, self.device)
        self.rows = []

    def ours(self, **settings):
        """Return our side, with a new network unless a task is given."""
        task = settings.pop("task", None) or make_task(self.name, self.size)
        return our_turn(task, self.batch, self.steps, **settings)

    def theirs(self, network=None, **settings):
        """Return timm's side, with a network of timm's own unless one is given."""
        network = network or timm.create_model(self.name, num_classes=CLASSES)
        return TimmScript(network, self.batch, self.steps, **settings)

    def measure(self, setting, sides, warmup=1):
        """Add rows: the first side against each other one."""
        found = take_turns(sides, steps=self.steps, warmup=warmup, turns=self.turns, device=self.device)
        first, *others = sides
        self.rows += [row_of(f"{self.name}, {setting}", found, first, other) for other in others]

    def run(self):
        """Measure everything and return the rows."""
        for ema in (False, True):
            sides = {
                "atelier": self.ours(ema=ema),
                "timm": self.theirs(ema=ema, optim=DEFAULTS),
                "timm fused": self.theirs(ema=ema, optim=BEST),
            }
            self.measure("eager fp32, EMA" if ema else "eager fp32", sides)
        task = make_task(self.name, self.size)
        same = self.theirs(copy.deepcopy(task.network), ema=False, optim=BEST)
        self.measure("eager fp32, same network", {"atelier": self.ours(task=task, ema=False), "timm fused": same})
        fast = {"ema": False, "precision": "bf16"}
        self.measure("eager bf16", {"atelier": self.ours(**fast), "timm fused": self.theirs(optim=BEST, **fast)})
        if can_compile(self.device.type) and not self.quick:
            fast = {"ema": True, "precision": "bf16", "compile": True, "channels_last": True}
            sides = {"atelier": self.ours(**fast), "timm fused": self.theirs(optim=BEST, **fast)}
            self.measure("compiled bf16, channels-last, EMA", sides, warmup=3)
            torch.compiler.reset()
        auto = {"runtime": "auto", **({"compile": False} if self.quick else {})}
        sides = {"runtime=auto": self.ours(ema=False, **auto), "eager fp32": self.ours(ema=False)}
        self.measure("ours alone", sides, warmup=3)
        torch.compiler.reset()
        return self.rows


def main():
    quick = sys.argv[1:] == ["quick"]
    rows = [row for name, size in NETWORKS.items() for row in Bench(name, size, quick).run()]
    machine = describe_machine(runtime_of("fp32").device)
    write("finetune_step", rows, machine=machine, timm=timm.__version__, quick=quick)


if __name__ == "__main__":
    main()
