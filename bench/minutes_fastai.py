"""A training by fastai's own calls, for bench/minutes.py: prints {top1, steps, train_sec} as its last line.

    python bench/minutes_fastai.py '{"root": "FOLDER", "size_px": 48, "rate": 3e-3, ...}'

The training images are one list of as many as the steps take, an epoch after the other, each in its own order. So
fit_one_cycle has one epoch of exactly these steps, and its only evaluation comes after the last.
"""

import json
import random
import sys
import time
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.schedule import Learner  # with fit_one_cycle
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, Normalize, get_image_files, parent_label
from fastai.losses import LabelSmoothingCrossEntropy
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import Flip, RandomResizedCrop, aug_transforms
from fastai.vision.core import PILImage, PILImageBW, imagenet_stats
from fastai.vision.data import ImageBlock
from fastai.vision.models.xresnet import xresnet18


class CpuBf16(MixedPrecision):
    """fastai's to_bf16, which asks for a GPU, on a CPU."""

    def before_fit(self):
        """Replace the context for CUDA."""
        super().before_fit()
        self.autocast = torch.autocast("cpu", torch.bfloat16)


class Clock(Callback):
    """The seconds of the steps, from the first batch on, which is read already."""

    def before_batch(self):
        """Start with the first batch."""
        if self.training and self.iter == 0:
            self.started = time.perf_counter()

    def after_train(self):
        """Stop after the last step."""
        self.seconds = time.perf_counter() - self.started


def main():
    given = json.loads(sys.argv[1])
    set_seed(given["seed"], reproducible=True)
    train, val = (sorted(get_image_files(Path(given["root"]) / split)) for split in ("train", "val"))
    count, items = given["steps"] * given["batch"], []
    while len(items) < count:
        items += random.sample(train, len(train))
    val = val if given["evaluate"] else val[: given["batch"]]
    is_gray, is_strong = given["channels"] == 1, given["augmentation"] == "strong"
    crop = RandomResizedCrop(given["size_px"], min_scale=given["scale"], val_xtra=0)
    flips = [Flip()] if given["flips"] else []
    block = DataBlock(
        blocks=(
            ImageBlock(PILImageBW if is_gray else PILImage),
            CategoryBlock(sorted({*map(parent_label, train)})),
        ),
        get_y=parent_label,
        splitter=IndexSplitter(range(count, count + len(val))),
        item_tfms=crop,
        batch_tfms=[
            *(aug_transforms(do_flip=given["flips"]) if is_strong else flips),
            Normalize.from_stats(*(([0.5], [0.5]) if is_gray else imagenet_stats), cuda=False),
        ],
    )
    loaders = block.dataloaders(
        [*items[:count], *val], bs=given["batch"], val_bs=256, shuffle=False, num_workers=0, device=torch.device("cpu")
    )
    clock = Clock()
    learner = Learner(
        loaders, xresnet18(c_in=given["channels"], n_out=len(loaders.vocab)), loss_func=LabelSmoothingCrossEntropy(),
        metrics=accuracy, cbs=[clock, *([CpuBf16(AMPMode.BF16)] if given["bf16"] else [])],
    )  # fmt: skip
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1, given["rate"])
    figures = {"top1": float(learner.recorder.values[-1][-1]), "steps": given["steps"], "train_sec": clock.seconds}
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
