"""Our loader against those that people use instead, and our caches against decoding: milliseconds an image.

python bench/loader_rivals.py [quick]          (on an idle machine; ten minutes on two cores; pip install webdataset
datasets mosaicml-streaming nvidia-dali-cuda120, as many as are wanted)

All sides make batches of 128 float images of 224 px in one process with one thread: a random resized crop, antialiased
and bilinear, a mirror, and the normalisation; nobody trains. The files are crops of scikit-learn's two photographs, as
JPEGs of 500 x 375 and 2000 x 1500 (quality 90) and as transparent PNGs. A turn is an epoch; the first, in which caches
are filled, is not counted. `bytes` is ours as a GPU gets it: channels_last, and not normalised before it is there. timm
has its loader's defaults but for the colour jitter, which nobody else does here. Large JPEGs have crops of 35 to 100 %,
and shrink with them (augment.shrink) where they are cached. The process keeps freed memory (bench/freed_memory.py),
so that page faults do not hide the rest; all sides gain from it.
"""

import functools
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from bench.freed_memory import keep_freed_memory
from bench.loader import read_arguments
from bench.measure import OUT, Comparison, run_bench
from data.cache.size import shortest_px_for
from data.device_augment import training_views
from data.image_data import ImageData, load_collection
from data.images import open_images
from data.loader import no_fields
from models.normalise import Normalise

BATCH = 16 if "quick" in sys.argv else 128
SIZE_PX = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFF, L1, L2 = {"memory_gib": 0}, {"memory_gib": 4}, {"memory_gib": 0, "disk_gib": 4}


def write_images(folder, count, size, form):
    """Write `count` crops of photographs, mirrored at their edges where they are too small, in one class folder."""
    draws, (width, height) = np.random.default_rng(0), size
    photos = [np.pad(photo, ((0, 1500), (0, 2000), (0, 0)), mode="symmetric") for photo in load_sample_images().images]
    for number in range(count):
        top, left = draws.integers(0, 400, 2)
        picture = Image.fromarray(photos[number % 2][top : top + height, left : left + width])
        if form == "png":
            mask = Image.new("L", size)
            ImageDraw.Draw(mask).ellipse((0, 0, *size), fill=255)
            picture.putalpha(mask)
        file = folder / f"x/{number:04d}.{form}"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, quality=90)


class Ours:
    """The training stream of a folder, behind a cache or none."""

    def __init__(self, folder, cache, batches, *more, crops="[0.08,1.0]", channels_last=False):
        words = [f"data.root={folder}", "data.validation_fraction=0", f"data.cache.folder={folder}-cache", *more]
        words += ["augment=light", "augment.interpolation=bilinear", f"augment.image_size_hw=[{SIZE_PX},{SIZE_PX}]"]
        words.append(f"augment.crop_scale={crops}")
        config, _, _ = read_arguments([*words, *(f"data.cache.{key}={value}" for key, value in cache.items())])
        machine = SimpleNamespace(
            device=torch.device("cpu"), channels_last=channels_last, workers=0, prefetch_batches=2
        )
        collection, shortest_px = load_collection(config.data), shortest_px_for(config.augment)
        source = open_images(collection, config.data, 3, "white", shortest_px=shortest_px, repeats=True)
        data = ImageData(collection, source, machine, seed=0, batch_size=BATCH, run_path=None)
        loader = data.train(collection.rows("train"), no_fields, training_views(config.augment))
        plan = SimpleNamespace(world_size=1, global_batch_size=BATCH, micro_batch_size=BATCH, accum_steps=1)
        self._steps, self._batches, self._normalise = loader.steps(0, plan), batches, Normalise(MEAN, STD, 3)

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
    for name, of in (("WebDataset", webdataset), ("datasets", datasets), ("MosaicML", mosaicml), ("DALI", dali)):
        with suppress(ImportError):
            sides[name] = of(folder, steps)
    return {name: functools.partial(read_all, batches) for name, batches in sides.items()}


def webdataset(folder, steps):
    """Return WebDataset's batches of a shard."""
    from webdataset import TarWriter, WebDataset

    shard = folder.with_suffix(".tar")
    with TarWriter(str(shard)) as writer:
        for file in sorted(folder.glob("x/*")):
            writer.write({"__key__": file.stem, "jpg": file.read_bytes()})
    stream = WebDataset(str(shard), shardshuffle=False).shuffle(1000).decode("pil").to_tuple("jpg")
    return DataLoader(stream.map_tuple(steps).batched(BATCH), batch_size=None)


