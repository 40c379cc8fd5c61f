"""What the loader gives on this machine with this collection, and the settings to use.

python bench/loader.py [data.root=PATH] [augment=light] [seconds=90] [any key of train.py]

The readers of training read for training steps of the configured network, by workers and augment.on_device: on a CPU
workers take the cores that training needs. The settings take turns; each turn opens its stream anew, warms it up, and
counts for the same time. Figures are medians, with the least and the greatest. seconds: of all turns together. `quick`
is for the tests.
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
from engine.run.length import wait_for
from engine.update.runtime import choose_runtime
from models.build import build_network, check_image_size
from models.image_model import Normalise
from utils.ranks.processes import count_cores
from utils.record.figures import align_columns

SECONDS = 90.0
QUICK_SECONDS = 3.0
_STEP_SHARE = 0.95  # of the seconds
_NEAR = 0.95  # of the best: a simpler setting is taken
_CLASSES = 100
_HEAD = ("workers", "on_device", "batch", "images/s", "least to greatest")


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
        self._loaders = {
            choice: data.train(self.rows, no_fields, training_views(self.augment(choice))) for choice in (False, True)
        }
        self._step = 0  # turns read on where the last one stopped

    def augment(self, on_device):
        """Return the augmentation with or without a part on the device."""
        return AugmentConfig.model_validate(self.config.augment.model_dump() | {"on_device": on_device})

    def batches(self, setting):
        """Yield batches of a setting without an end."""
        self.machine.workers = setting.workers
        size = setting.batch_size
        stream = self._loaders[setting.on_device]
        for (batch,) in stream.steps(self._step, size, size):
            self._step += 1
            yield stream.prepare(batch)


class TrainingStep:
    """Forward and backward pass and update of the configured network, on labels of no meaning."""

    def __init__(self, config, runtime):
        torch.manual_seed(config.seed)
        augment = config.augment
        self.runtime = runtime
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
    warm_until = time.perf_counter() + 0.3 * seconds
    number = 0
    while number <= setting.workers or time.perf_counter() < warm_until:
        step(next(batches))
        number += 1
    wait_for(device)
    started = time.perf_counter()
    count = 0
    while count == 0 or time.perf_counter() - started < seconds:
        step(next(batches))
        count += 1
    wait_for(device)
    return count * setting.batch_size / (time.perf_counter() - started)


def measure_settings(streams, settings, seconds, turns, step):
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
    doubled = [2**power for power in range(cores.bit_length())]
    return sorted({0, *doubled, cores})[: 2 if quick else None]


def rates_table(found):
    """Return the table of a measurement."""
    rows = [_HEAD]
    for setting, rates in found.items():
        values = str(setting.workers), str(setting.on_device).lower(), str(setting.batch_size)
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        rows.append((*values, f"{statistics.median(rates):,.0f}", spread))
    return align_columns(rows)


def measure(config, seconds, quick):
    """Measure, print and write the figures of a configuration."""
    runtime = choose_runtime(config.runtime)
    turns = 1 if quick else 3
    streams = Streams(config, runtime)
    size = min(config.loop.micro_batch_size, config.loop.batch_size)
    settings = [Setting(choice, count, size) for choice in (False, True) for count in list_workers(quick)]
    step = TrainingStep(config, runtime)
    training = measure_settings(streams, settings, _STEP_SHARE * seconds, turns, step)
    print(rates_table(training), flush=True)
    same = itertools.repeat(next(streams.batches(settings[0])))
    alone = images_per_sec(same, step, settings[0], 0.05 * seconds, runtime.device)
    chosen = choose(training)
    rate = statistics.median(training[chosen])
    print(f"with the settings advised, training gets {rate:,.0f} images/s; the network alone takes {alone:,.0f}")
    print(f"runtime.workers={chosen.workers} augment.on_device={str(chosen.on_device).lower()}", flush=True)


def main():
    quick = "quick" in sys.argv
    seconds = QUICK_SECONDS if quick else SECONDS
    words = []  # of train.py
    for word in sys.argv[1:]:
        if word.startswith("seconds="):
            seconds = float(word.removeprefix("seconds="))
        elif word != "quick":
            words.append(word)
    sys.argv[1:] = words
    replace(train.main, main=lambda config, job: measure(config, seconds, quick))()


if __name__ == "__main__":
    main()
