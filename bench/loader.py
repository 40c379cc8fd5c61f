"""What the loader gives on this machine with this collection, and the settings to use.

python bench/loader.py data.root=PATH [data=image_folder|glyphs] [augment=light] [seconds=90] [any key of train.py]

Four measurements, all with the readers of training, in turns (each turn opens its stream anew, warms it up, and then
counts for the same time): the parts of an image's way, in one process; reading alone, by workers, augment.on_device
and batch size; reading for training steps of the configured network, which decides, because on a CPU workers take the
cores that training needs; and by prefetch, for training steps with the workers that are advised. Figures are medians,
with the least and the greatest.
seconds: of all turns together; slow images take longer, since each turn reads some batches. `quick` measures next to
nothing, for the tests.
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from bench.measure import OUT, describe_machine, take_turns
from bench.training_step import TrainingStep, synchronise
from data.batch import collate
from data.config import AugmentConfig
from data.decode import UnreadableImage, decode_image, read_file
from data.device_augment import DeviceAugment, training_views
from data.image_data import ImageData, load_collection
from data.source import IMAGE, ImageFiles
from data.stream import Draw, ShuffledSampler
from data.transforms import CropTransform, TrainTransform
from engine.runtime import choose_runtime
from engine.tasks.image_pipeline import no_fields
from train import TrainConfig
from utils import rng
from utils.config.entry_point import CONF, ROOT, quote_paths, validate
from utils.config.messages import ConfigError, hydra_problem
from utils.config.schema import path_keys
from utils.errors import EXIT_USER_ERROR, UserError
from utils.ranks.processes import count_cores
from utils.record.logging import setup_logging
from utils.text_table import align_columns

SECONDS, QUICK_SECONDS = 90.0, 3.0
# Of the seconds.
_PARTS_SHARE, _READ_SHARE, _STEP_SHARE, _PREFETCH_SHARE = 0.1, 0.25, 0.45, 0.2
_NEAR = 0.95  # of the best: a simpler setting is taken
_PREFETCH = (1, 2, 4, 8)
_PARTS_IMAGES, _PARTS_BYTES = 48, 3 * 10**8  # decoded images of the first measurement


_HEAD = ("measured", "workers", "prefetch", "batch", "on_device", "images/s", "least to greatest")
IN_WORKER = ("read", "decode", "augment in the worker", "collate")


class Setting(NamedTuple):
    """What is varied. batch_size: of a micro-batch."""

    on_device: bool
    workers: int
    prefetch: int
    batch_size: int


# ----------------------------------------------------------------------------------------------------- the command line


def read_arguments(words):
    """Return the configuration of train.py, the seconds, and whether this is a quick run."""
    quick, seconds, overrides = "quick" in words, None, []
    for word in words:
        key, _, value = word.partition("=")
        if key == "seconds":
            seconds = read_seconds(value)
        elif word != "quick":
            overrides.append(word)
    if any(word.startswith("data.root=") for word in overrides) and not any(w.startswith("data=") for w in overrides):
        overrides.insert(0, "data=image_folder")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            values = compose("train", overrides=quote_paths(overrides, path_keys(TrainConfig), multirun=False))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError([hydra_problem(error, TrainConfig, CONF)]) from None
    return validate(values, TrainConfig), seconds or (QUICK_SECONDS if quick else SECONDS), quick


def read_seconds(text):
    """Return the seconds that a user gave."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 3600:
        raise UserError(f"seconds: {text!r}; give the seconds of all turns together, 1 to 3600, such as seconds=60")
    return seconds


# ------------------------------------------------------------------------------------------------------------- the data


