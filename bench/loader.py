"""What the loader gives on this machine with this collection, and the settings to use.

python bench/loader.py [data.root=PATH] [augment=light] [seconds=90] [any key of train.py]

Two measurements, both with the readers of training, by workers and augment.on_device: reading alone; and reading for
training steps of the configured network, which decides, because on a CPU workers take the cores that training needs.
The settings take turns; each turn opens its stream anew, warms it up, and counts for the same time. Figures are
medians, with the least and the greatest. seconds: of all turns together. `quick` is for the tests.
"""

import itertools
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

import train
from data.augment.config import AugmentConfig
from data.augment.views import training_views
from data.open import Data, load_collection, open_images
from data.stream.loader import no_fields
from engine.update.runtime import choose_runtime
from models.build import build_network, check_image_size
from models.image_model import Normalise
from utils.ranks.processes import count_cores
from utils.record.figures import align_columns

SECONDS, QUICK_SECONDS = 90.0, 3.0
_READ_SHARE, _STEP_SHARE = 0.35, 0.6  # of the seconds
_NEAR = 0.95  # of the best: a simpler setting is taken
_CLASSES = 100
_HEAD = ("measured", "workers", "on_device", "batch", "images/s", "least to greatest")


class Setting(NamedTuple):
    """What is varied, and the size of a micro-batch."""

    on_device: bool
    workers: int
    batch_size: int


class Streams:
    """The collection's training streams, with and without augmentation on the device."""

    def __init__(self, config, runtime):
        self.config = config
        self.machine = SimpleNamespace(
            device=runtime.device, channels_last=runtime.channels_last, workers=0,
            prefetch_batches=runtime.prefetch_batches,
        )  # fmt: skip
        collection = load_collection(config.data)
        self.source = open_images(collection, config.data, {"channels": config.model.in_channels})
        data = Data(collection, self.source, self.machine, seed=config.seed, batch_size=1, run_path=None)
        self.rows = collection.rows("train")
        self.choices = (False, True) if config.augment.rand_augment is None else (False,)
        self._loaders = {
            choice: data.train(self.rows, no_fields, training_views(self.augment(choice))) for choice in self.choices
        }
        self._step = 0  # turns read on where the last one stopped

    def augment(self, on_device):
        """Return the augmentation with or without a part on the device."""
        return AugmentConfig.model_validate(self.config.augment.model_dump() | {"on_device": on_device})

    def batches(self, setting):
        """Yield batches of a setting without an end."""
        self.machine.workers, size = setting.workers, setting.batch_size
        for (batch,) in self._loaders[setting.on_device].steps(self._step, size, size):
            self._step += 1
            yield batch


class TrainingStep:
    """Forward and backward pass and update of the configured network, on labels of no meaning."""

    def __init__(self, config, runtime):
        torch.manual_seed(config.seed)
        augment, self.runtime = config.augment, runtime
        check_image_size(config.model, tuple(augment.image_size_hw))
        self.network = build_network(config.model, _CLASSES).to(runtime.device)
        if runtime.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        self.normalise = Normalise(augment.mean, augment.std, config.model.in_channels).to(runtime.device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-4)

    def __call__(self, batch):
        """Make one update."""
        with self.runtime.autocast():
            loss = F.cross_entropy(self.network(self.normalise(batch["images"])), batch["key"] % _CLASSES)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def images_per_sec(batches, step, setting, seconds, device):
    """Return the images per second of one turn, after a warm-up in which each worker gives its first batch."""
    warm_until, number = time.perf_counter() + 0.3 * seconds, 0
    while number <= setting.workers or time.perf_counter() < warm_until:
        step(next(batches))
        number += 1
    synchronise(device)
    started, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - started < seconds:
        step(next(batches))
        count += 1
    synchronise(device)
    return count * setting.batch_size / (time.perf_counter() - started)


def synchronise(device):
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_settings(streams, settings, seconds, turns, step=lambda batch: None):
    """Return images per second of each setting and turn, within about `seconds` in all."""
    each = seconds / (1.4 * turns * len(settings))
    found = {setting: [] for setting in settings}
    for _ in range(turns):
        for setting in settings:
            batches = streams.batches(setting)
            found[setting].append(images_per_sec(batches, step, setting, each, streams.machine.device))
            batches.close()
    return found


def choose(found):
    """Return the simplest setting (few workers, augmentation on the host) that is near the best.

    Near: a median of at least _NEAR of the best's, or a turn that reached the best's median.
    """
    medians = {setting: statistics.median(rates) for setting, rates in found.items()}
    best = max(medians.values())
    return next(one for one in sorted(found) if medians[one] >= _NEAR * best or max(found[one]) >= best)


def list_workers(quick):
    """Return the numbers of workers to try: 0, 1, 2, 4 .. and the cores."""
    cores = count_cores()
    doubled = [0, *(2**power for power in range(cores.bit_length()) if 2**power <= cores), cores]
    return sorted(set(doubled))[: 2 if quick else None]


def rates_table(what, found):
    """Return the table of a measurement."""
    rows = [
        (what, str(setting.workers), str(setting.on_device).lower(), str(setting.batch_size),
         f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}")
        for setting, rates in found.items()
    ]  # fmt: skip
    return align_columns([_HEAD, *rows])


def measure(config, seconds, quick):
    """Measure, print and write the figures of a configuration."""
    runtime, turns = choose_runtime(config.runtime), 1 if quick else 3
    streams = Streams(config, runtime)
    size = min(config.loop.micro_batch_size, config.loop.batch_size)
    settings = [Setting(choice, count, size) for choice in streams.choices for count in list_workers(quick)]
    reading = measure_settings(streams, settings, _READ_SHARE * seconds, turns)
    print(rates_table("reading alone", reading), flush=True)

    step = TrainingStep(config, runtime)
    training = measure_settings(streams, settings, _STEP_SHARE * seconds, turns, step)
    print(rates_table("training step", training), flush=True)
    same = itertools.repeat(next(streams.batches(settings[0])))
    alone = images_per_sec(same, step, settings[0], 0.05 * seconds, runtime.device)
    chosen = choose(training)
    advised = {"runtime.workers": chosen.workers, "augment.on_device": str(chosen.on_device).lower()}
    rate = statistics.median(training[chosen])
    print(
        f"with the settings advised, training gets {rate:,.0f} images/s; the network alone takes {alone:,.0f}",
        flush=True,
    )
    print(" ".join(f"{key}={value}" for key, value in advised.items()), flush=True)


def main():
    words, quick = sys.argv[1:], "quick" in sys.argv
    seconds = next((word.partition("=")[2] for word in words if word.startswith("seconds=")), None)
    seconds = float(seconds or (QUICK_SECONDS if quick else SECONDS))
    words = [word for word in words if word != "quick" and not word.startswith("seconds=")]
    sys.argv[1:] = words  # what is left is the command line of train.py
    replace(train.main, main=lambda config, job: measure(config, seconds, quick))()


if __name__ == "__main__":
    main()
