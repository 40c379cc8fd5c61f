"""The recipe of `train.py loop.minutes=N`: a table of rules over what was measured of collection, machine and time.

A rule sets keys for which the command has no word. Each stands on a measurement (docs/results.md#by-minutes). The
words that the rules choose are kept in minutes.json, so that a resumed run has the same recipe on any machine.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from engine.recipe.measurements import (
    CROPS,
    MIRRORS,
    POLICY,
    SHRINK,
    UNIT_PX,
    Measurements,
    Network,
    cost_of_px,
    measure,
    time_once,
    time_row,
)
from engine.run.pace import EVALUATED, LEAST_UPDATES, UPDATE, read_minutes
from engine.tasks.change import AnyConfig, Start
from engine.tasks.classification import count_head_images
from engine.tasks.config import ImageTrainingConfig
from engine.tasks.kind import Kind
from engine.update.runtime import Runtime
from utils.config.entry_point import recompose
from utils.io.safe_text import Lines
from utils.ranks import distributed
from utils.record.figures import show_lines
from utils.record.logging import log
from utils.record.run_folder import default_run_dir

_REFERENCE_IMAGES = 400_000  # with about this many images of time, the reference network is the best
_MOST_EPOCHS = 60  # beyond them, a wider network gains more
_MOST_FOR_FEW = 1.75  # but its cost grows at most by this factor, and by more where there is time
_STEP_PX = 32
_SIZE_SHARE = 2.2
_MUCH = 2.5  # from this cost on, more of the time is for the network
_ROOT_SHARE = 0.82
_SLOW_SHARE = 1.53  # of the fourth root: in fewer epochs than `_MANY`, a larger network gains more than larger images
_MANY = 240
_LARGER = 2
_DETAIL_EPOCHS = 20  # at least, at the size that fine detail needs
_OTHER_MINUTES = (1, 2, 3, 5, 10, 20, 30, 60, 120, 240, 480)  # that a dry run plans, too
_BATCH = {True: 64, False: 128}  # from weights, from scratch; the rates below are theirs
_OF_RANK = 32  # images, at least: fewer leave a GPU idle
_EPOCH_RATE = 1.5e-4  # of AdamW from weights, for each epoch (docs/results.md#from-weights-in-two-minutes)
_MOST_RATE = 8e-4
_LEAST_HEAD = 256  # images of a fitted head, however short the time


class Rule(NamedTuple):
    """Words for the command line, and why.

    groups: if the command states one of these keys, the rule is skipped.
    """

    groups: str
    words: str
    why: str


def cost_of(measurements: Measurements) -> float:
    """Return what an image of a step should cost, relative to the reference: the square root of the time."""
    return math.sqrt(measurements.reference / _REFERENCE_IMAGES)


def choose_sides(measurements: Measurements) -> tuple[int, ...]:
    """Return the side of the images: up to their own, if the time allows its cost. The larger ones follow.

    A pretrained network sees things better if they are larger than they were: from 96 px on. What the files hold pays
    in half an epoch, enlarging them only in more. If fine detail tells the class, the time is for large images rather
    than for many epochs.
    """
    network = measurements.networks[0]
    least = UNIT_PX
    own = measurements.side_px
    most = own
    enlarging = 1.0  # the cost of an enlarged image, as a multiple of one that is reduced to the same side
    cost = cost_of(measurements)
    slow = _SLOW_SHARE * max(cost, measurements.reference / measurements.images / _MANY) ** 0.25
    root = min(_ROOT_SHARE * math.sqrt(cost), slow)
    fitting = _SIZE_SHARE * min(cost, max(_MUCH, root))  # the most that an image may cost
    if network.is_pretrained:
        least = measurements.machine["fine_px"]
        most *= _LARGER
        epochs = measurements.machine["least_epochs"]
        fitting = (measurements.reference / network.cost) / max(
            epochs * (measurements.images + EVALUATED * measurements.validation + 1), measurements.machine["least_seen"]
        )
        enlarging = measurements.machine["enlarged_epochs"] / epochs
    if measurements.detail:
        fitting = max(fitting, measurements.reference / measurements.images / _DETAIL_EPOCHS)
    step = network.row.get("step_px", _STEP_PX)
    sides = range(least, min(most + step // 2, measurements.most_px) + 1, step)
    most = fitting * network.cost
    fits = [side for side in sides if network.cost_at(side) * (enlarging if side > own else 1.0) <= most]
    chosen = max(fits, default=least)
    return chosen, *(side for side in sides if side > chosen)


def choose_px(measurements: Measurements) -> int:
    """Return the side of the images."""
    return choose_sides(measurements)[0]


def rank_networks(measurements: Measurements, side: int) -> list[Network]:
    """Return the networks, first the one whose cost at a side of images is nearest to the wanted one, by ratio.

    With few images it costs more: epochs beyond `_MOST_EPOCHS` gain less than a wider network.
    """
    cost = cost_of(measurements)
    epochs = measurements.reference / cost / measurements.images
    wider = min(max(epochs / _MOST_EPOCHS, 1.0), _MOST_FOR_FEW * math.sqrt(max(cost / _MUCH, 1.0)))
    return sorted(measurements.networks, key=lambda each: abs(math.log(each.cost_at(side) / cost / wider)))


def choose_network(measurements: Measurements) -> Network:
    """Return the network: the user's, a pretrained one, or the one for which the time is."""
    return rank_networks(measurements, choose_px(measurements))[0]


