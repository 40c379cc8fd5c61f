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
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train
from bench.measure import build_bench_run, read_group
from data.augment.config import AugmentConfig
from data.augment.steps import training_views
from data.load import load_collection
from data.open import Data, open_images
from engine.run.timing import wait_for
from engine.tasks.classification import ClassificationTask
from engine.tasks.config import ClassificationTaskConfig
from engine.tasks.kind import Setup
from engine.update.runtime import choose_runtime
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
    """The collection's training streams."""

    def __init__(self, config, runtime):
        self.config = config
        self.runtime = runtime
        self.collection = load_collection(config.data)
        self.source = open_images(self.collection, config.data, {"channels": config.model.in_channels})
        self._step = 0  # turns read on where the last one stopped

    def batches(self, setting):
        """Yield batches of a setting without an end."""
        config = self.config
        machine = replace(self.runtime, workers=setting.workers)
        augment = AugmentConfig.model_validate(config.augment.model_dump() | {"on_device": setting.on_device})
        data = Data(self.collection, self.source, machine, seed=config.seed, batch_size=1, run_path=None)
        stream = data.train(self.collection.rows("train"), label_at_random, training_views(augment))
        size = setting.batch_size
        for (batch,) in stream.steps(self._step, size, size):
            self._step += 1
            yield stream.prepare(batch)


def build_step(config, batch_size):
    """Return the update of a classifier with the configured network, on labels of no meaning."""
    preprocessing = config.augment.preprocessing(config.model.in_channels)
    facts = {"class_names": [str(number) for number in range(_CLASSES)]}
    task = read_group(ClassificationTaskConfig, "task", "classification")
    task = ClassificationTask(Setup(config.model, task, preprocessing, facts))
    run = build_bench_run(task, batch_size=batch_size, runtime=config.runtime.model_dump())
    return lambda batch: run.learner.update([batch])


def label_at_random(example):
    """Return the label of a sample."""
    return {"labels": torch.tensor(example.draw.key % _CLASSES)}


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
            found[setting].append(images_per_sec(batches, step, setting, each, streams.runtime.device))
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
    step = build_step(config, size)
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