def datasets(folder, steps):
    """Return batches of the files by Hugging Face's datasets."""
    from datasets import Dataset, Image

    files = Dataset.from_dict({"image": [str(file) for file in sorted(folder.glob("x/*"))]})
    return stacked(files.cast_column("image", Image()), steps, shuffle=True)


def mosaicml(folder, steps):
    """Return MosaicML Streaming's batches of a shard."""
    from streaming import MDSWriter, StreamingDataset

    shard = folder.with_suffix(".mds")
    with MDSWriter(out=str(shard), columns={"image": "jpeg"}) as writer:
        for file in sorted(folder.glob("x/*")):
            writer.write({"image": Image.open(file)})
    return stacked(StreamingDataset(local=str(shard), shuffle=True, batch_size=BATCH), steps, shuffle=None)


def stacked(dataset, steps, shuffle):
    """Return batches of a dataset whose rows have an `image` of Pillow."""
    return DataLoader(
        dataset, BATCH, shuffle, collate_fn=lambda rows: [torch.stack([steps(row["image"]) for row in rows])]
    )


def dali(folder, steps):
    """Return NVIDIA DALI's batches, decoded and cropped by its own operations on the CPU."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    @pipeline_def(  # nothing is made between turns
        batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_async=False, exec_pipelined=False
    )
    def images():
        files, _ = fn.readers.file(file_root=str(folder), random_shuffle=True, name="files")
        crops = fn.decoders.image_random_crop(files, random_area=(0.08, 1.0), random_aspect_ratio=(3 / 4, 4 / 3))
        small = fn.resize(crops, size=(SIZE_PX, SIZE_PX), interp_type=types.INTERP_LINEAR, antialias=True)
        mean, std = ([255 * value for value in values] for values in (MEAN, STD))
        return fn.crop_mirror_normalize(small, mean=mean, std=std, mirror=fn.random.coin_flip())

    return DALIGenericIterator(
        images(), [0], reader_name="files", auto_reset=True, last_batch_policy=LastBatchPolicy.PARTIAL
    )


def read_all(batches):
    """Read all batches."""
    for _ in batches:
        pass


def comparisons(device, quick):
    """Yield all comparisons."""
    torch.set_num_threads(1)
    keep_freed_memory()
    count, large = (BATCH, BATCH) if quick else (4 * BATCH, BATCH)
    out = OUT / ("quick/loader_rivals" if quick else "loader_rivals")
    shutil.rmtree(out, ignore_errors=True)
    jpegs, photos, arts = out / "jpegs", out / "photos", out / "arts"
    write_images(jpegs, count, (500, 375), "jpg")
    write_images(photos, large, (2000, 1500), "jpg")
    write_images(arts, large, (800, 600), "png")
    rivals, batches = theirs(jpegs), count // BATCH
    for name, cache in (("no cache", OFF), ("L2", L2), ("L1", L1)):
        others = rivals if cache is OFF else {"torchvision": rivals["torchvision"]}
        floats = Ours(jpegs, cache, batches)
        as_bytes = Ours(jpegs, cache, batches, channels_last=True).read_bytes
        for ours in ({f"ours, {name}": floats}, {f"bytes, {name}": as_bytes}):
            yield Comparison("JPEGs of 500 x 375", {**ours, **others}, count, warmup=2)
    crops, shrink = "[0.35,1.0]", "augment.shrink=true"
    sides = {
        "ours, L2": Ours(photos, L2, large // BATCH, shrink, crops=crops),
        "ours, decoding": Ours(photos, OFF, large // BATCH, crops=crops),
        "ours, decoding and shrinking": Ours(photos, OFF, large // BATCH, shrink, crops=crops),
    }
    yield Comparison("JPEGs of 2000 x 1500", sides, large, warmup=2)
    sides = {"ours, L1": Ours(arts, L1, large // BATCH), "ours, decoding": Ours(arts, OFF, large // BATCH)}
    yield Comparison("transparent PNGs of 800 x 600", sides, large, warmup=2)


if __name__ == "__main__":
    run_bench(comparisons, turns=9)