def epochs_of(measurements: Measurements) -> float:
    """Return about how many epochs fit into the time."""
    cost = choose_network(measurements).cost_at(choose_px(measurements))
    return measurements.reference / cost / measurements.images


def time_candidates(known: Measurements, runtime: Runtime) -> Measurements:
    """Return the measurements with what networks cost on the machine, at the side of the rules and the next larger one.

    They are the pretrained network, or the three from random weights whose costs by networks.yaml suit the time best.
    """
    sides = choose_sides(known)[:2]
    networks = []
    for network in rank_networks(known, sides[0])[:3]:
        timed = {side: time_row(network.row, side, runtime) / known.step_sec for side in sides}
        networks.append(network._replace(cost=timed[sides[0]] / cost_of_px(sides[0]), timed=timed))
    return replace(known, networks=networks)


_SMALL_CHANGES = (
    "augment.crop_scale=[1.0,1.0] augment.crop_ratio=[1.0,1.0] "
    "augment.affine={degrees:8.0,translate:0.08,scale:[0.8,1.1],shear_degrees:10.0}"
)
_MANY_EPOCHS = 60  # from here on changed colours gain more than they cost
_POLICY_EPOCHS = range(50, 500)
_MIX_EPOCHS = 150
# Longer runs learn letters by heart without mixup and erasing.
_LETTER_EPOCHS = 20
_LETTERS_SEEN = 150_000


