"""Measurements of a collection and a machine, which the rules of `loop.minutes` need (engine/recipe/rules.py)."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from timeit import timeit
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment.config import AugmentConfig
from data.augment.steps import IMAGES, training_views
from data.collection.choose import training_rows
from data.collection.collection import Collection
from data.open import open_images
from data.stream.source import IMAGE, UnreadableImage
from data.validity.shortcuts import DETAIL
from engine.frozen.choose import open_frozen_timm
from engine.frozen.features import read_features
from engine.likeness import compare_mirrored, tells_colour
from engine.run.timing import time_update
from engine.tasks.classification import count_head_images, freeze_first
from engine.tasks.config import ImageTrainingConfig
from engine.update.runtime import Runtime
from models.build import build_network
from models.config import ModelConfig, Pretrained, timm_config
from models.weights.offers import NETWORKS, list_weights
from optim.linear import count_right
from utils.errors import UserError
from utils.hardware import has_fast_bf16
from utils.io.files import Json
from utils.ranks import distributed
from utils.record.logging import log
from utils.start import STARTED

UNIT_PX = 64  # of costs
SHRINK = 2  # as a multiple of the size in training: larger images are reduced when they are decoded
_DETAIL_PX = 512  # if fine detail tells the class
_SAMPLE = 1000  # images, which are decoded
_SAMPLE_SHARE = 0.025  # of the minutes, at most, is for decoding the sample
MIRRORS = 0.85  # train on mirrored images if mirroring keeps this share of the nearest neighbours' accuracy
CROPS = 0.6  # below it, the place and the size of a figure tell its class, too
_OF_A_CLASS = 8  # images, at least, if the largest classes have as many
_SMALL_PX = 16  # side of small pictures, in which images are compared
_FINE = 600  # images for features
_LEAST_FINE = 50  # with fewer, features are not compared
_FETCH_SHARE = 0.1  # of the minutes, at most, is for fetching weights
_PROBE_SHARE = 0.12  # of the minutes, at most, is for features of weights
_SEEN_SHARE = 0.75  # of the minutes, at most, is for `seen_epochs` of a pretrained network
_FETCHED_SHARE = 0.25  # as much of a network that is fetched
_PROMISE = 0.9  # begin from features that leave at most this share of the errors by small pictures
_PROMISE_OF_SURFACES = 0.5  # the same if the mean colour tells nothing, as of surfaces, which a network learns itself
_FINE_BATCH = 32
_OWN_BATCH = 8  # of timing the user's network
POLICY = "rand-m9-mstd0.5-inc1"  # of RandAugment
_CHANGED = 32  # images, of timing it
_EXACT = "runtime.precision=fp32 runtime.channels_last=true"
_SHARE = 0.85  # of the minutes is training; the rest is the start, evaluation and files


class Network(NamedTuple):
    """A network of timm. cost: of reading and training an image of 64 px, relative to the reference.

    row: of networks.yaml, with its name. runtime: words for the machine with which it trains fastest, if not the
    usual ones. timed: the costs of images of other sides, as far as they were measured.
    """

    row: Json
    cost: float
    is_pretrained: bool = False
    runtime: str = ""
    timed: Mapping[int, float] = {}

    def cost_at(self, side: int) -> float:
        """Return the cost of an image of a side."""
        return self.timed.get(side, self.cost * cost_of_px(side))


@dataclass(frozen=True)
class Measurements:
    """What the rules know.

    images, validation: the numbers of training and validation images. side_px: the median of the longer sides of a
    sample, whose shorter sides are reduced to 2 `most_px` + 1. most_px: the largest side of a training image.
    has_classes: whether images have one class, not tags; with tags, mirrors and colours are unknown. mirrors: the share
    of the accuracy of nearest neighbours that mirrored images keep. border: the grey level of the upper borders of
    images. colours: whether the mean colour tells something of the class. grey: whether no image has a colour. detail:
    whether fine detail of large images tells the class.
    reference: how many images a network of cost 1 trains on in the minutes; step_sec: the time of one. bf16: whether
    the machine multiplies bf16 fast, which Muon needs. machine: its row of networks.yaml. networks: the user's, or the
    pretrained network whose features tell most of the class, if the features tell clearly more than small pictures, or
    those from random weights. policy: the cost of an image with `POLICY` for all loader workers, as that of a network;
    0 without them.
    """

    images: int
    side_px: int
    most_px: int
    has_classes: bool
    validation: int
    border: int
    grey: bool
    reference: float
    step_sec: float
    bf16: bool
    machine: Json
    networks: Sequence[Network] = tuple(Network(row, row["cost"]) for row in NETWORKS["scratch"])
    mirrors: float = 1.0
    colours: bool = True
    detail: bool = False
    policy: float = 0.0


def cost_of_px(side: int) -> float:
    """Return the cost of an image of a side, relative to one of `UNIT_PX`."""
    return (side / UNIT_PX) ** 2


class Sample(NamedTuple):
    """Some training images: their rows, their classes, and small pictures of them, float32 [N, 3, 16, 16]."""

    rows: np.ndarray
    small: Tensor
    labels: Tensor | None
    side_px: int  # the median of the longer sides
    read_sec: float  # of an image


def draw_sample(
    config: ImageTrainingConfig, collection: Collection, rows: np.ndarray, labels: np.ndarray | None, most_px: int
) -> Sample:
    """Read some of the rows. labels: the class of each row of the collection; None: tags.

    Raises UserError (`data.root`) if no image can be read.
    """
    source = open_images(collection, config.data, {"channels": 3, "shortest_px": SHRINK * most_px + 1})
    started = time.monotonic()
    kept = []
    small = []
    sides = []
    rows = np.random.default_rng(0).permutation(rows)
    if labels is not None:  # of the largest classes, so that most images have others of their class
        largest = np.argsort(-np.bincount(labels[rows]), kind="stable")[: _SAMPLE // _OF_A_CLASS]
        rows = rows[np.isin(labels[rows], largest)]
    for row in rows[:_SAMPLE].tolist():
        with suppress(UnreadableImage):
            image = source.read(row)[IMAGE].float()
            small.append(F.adaptive_avg_pool2d(image, _SMALL_PX))
            sides.append(max(image.shape[-2:]))
            kept.append(row)
        if time.monotonic() > started + _SAMPLE_SHARE * 60 * config.loop.minutes:
            break
    if not kept:
        raise UserError(f"data.root: no training image of {str(collection.root)!r} can be read")
    read_sec = (time.monotonic() - started) / len(kept)
    classes = None if labels is None else torch.from_numpy(labels[kept])
    return Sample(np.array(kept), torch.stack(small), classes, int(np.median(sides)), read_sec)


def measure(
    configs: Sequence[ImageTrainingConfig],
    collection: Collection,
    labels: np.ndarray | None,
    runtime: Runtime,
    pretrained: Pretrained | None,
) -> Iterator[Measurements]:
    """Yield what is known of a collection and a machine for each of some configurations, which differ by their minutes.

    The first takes a few seconds. labels: the class of each row of the collection, negative for none; None: it has
    tags. pretrained: whose weights may be used; None: the network is the user's choice, with its initial weights.
    """
    config = configs[0]
    machine = NETWORKS["machines"][runtime.device.type]
    rows = training_rows(collection, config.loop, None if labels is None else labels >= 0)
    detail = any(finding[:2] == DETAIL[:2] for finding in collection.findings)
    most_px = max(_DETAIL_PX if detail else machine["most_px"], *config.augment.image_size_hw)
    sample = draw_sample(config, collection, rows, labels, most_px)
    step_sec = time_row(machine, machine["px"], runtime) / machine["cost"] / cost_of_px(machine["px"])
    mirrors = 1.0
    colours = True
    if labels is not None:
        mirrors = compare_mirrored(sample.small, sample.labels)
        colours = tells_colour(sample.small, sample.labels)
    border = round(sample.small[:, :, 0].median().item())
    is_grey = bool((sample.small == sample.small[:, :1]).all())
    bf16 = has_fast_bf16(runtime.device.type)
    validation = len(collection.rows("val"))
    policy = time_policy(config.augment, sample.side_px, runtime.workers) / step_sec
    found = Measurements(
        images=len(rows),
        validation=validation,
        side_px=sample.side_px,
        most_px=most_px,
        has_classes=labels is not None,
        mirrors=mirrors,
        border=border,
        colours=colours,
        grey=is_grey,
        reference=0.0,
        step_sec=step_sec,
        bf16=bf16,
        detail=detail,
        machine=machine,
        policy=policy,
    )
    first_sec = max(sample.read_sec / runtime.workers, step_sec) if runtime.workers else sample.read_sec + step_sec
    for config in configs:
        networks = found.networks
        if pretrained is None:
            side = max(config.augment.image_size_hw)
            own_sec = time_network(config.model, side, _OWN_BATCH, runtime) / cost_of_px(side)
            networks = [Network({"name": config.model.name}, own_sec / step_sec, config.init_from is not None)]
        elif labels is not None and not (is_grey and mirrors < CROPS):  # not letters
            networks = _find_weights(config, collection, sample, runtime, pretrained, found)
        # What is left after what was timed above; after the first epoch the memory cache has all images.
        left_sec = max(_SHARE * 60 * config.loop.minutes - (time.monotonic() - STARTED), 1.0)
        time_of_ranks = left_sec * distributed.planned_world_size()
        after_first = len(rows) + (time_of_ranks - len(rows) * first_sec) / step_sec
        yield replace(found, networks=networks, reference=max(time_of_ranks / first_sec, after_first))


def time_policy(augment: AugmentConfig, side: int, workers: int) -> float:
    """Return the seconds in which all workers make an image of 64 px from one of a side, with `POLICY`; 0 without."""
    if workers == 0:
        return 0.0
    changed = augment.changed({"image_size_hw": [UNIT_PX] * 2, "rand_augment": POLICY, "on_device": False})
    view = training_views(changed)[IMAGES]
    image = torch.randint(256, (len(augment.mean), side, side), dtype=torch.uint8)
    return timeit(lambda: view(image, None), number=_CHANGED) / _CHANGED / workers


def _find_weights(
    config: ImageTrainingConfig,
    collection: Collection,
    sample: Sample,
    runtime: Runtime,
    pretrained: Pretrained,
    found: Measurements,
) -> Sequence[Network]:
    """Return the network of timm whose features tell most of the class, of those whose training fits into the time.

    If none fits, return the smallest of them, for a fitted head alone. Return those from random weights if none leaves
    clearly fewer errors than small pictures, by ridge regressions on other images.
    """
    seconds = 60 * config.loop.minutes
    machine = found.machine
    images = min(found.images, count_head_images(config)) / distributed.planned_world_size()
    seen_sec = found.step_sec * machine["seen_epochs"] * images * cost_of_px(machine["fine_px"])
    most_cost = min(_FETCHED_SHARE * seconds / seen_sec, machine["most_cost"])
    names = list_weights(pretrained, most_cost, _FETCH_SHARE * seconds)
    promising = []
    least = 1.0
    promise = _PROMISE if found.colours else _PROMISE_OF_SURFACES
    deadline = time.monotonic() + _PROBE_SHARE * seconds
    for name in names:
        try:
            frozen = open_frozen_timm(name, runtime)
        except UserError as error:
            log.info("the plan leaves out %s: %s", name, error)
            continue
        features, rows = read_features(frozen, collection, config.data, sample.rows[:_FINE], runtime, deadline)
        if len(rows) < _LEAST_FINE:
            log.info("the plan: the time was over before the features of %s were read", name)
            break
        is_read = np.isin(sample.rows, rows)
        labels = sample.labels[is_read]
        # Ridge regressions on all other images name the class of an image.
        both = features, sample.small[is_read].flatten(1)
        wrong, plain = (1 - count_right(each, labels) / len(labels) for each in both)
        log.info(
            "the plan: without an image, a regression on features of %s errs in %.3f, on small pictures in %.3f",
            name, wrong, plain,
        )  # fmt: skip
        # If the time is over, none is left for random weights, and few images show less of what features tell.
        if wrong < min(least, plain if time.monotonic() > deadline else promise * plain):
            least = 0.95 * wrong  # a larger network must leave clearly fewer errors
            promising.append(name)
    for name in reversed(promising):
        network = _time_pretrained(name, found, runtime)
        if network.cost * seen_sec <= _SEEN_SHARE * seconds:
            break
    return [network] if promising else found.networks


def _time_pretrained(name: str, found: Measurements, runtime: Runtime) -> Network:
    """Return a network, timed on the machine as it is and, on a CPU, in float32.

    Convolutions of single channels are trained slowly in bf16 on CPUs: EfficientNet-Lite0 takes 22 ms in place of 13.
    """
    side = found.machine["fine_px"]
    row = {"name": name, "at_once": _FINE_BATCH} | NETWORKS["weights"].get(name, {})
    timed = {"": time_row(row, side, runtime)}
    if runtime.device.type == "cpu" and runtime.precision == "bf16":
        exact = replace(runtime, precision="fp32", channels_last=True)
        timed[_EXACT] = time_row(row, side, exact)
    words = min(timed, key=timed.__getitem__)
    return Network(row, timed[words] / found.step_sec / cost_of_px(side), is_pretrained=True, runtime=words)


def time_row(row: Json, side: int, runtime: Runtime) -> float:
    """Return the time of `time_network` for a network of networks.yaml, infinite where memory runs out.

    A network with weights has no channels there.
    """
    return time_once(row["name"], tuple(row.get("channels", ())), side, row["at_once"], runtime)


@cache
def time_once(name: str, channels: tuple[int, ...], side: int, images: int, runtime: Runtime) -> float:
    """Return what `time_row` returns, from the second call on without timing."""
    try:
        return time_network(timm_config(name, list(channels) or None), side, images, runtime, freezes=not channels)
    except torch.OutOfMemoryError:
        return torch.inf


def time_network(config: ModelConfig, side: int, batch: int, runtime: Runtime, *, freezes: bool = False) -> float:
    """Return the seconds in which the machine trains a network, or all but its first layers, with one image."""
    layout = torch.channels_last if runtime.channels_last else torch.contiguous_format
    network = build_network(config, num_classes=10, any_size=True).to(runtime.device, memory_format=layout)
    if freezes:
        freeze_first(network)
    images = torch.zeros(batch, config.in_channels, side, side, device=runtime.device).to(memory_format=layout)
    searches = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # it takes seconds for each shape
    seconds = time_update(network, images, runtime)
    torch.backends.cudnn.benchmark = searches
    return seconds / batch
