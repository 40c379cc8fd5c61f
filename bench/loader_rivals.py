"""Our loader against torchvision's and timm's, without a cache and behind ours: milliseconds an image.

python bench/loader_rivals.py [quick]          (on an idle machine; five minutes on two cores)

All sides make batches of 128 float images of 224 px in one process with one thread: a random resized crop, antialiased
and bilinear, a mirror, and the normalisation; nobody trains. The files are crops of scikit-learn's two photographs, as
JPEGs of 500 x 375 (quality 90). A turn is an epoch; the first, in which caches are filled, is not counted. `bytes` is
ours as a GPU gets it: channels_last, and not normalised before it is there. timm has its loader's defaults but for the
colour jitter, which nobody else does here.
"""

import functools
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import train
from bench.measure import OUT, Comparison, run_bench
from data.augment.views import training_views
from data.open import Data, load_collection, open_images
from data.stream.loader import no_fields
from models.image_model import Normalise
from utils.config.entry_point import validate

BATCH = 16 if "quick" in sys.argv else 128
SIZE_PX = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFF, L1, L2 = {"memory_gib": 0}, {"memory_gib": 4}, {"memory_gib": 0, "disk_gib": 4}


def write_images(folder, count, size):
    """Write `count` JPEGs, crops of photographs mirrored at their edges, in one class folder."""
    draws, (width, height) = np.random.default_rng(0), size
    photos = [np.pad(photo, ((0, 1500), (0, 2000), (0, 0)), mode="symmetric") for photo in load_sample_images().images]
    for number in range(count):
        top, left = draws.integers(0, 400, 2)
        picture = Image.fromarray(photos[number % 2][top : top + height, left : left + width])
        file = folder / f"x/{number:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, quality=90)


class Ours:
    """The training stream of a folder, behind a cache or none."""

    def __init__(self, folder, cache, batches, channels_last=False):
        words = [f"data.root={folder}", "data.validation_fraction=0", f"data.cache.folder={folder}-cache"]
        words += ["augment=light", "augment.interpolation=bilinear", f"augment.image_size_hw=[{SIZE_PX},{SIZE_PX}]"]
        words.append("augment.crop_scale=[0.08,1.0]")
        words += [f"data.cache.{key}={value}" for key, value in cache.items()]
        config = validate(train.main.compose(["data=image_folder", *words])[0], train.main.schema)
        machine = SimpleNamespace(
            device=torch.device("cpu"), channels_last=channels_last, workers=0, prefetch_batches=2
        )
        collection, shortest_px = load_collection(config.data), config.augment.shortest_px()
        source = open_images(collection, config.data, {"channels": 3, "shortest_px": shortest_px}, repeats=True)
        data = Data(collection, source, machine, seed=0, batch_size=BATCH, run_path=None)
        loader = data.train(collection.rows("train"), no_fields, training_views(config.augment))
        self._steps, self._batches = loader.steps(0, BATCH, BATCH), batches
        self._normalise = Normalise(MEAN, STD, 3)

    def __call__(self):
        """Read an epoch."""
        for batch in self.read_bytes():
            self._normalise(batch)

    def read_bytes(self):
        """Return an epoch's batches as bytes."""
        return [next(self._steps)[0]["images"] for _ in range(self._batches)]


def theirs(folder):
    """Return the other loaders of a folder of JPEGs, each a function that reads an epoch."""
    steps = transforms.Compose([
        transforms.RandomResizedCrop(SIZE_PX), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    torchvision = DataLoader(ImageFolder(folder, steps), BATCH, shuffle=True)
    timm = create_loader(
        create_dataset("", folder), (3, SIZE_PX, SIZE_PX), BATCH, is_training=True, num_workers=0, color_jitter=None,
        interpolation="bilinear", mean=MEAN, std=STD, device=torch.device("cpu"), persistent_workers=False,
    )  # fmt: skip
    sides = {"torchvision": torchvision, "timm": timm}
    return {name: functools.partial(read_all, batches) for name, batches in sides.items()}


def read_all(batches):
    """Read all batches."""
    for _ in batches:
        pass


def comparisons(device, quick):
    """Yield all comparisons."""
    torch.set_num_threads(1)
    count = BATCH if quick else 4 * BATCH
    out = OUT / ("quick/loader_rivals" if quick else "loader_rivals")
    shutil.rmtree(out, ignore_errors=True)
    jpegs = out / "jpegs"
    write_images(jpegs, count, (500, 375))
    rivals, batches = theirs(jpegs), count // BATCH
    for name, cache in (("no cache", OFF), ("L2", L2), ("L1", L1)):
        others = rivals if cache is OFF else {"torchvision": rivals["torchvision"]}
        floats = Ours(jpegs, cache, batches)
        as_bytes = Ours(jpegs, cache, batches, channels_last=True).read_bytes
        for ours in ({f"ours, {name}": floats}, {f"bytes, {name}": as_bytes}):
            yield Comparison("JPEGs of 500 x 375", {**ours, **others}, count, warmup=2)


if __name__ == "__main__":
    run_bench(comparisons, turns=9)