def list_rules(measurements: Measurements) -> Iterator[Rule]:
    """Yield the rules that apply, with their words; docs/results.md#by-minutes says what they rest on."""
    network = choose_network(measurements)
    side = choose_px(measurements)
    epochs = int(epochs_of(measurements))
    words = f"model=timm model.name={network.row['name']}"
    if network.is_pretrained:
        words += f"{network.row.get('build', '').format(side)} init_from=timm"
        why = "features of its weights tell clearly more of the class than small pictures"
        yield Rule("model init_from", words, why)
    else:
        why = f"{measurements.reference:,.0f} images of the narrow resnet10t at 64 px fit into the time"
        channels = str(network.row.get("channels")).replace(" ", "")  # none of the user's network, which stays
        yield Rule("model", f"{words} model.channels={channels}", why)
    if measurements.grey and measurements.has_classes and not network.is_pretrained:  # programs give a tagger RGB
        yield Rule(
            "model augment.mean augment.std",
            "model.in_channels=1 augment.mean=[0.5] augment.std=[0.5]",
            "no image has a colour",
        )
    yield Rule(
        "augment.image_size_hw",
        f"augment.image_size_hw=[{side},{side}]",
        "no larger than the images, and the time allows it",
    )
    if measurements.side_px > SHRINK * side:
        yield Rule("augment.shrink loop.phases", "augment.shrink=true", "crops of smaller images cost less")
    # RandAugment pays for drawings and photographs, not for letters or bare textures, in many epochs. A GPU must not
    # wait for it: without it, the GPU cuts the images, too.
    shows_things = measurements.colours and measurements.mirrors >= MIRRORS
    takes_policy = shows_things and epochs in _POLICY_EPOCHS and measurements.policy <= network.cost
    if takes_policy:
        why = f"the images show things, in about {epochs} epochs"
        yield Rule("augment.rand_augment augment.on_device", f"augment.rand_augment={POLICY}", why)
    if measurements.has_classes:
        yield from _rules_for_classes(measurements, network, takes_policy)
    least = _BATCH[network.is_pretrained]
    batch = max(least, _OF_RANK * distributed.planned_world_size())
    yield Rule("loop.batch_size loop.micro_batch_size", f"loop.batch_size={batch}", "so many keep the machine busy")
    faster = math.sqrt(batch / least)
    if network.is_pretrained:
        # Few epochs at a high rate spoil the features; many at a low one learn the images by heart.
        rate = 1e-4 if "tuning" in network.row else min(max(_EPOCH_RATE * epochs_of(measurements), 2e-4), _MOST_RATE)
        yield Rule("optim", f"optim=adamw optim.lr={rate * faster:.2g}", "the network is pretrained")
        if "tuning" in network.row:
            yield Rule("optim model loop.ema_decay", network.row["tuning"], "such a network keeps its first layers")
        if network.runtime:
            yield Rule("runtime.precision runtime.channels_last", network.runtime, "the network trains faster so")
    elif measurements.bf16:
        words = f"optim=muon optim.lr={0.02 * faster:.2g} optim.weight_decay=0.05 +optim.extra.ns_steps=3"
        yield Rule("optim", words, "it beats SGD")
    else:
        yield Rule("optim", "optim=sgd_train optim.lr=0.2", "Muon is slow without bf16")
    schedule = "schedule=cosine" if network.is_pretrained else "schedule=onecycle schedule.cycle_momentum=false"
    yield Rule("schedule", schedule, "it is good at any length")


def _rules_for_classes(measurements: Measurements, network: Network, takes_policy: bool) -> Iterator[Rule]:
    """Yield the rules that need the classes of images."""
    count = epochs_of(measurements)
    epochs = f"about {count:.0f} epochs"
    if network.is_pretrained:
        yield Rule(
            "task.head task.label_smoothing",
            "task.head=refitted task.label_smoothing=0.0",
            "its features tell the classes before the first step",
        )
        if UPDATE * count < 1:
            yield Rule(
                "loop.count",
                f"loop.count={max(UPDATE / 2 * count * measurements.images, _LEAST_HEAD):.0f}",
                "half of the time is for the features of so many",
            )
    mirrors = measurements.mirrors >= MIRRORS
    # Features of weights know coloured things; without weights, coloured letters are letters, too.
    is_letters = measurements.mirrors < CROPS and (measurements.grey or not network.is_pretrained)
    why = f"a mirrored image finds its class {measurements.mirrors:.2f} times as often"
    yield Rule("augment.horizontal_flip", f"augment.horizontal_flip={0.5 if mirrors else 0.0}", why)
    crops = f"augment.crop_scale=[{0.5 if mirrors else 0.7},1.0]"
    if is_letters:
        crops = f"{_SMALL_CHANGES} augment.fill={measurements.border}"
    if measurements.detail:
        yield Rule(
            "augment.crop_scale",
            "augment.crop_scale=[1.0,1.0] augment.crop_ratio=[1.0,1.0] augment.pad=square",
            "a crop may lose the detail that tells the class",
        )
    else:
        yield Rule("augment.crop_scale", crops, "the same share says how far place and size of a figure tell its class")
    if not measurements.colours and count >= _MANY_EPOCHS:
        yield Rule(
            "augment.color_jitter",
            "augment.color_jitter={strength:0.4,hue:0.5}",
            f"the mean colour tells nothing of the class, in {epochs}",
        )
    if is_letters and count >= _LETTER_EPOCHS and count * measurements.images >= _LETTERS_SEEN:
        yield Rule("task.cutmix_alpha task.mixup_alpha", "task.mixup_alpha=0.4", f"there are {epochs}")
        yield Rule("augment.random_erasing", "augment.random_erasing=0.25", f"letters are learned by heart in {epochs}")
    elif not is_letters and not takes_policy and count >= _MIX_EPOCHS:
        yield Rule(
            "task.cutmix_alpha task.mixup_alpha",
            "task.cutmix_alpha=1.0 task.mix_probability=0.5",
            f"there are {epochs}",
        )
    if not takes_policy:
        yield Rule(
            "augment.on_device augment.rand_augment", "augment.on_device=true", "whole batches are changed in less time"
        )
    yield Rule("augment.eval_crop", "augment.eval_crop=1.0", "small images have no margin")


