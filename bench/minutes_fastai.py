# ruff: noqa: F405
"""A training by fastai's own calls, for bench/minutes.py: prints {top1, steps, train_sec} as its last line.

The training images are one list of as many as the steps take, an epoch after the other, each in its own order. So
fit_one_cycle has one epoch of exactly these steps, and its only evaluation comes after the last.
"""

import json
import random
import sys
import time
from functools import partial
from pathlib import Path

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.vision.all import *  # noqa: F403 (as its users do)


class CpuBf16(MixedPrecision):
    """fastai's to_bf16, which asks for a GPU, on a CPU."""

    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast("cpu", torch.bfloat16)


class Clock(Callback):
    """The seconds of the steps, from the first batch on, which is read already."""

    def before_batch(self):
        if self.training and self.iter == 0:
            self.started = time.perf_counter()

    def after_train(self):
        self.seconds = time.perf_counter() - self.started


def load(given, count):
    """Return the loaders of `count` training images, and of all images of val or one batch."""
    train, val = (sorted(get_image_files(Path(given["root"]) / split)) for split in ("train", "val"))
    items, is_gray = [], given["channels"] == 1
    while len(items) < count:
        items += random.sample(train, len(train))
    items[count:] = val if given["evaluate"] else val[: given["batch"]]
    changes = aug_transforms(do_flip=given["flips"]) if given["augmentation"] == "strong" else [Flip()] * given["flips"]
    normalize = Normalize.from_stats(*(([0.5], [0.5]) if is_gray else imagenet_stats), cuda=False)
    block = DataBlock(
        (ImageBlock(PILImageBW if is_gray else PILImage), CategoryBlock(sorted({*map(parent_label, train)}))),
        get_y=parent_label, splitter=IndexSplitter(range(count, len(items))),
        item_tfms=RandomResizedCrop(given["size_px"], min_scale=given["scale"], val_xtra=0),
        batch_tfms=[*changes, normalize],
    )  # fmt: skip
    return block.dataloaders(items, bs=given["batch"], val_bs=256, shuffle=False, num_workers=0, device="cpu")


def main():
    given = json.loads(sys.argv[1])
    set_seed(given["seed"])
    loaders, clock = load(given, given["steps"] * given["batch"]), Clock()
    cpu = [ChannelsLast(), CpuBf16("bf16")] if given["bf16"] else []
    learner = Learner(
        loaders, xresnet18(c_in=given["channels"], n_out=len(loaders.vocab)), metrics=accuracy, cbs=[clock, *cpu],
        loss_func=LabelSmoothingCrossEntropy(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, fused=True),  # its own Adam: 130 ms a step, for 19
    )  # fmt: skip
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1, given["rate"])
    figures = {"top1": learner.recorder.values[-1][-1], "steps": given["steps"], "train_sec": clock.seconds}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