class Collection:
    """The collection's training streams, with and without augmentation on the device."""

    def __init__(self, config, device):
        self.config = config
        self.machine = SimpleNamespace(device=device, workers=0, prefetch_batches=1)  # each turn sets its own
        collection = load_collection(config.data)
        self.source = ImageFiles(collection, config.model.in_channels, config.data.max_pixels)
        self.data = ImageData(collection, self.source, self.machine, seed=config.seed, batch_size=1, run_path=None)
        self.rows = self.data.collection.rows("train")
        self.loaders = {choice: self._loader(choice) for choice in self.choices()}
        self._step = 0  # turns read on where the last one stopped

    def choices(self):
        """Return the values of augment.on_device that can be measured."""
        return (False, True) if self.config.augment.rand_augment is None else (False,)

    def augment(self, on_device):
        """Return the augmentation with or without a part on the device."""
        return AugmentConfig.model_validate(self.config.augment.model_dump() | {"on_device": on_device})

    def _loader(self, on_device):
        return self.data.train(self.rows, no_fields, training_views(self.augment(on_device)))

    def batches(self, setting):
        """Yield batches of a setting without an end."""
        self.machine.workers, self.machine.prefetch_batches = setting.workers, setting.prefetch
        size = setting.batch_size
        plan = SimpleNamespace(world_size=1, global_batch_size=size, micro_batch_size=size, accum_steps=1)
        for (batch,) in self.loaders[setting.on_device].steps(self._step, plan):
            self._step += 1
            yield batch


def take_samples(collection, most):
    """Return (draw, bytes, decoded image) of up to `most` readable images, at most _PARTS_BYTES of them."""
    config, source = collection.config, collection.source
    sampler, found = ShuffledSampler(collection.rows, config.seed), []
    for position in range(sampler.epoch_length):
        draw = Draw(position, sampler.at(position)[0], rng.sample_key(config.seed, position))
        try:
            found.append((draw, read_file(source.file_of(draw.index)), source.read(draw.index)[IMAGE]))
        except UnreadableImage:
            continue
        if len(found) == most or sum(image.numel() for _, _, image in found) > _PARTS_BYTES:
            break
    if not found:
        raise UserError("data.root: no training image of the collection can be read; see data.max_pixels")
    return found


def measure_parts(collection, seconds, quick):
    """Return milliseconds per image of each part of an image's way in one process, as take_turns gives them."""
    config, device, threads = collection.config, collection.machine.device, torch.get_num_threads()
    source = collection.source
    samples = take_samples(collection, 4 if quick else _PARTS_IMAGES)
    crop = CropTransform(config.augment)
    views = {
        "read": lambda draw, content, image: read_file(source.file_of(draw.index)),
        "decode": lambda draw, content, image: decode_image(content, "", source.channels, source.max_pixels),
        "crop and resize": lambda draw, content, image: crop(image, draw),
        "augment in the worker": seeded(TrainTransform(config.augment)),
    }
    sides = {name: over_all(part, samples) for name, part in views.items()}
    crops = torch.stack([crop(image, draw) for draw, _, image in samples])
    sides["collate"] = lambda: collate([{"images": one} for one in crops])
    if True in collection.choices():
        augment = DeviceAugment(collection.augment(True))
        sides["draw for the device"] = over_all(seeded(augment), samples)
        batch = {
            "images": crops.to(device),
            "key": torch.tensor([draw.key for draw, _, _ in samples], device=device),
            "augment": torch.stack([augment(image, draw) for draw, _, image in samples]).to(device),
        }
        sides["the rest on the device"] = with_threads(threads, lambda: augment.on_device(batch))
    torch.set_num_threads(1)  # as in a worker
    started = time.perf_counter()
    take_turns(sides, steps=len(samples), warmup=1, turns=0, device=device)
    turns = 2 if quick else max(3, min(25, int(seconds / (time.perf_counter() - started))))
    found = take_turns(sides, steps=len(samples), warmup=0, turns=turns, device=device)
    torch.set_num_threads(threads)
    return found


def with_threads(count, part):
    """Return a turn that computes with `count` threads and leaves one."""

    def turn():
        torch.set_num_threads(count)
        part()
        torch.set_num_threads(1)

    return turn