def describe_plan(config: ImageTrainingConfig, measurements: Measurements) -> str:
    """Return what a person asks of a plan: the network, the side of the images, and how often each is seen."""
    network = choose_network(measurements)
    images = measurements.images
    seen = images * epochs_of(measurements)
    least = 0.0
    origin = "random weights"
    if network.is_pretrained:
        # The head is fitted before and after the updates, each time in half of the time of an update by its images.
        seen -= min(images, count_head_images(config))
        least = LEAST_UPDATES * UPDATE / 2 * _BATCH[True]
        origin = f"weights of {network.row.get('trained_on', 'timm')}"
    length = f"{seen / images:,.1f} epochs" if seen >= least else "a fitted head alone"
    return f"{network.row['name']} from {origin}, {choose_px(measurements)} px, {length}"


def plan_recipe(config: AnyConfig, start: Start, kind: Kind) -> AnyConfig:
    """Return the configuration with the words of the rules, or those that the run's first start chose.

    The words and their machine become those of the start.
    """
    job = start.job
    path = default_run_dir(config.model_dump(mode="json"), job)
    before = distributed.rank_zero_call(lambda: read_minutes(path, config.loop.minutes))
    if before is None:
        labels = None
        collection = start.collection(config.data)
        if kind.output == "classes":
            labels = collection.class_ids(kind.find_facts(config, collection)["class_names"])
        words = distributed.rank_zero_call(lambda: _choose_words(config, start, labels))
    else:
        words = before.words
    if "runtime.precision=fp32" in words:
        start.runtime = replace(start.runtime, precision="fp32", channels_last=True)
    start.job = replace(job, planned=tuple(words))
    return recompose(job, words, type(config)).changed({"run_dir": str(path)})


def _choose_words(config: ImageTrainingConfig, start: Start, labels: np.ndarray | None) -> list[str]:
    """Measure, apply the rules and log the plan.

    labels: the class of each row of the collection, negative for none; None: it has tags.
    """
    stated = [word for word in start.job.overrides if not word.startswith("model.pretrained=")]
    job = replace(start.job, overrides=stated)
    pretrained = None
    if config.init_from is None and not job.states("model"):
        pretrained = "never" if job.states("init_from") else config.model.pretrained
    time_once.cache_clear()
    configs = [config]
    if config.dry_run:
        configs += [config.changed({"loop.minutes": each}) for each in _OTHER_MINUTES]
    plans = []
    for each, known in zip(configs, measure(configs, start.collection(config.data), labels, start.runtime, pretrained)):
        if pretrained is not None and start.runtime.device.type == "cuda":
            known = time_candidates(known, start.runtime)
        if config.dry_run:
            log.info("with %g minutes: %s", each.loop.minutes, describe_plan(each, known))
        plans.append(known)
    chosen = []
    lines = []
    for rule in list_rules(plans[0]):
        if kept := [key for key in ("experiment", *rule.groups.split()) if job.states(key)]:
            lines.append((" ".join(kept), "as set"))
        else:
            chosen += rule.words.split()
            lines.append((rule.words, f"because {rule.why}"))
    log.info("%s", Lines(show_lines(f"the plan for {config.loop.minutes:g} minutes", lines)))
    return chosen