def seeded(view):
    """Return a view as the reader calls it: seeded with the sample's key."""

    def part(draw, content, image):
        with rng.seeded(draw.key):
            view(image, draw)

    return part


def over_all(part, samples):
    """Return a turn: the part for each of the samples."""

    def turn():
        for sample in samples:
            part(*sample)

    return turn


# ------------------------------------------------------------------------------------------------------------ the turns


def fitting_batch(most, per_image_sec, seconds):
    """Return `most` or a half, a quarter .. of it, 4 at least: a batch size of which some fit into `seconds`."""
    while most > 4 and 5 * most * per_image_sec > seconds:
        most //= 2
    return most


def other_sizes(size):
    """Return half and twice a batch size; half of one is none."""
    return [other for other in (size // 2, 2 * size) if other > 0]


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


def measure_settings(collection, settings, seconds, turns, step=lambda batch: None):
    """Return images per second of each setting and turn, within `seconds` in all."""
    each = seconds / (1.4 * turns * len(settings))
    found = {setting: [] for setting in settings}
    for _ in range(turns):
        for setting in settings:
            batches = collection.batches(setting)
            found[setting].append(images_per_sec(batches, step, setting, each, collection.machine.device))
            batches.close()
    return found


# ----------------------------------------------------------------------------------------------------------- the report


def choose(found):
    """Return the simplest setting (workers only on the host, few, little prefetch) that is near the best.

    Near: a median of at least _NEAR of the best's, or a turn that reached the best's median.
    """
    medians = {setting: statistics.median(rates) for setting, rates in found.items()}
    best = max(medians.values())
    return next(one for one in sorted(found) if medians[one] >= _NEAR * best or max(found[one]) >= best)


def rows_of(what, found):
    """Return the rows of a measurement's table."""
    return [
        (
            what, str(setting.workers), str(setting.prefetch) if setting.workers else "-", str(setting.batch_size),
            str(setting.on_device).lower(), f"{statistics.median(rates):,.0f}",
            f"{min(rates):,.0f} to {max(rates):,.0f}",
        )
        for setting, rates in found.items()
    ]  # fmt: skip


def parts_table(parts):
    """Return the table of an image's parts, and their shares of a worker's time."""
    medians = {name: statistics.median(values) for name, values in parts.items()}
    rows = [("part", "ms per image", "least to greatest")]
    rows += [(name, f"{medians[name]:.3f}", f"{min(v):.3f} to {max(v):.3f}") for name, v in parts.items()]
    total = sum(medians[name] for name in IN_WORKER)
    shares = ", ".join(f"{name} {100 * medians[name] / total:.0f} %" for name in IN_WORKER)
    return f"{align_columns(rows)}\nof {total:.2f} ms in a worker: {shares}"


def list_workers(quick):
    """Return the numbers of workers to try: 0, 1, 2, 4 .. and the cores."""
    cores = count_cores()
    doubled = [0, *(2**power for power in range(cores.bit_length()) if 2**power <= cores), cores]
    return sorted(set(doubled))[: 2 if quick else None]


def explain(config, runtime, chosen, reading, training, without):
    """Return why a setting is advised, as one sentence or two."""
    rates = {setting: statistics.median(values) for setting, values in training.items()}
    best = max(rates, key=rates.get)
    text = (
        f"why: training steps of {config.model.name} on {runtime.device.type} get {rates[chosen]:,.0f} images/s with "
        f"it and {rates[best]:,.0f} with the best setting; the network alone takes {without:,.0f}, and reading alone "
        f"gives up to {max(statistics.median(values) for values in reading.values()):,.0f}."
    )
    if chosen != best:
        text += " Of settings that differ by less than the turns do, the simplest is taken."
    if rates[chosen] > _NEAR * without:
        text += " The network is the limit, not the loader."
    if config.runtime.compile is True or (config.runtime.compile == "auto" and runtime.device.type == "cuda"):
        text += " Its steps here are eager; a compiled run needs more images per second."
    return text


def measure_reading(collection, settings, image_sec, seconds, turns):
    """Return images per second of reading alone: the settings, and with most workers half and twice the batch size.

    image_sec: of one image in a worker. Slow images are read in smaller batches, so that a turn has some.
    """
    each = seconds / (1.4 * turns * (len(settings) + 2))
    size = fitting_batch(settings[0].batch_size, image_sec, each)
    fit = [setting._replace(batch_size=size) for setting in settings]
    many = fit[-1]._replace(on_device=False)
    sizes = [many._replace(batch_size=other) for other in other_sizes(size)]
    return measure_settings(collection, fit + sizes, seconds, turns)


def measure(config, seconds, quick):
    """Measure, print and write the figures of a configuration."""
    runtime, turns = choose_runtime(config.runtime), 1 if quick else 3
    collection = Collection(config, runtime.device)
    parts = measure_parts(collection, _PARTS_SHARE * seconds, quick)
    say(parts_table(parts))

    most = min(config.loop.batch_size, config.loop.global_batch_size)
    usual = Setting(False, 0, config.runtime.prefetch_batches, most)
    settings = [
        usual._replace(on_device=choice, workers=count)
        for choice in collection.choices()
        for count in list_workers(quick)
    ]
    image_sec = 1e-3 * sum(statistics.median(parts[name]) for name in IN_WORKER)
    reading = measure_reading(collection, settings, image_sec, _READ_SHARE * seconds, turns)
    say(align_columns([_HEAD, *rows_of("reading alone", reading)]))

    step = TrainingStep(config, runtime)
    each = _STEP_SHARE * seconds / (1.4 * turns * len(settings) + 1)
    size = step.fitting_batch(most, each)
    alone = usual._replace(batch_size=size)
    same = itertools.repeat(next(collection.batches(alone)))
    alone = images_per_sec(same, step, alone, each, runtime.device)
    fit = [setting._replace(batch_size=size) for setting in settings]
    training = measure_settings(collection, fit, _STEP_SHARE * seconds - each, turns, step)
    say(align_columns([_HEAD, *rows_of("training step", training)]))
    if len(collection.choices()) == 1:
        say("augment.on_device=true was not measured: augment.rand_augment runs in the workers")

    chosen, prefetch = choose(training), {}
    if chosen.workers:  # without them nothing is read ahead
        others = [chosen._replace(prefetch=count) for count in (_PREFETCH[:1] if quick else _PREFETCH)]
        prefetch = measure_settings(collection, others, _PREFETCH_SHARE * seconds, turns, step)
        say(align_columns([_HEAD, *rows_of("training step", prefetch)]))
    advised = {
        "runtime.workers": chosen.workers,
        "runtime.prefetch_batches": choose(prefetch).prefetch if prefetch else usual.prefetch,
        "augment.on_device": str(chosen.on_device).lower(),
    }
    found = {"reading": reading, "training": training, "prefetch": prefetch}
    write(parts, found, advised, machine=describe_machine(runtime.device), quick=quick)
    say(explain(config, runtime, chosen, reading, training, alone))
    say(" ".join(f"{key}={value}" for key, value in advised.items()))


def write(parts, found, advised, **more):
    """Write all turns to outputs/bench/loader.json; a quick run's to quick/."""
    path = (OUT / "quick" if more["quick"] else OUT) / "loader.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rates = {
        name: [{**setting._asdict(), "images_per_sec": values} for setting, values in measured.items()]
        for name, measured in found.items()
    }
    path.write_text(json.dumps({**more, "advised": advised, "ms_per_image": parts, **rates}, indent=2) + "\n")
    say(str(path.relative_to(ROOT)))


def say(text):
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main():
    setup_logging()
    try:
        measure(*read_arguments(sys.argv[1:]))
    except UserError as error:
        sys.stderr.write(f"bench/loader.py: {error}\n")
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
