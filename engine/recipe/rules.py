"""The recipe of `train.py loop.minutes=N`: a table of rules over facts of the collection, the machine and the time.

A rule sets keys for which the command has no word. Each stands on a measurement (docs/results.md#by-minutes). The
words that the rules choose are kept in minutes.json, so that a resumed run has the same recipe on any machine.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.collection.collection import Collection
from engine.recipe.facts import FINE_PX, LEAST_EPOCHS, MIRRORS, REFERENCE, UNIT_PX, Facts, Network, find_facts
from engine.recipe.pretrained import use_pretrained
from engine.run.length import read_minutes
from engine.tasks.kind import ImageTrainingConfig
from engine.update.runtime import Runtime
from utils.config.entry_point import Job, recompose
from utils.io.safe_text import Lines
from utils.ranks import distributed
from utils.record.figures import show_lines
from utils.record.logging import get_logger
from utils.record.run_folder import default_run_dir

log = get_logger(__name__)

_CROPS = 0.6  # below it, as a share like MIRRORS, the place and the size of a figure tell its class
_SHRINK = 2  # as a multiple of the size in training: larger images are reduced when they are decoded
_REFERENCE_IMAGES = 400_000  # with about this many images of time, the reference network is the best of _NETWORKS
_MOST_EPOCHS = 60  # beyond them, a wider network gains more
_MOST_FOR_FEW = 1.75  # but its cost grows at most by this factor
_NETWORKS = (
    Network("resnet10t", 16, 0.7),
    REFERENCE,
    Network("resnet10t", 48, 1.5),
    Network("resnet18d", 48, 2.2),
    Network("resnet18d", 64, 3.0),
    Network("resnet34d", 64, 5.5),
)
_STEP_PX = 32
_SIZE_SHARE = 2.2


@dataclass(frozen=True)
class Rule:
    """Words for the command line, and why.

    groups: if the command sets one of these keys, or a key below it, the rule is skipped.
    """

    groups: Sequence[str]
    words: Callable[[Facts], Sequence[str]]
    why: Callable[[Facts], str]
    for_tags: bool = True


def cost_of(facts: Facts) -> float:
    """Return what an image of a step should cost, relative to the reference: the square root of the time."""
    return math.sqrt(facts.reference / _REFERENCE_IMAGES)


def _cost_of_px(side: int) -> float:
    return (side / UNIT_PX) ** 2


def choose_px(facts: Facts) -> int:
    """Return the side of the images: up to their own, if the time allows its cost; of a pretrained network from 96."""
    network = facts.network
    most = min(facts.side_px + _STEP_PX // 2, facts.most_px)
    if network is not None and network.is_pretrained:
        fitting = 0.5 * facts.reference / network.cost / max(facts.images, 1) / LEAST_EPOCHS  # as a cost of an image
        return max(
            (side for side in range(FINE_PX, most + 1, _STEP_PX) if _cost_of_px(side) <= fitting), default=FINE_PX
        )
    sides = range(UNIT_PX + _STEP_PX, most + 1, _STEP_PX)
    return max((side for side in sides if _cost_of_px(side) <= _SIZE_SHARE * cost_of(facts)), default=UNIT_PX)


def choose_network(facts: Facts) -> Network:
    """Return the network: the user's, a pretrained one, or the one whose cost is nearest to the wanted one, by ratio.

    With few images it costs more: epochs beyond `_MOST_EPOCHS` gain less than a wider network.
    """
    if facts.network is not None:
        return facts.network
    epochs = facts.reference / cost_of(facts) / max(facts.images, 1)
    wider = min(max(epochs / _MOST_EPOCHS, 1.0), _MOST_FOR_FEW)
    wanted = wider * cost_of(facts) / _cost_of_px(choose_px(facts))
    return min(_NETWORKS, key=lambda each: abs(math.log(each.cost / wanted)))


def epochs_of(facts: Facts) -> float:
    """Return about how many epochs fit into the time."""
    cost = choose_network(facts).cost * _cost_of_px(choose_px(facts))
    return facts.reference / cost / max(facts.images, 1)


_SMALL_CHANGES = [
    "augment.crop_scale=[1.0,1.0]", "augment.crop_ratio=[1.0,1.0]",
    "augment.affine={degrees:8.0,translate:0.08,scale:[0.8,1.1],shear_degrees:10.0}",
]  # fmt: skip
_ANY_COLOUR = ["augment.color_jitter={brightness:0.4,contrast:0.4,saturation:0.4,hue:0.5}"]
_MANY_EPOCHS = 60  # from here on changed colours gain more than they cost
_POLICY = "rand-m9-mstd0.5-inc1"
_POLICY_EPOCHS = (50, 500)
_MIX_EPOCHS = 150
# Longer runs learn letters by heart without mixup and erasing.
_LETTER_EPOCHS = 20
_LETTERS_SEEN = 150_000
_IMAGE = "augment.image_size_hw"
_NO_WEIGHTS = "init_from=null"
# docs/results.md#by-minutes has the measurements.
RULES = (
    Rule(
        ["model", "init_from"],
        lambda facts: _network_words(choose_network(facts)),
        lambda facts: _why_network(facts),
    ),
    Rule(
        ["model", "init_from", "augment.mean", "augment.std"],
        lambda facts: (
            ["model.in_channels=1", "augment.mean=[0.5]", "augment.std=[0.5]"]
            if facts.grey and not choose_network(facts).is_pretrained
            else []
        ),
        lambda facts: "no image has a colour",
    ),
    Rule(
        ["task.head"],
        lambda facts: ["task.head=fitted"] if choose_network(facts).is_pretrained else [],
        lambda facts: "its features tell the classes before the first step",
        for_tags=False,
    ),
    Rule(
        [_IMAGE],
        lambda facts: [_word(_IMAGE, [choose_px(facts)] * 2)],
        lambda facts: f"the images have {facts.side_px} px{' or more' if facts.side_px == facts.most_px else ''}",
    ),
    Rule(
        ["augment.shrink", "loop.phases"],
        lambda facts: ["augment.shrink=true"] if facts.side_px > _SHRINK * choose_px(facts) else [],
        lambda facts: "crops of smaller images cost less",
    ),
    Rule(
        ["augment.horizontal_flip"],
        lambda facts: [f"augment.horizontal_flip={0.5 if facts.mirrors >= MIRRORS else 0.0}"],
        lambda facts: f"a mirrored image finds its class {facts.mirrors:.2f} times as often",
        for_tags=False,
    ),
    Rule(
        ["augment.crop_scale"],
        lambda facts: (
            [*_SMALL_CHANGES, f"augment.fill={facts.border}"]
            if _is_letters(facts)
            else [_word("augment.crop_scale", [0.5 if facts.mirrors >= MIRRORS else 0.7, 1.0])]
        ),
        lambda facts: "the same share says how far the place and the size of a figure tell its class",
        for_tags=False,
    ),
    Rule(
        ["augment.color_jitter"],
        lambda facts: [] if facts.colours or epochs_of(facts) < _MANY_EPOCHS else _ANY_COLOUR,
        lambda facts: f"the mean colour tells nothing of the class, in about {epochs_of(facts):.0f} epochs",
        for_tags=False,
    ),
    Rule(
        ["augment.rand_augment", "augment.on_device"],
        lambda facts: [f"augment.rand_augment={_POLICY}"] if _takes_policy(facts) else [],
        lambda facts: f"the images show things, in about {epochs_of(facts):.0f} epochs",
    ),
    Rule(
        ["task.cutmix_alpha", "task.mixup_alpha"],
        lambda facts: _mixing_words(facts),
        lambda facts: f"there are about {epochs_of(facts):.0f} epochs",
        for_tags=False,
    ),
    Rule(
        ["augment.random_erasing"],
        lambda facts: ["augment.random_erasing=0.25"] if _mixes_letters(facts) else [],
        lambda facts: f"letters are learned by heart in about {epochs_of(facts):.0f} epochs",
        for_tags=False,
    ),
    Rule(
        ["augment.on_device", "augment.rand_augment", "augment.pad"],
        lambda facts: [] if _takes_policy(facts) else ["augment.on_device=true"],
        lambda facts: "whole batches are changed in less time",
        for_tags=False,
    ),
    Rule(
        ["augment.eval_crop"],
        lambda facts: ["augment.eval_crop=1.0"],
        lambda facts: "small images have no margin",
        for_tags=False,
    ),
    Rule(
        ["optim"],
        lambda facts: _choose_optimiser(facts)[0],
        lambda facts: _choose_optimiser(facts)[1],
    ),
    Rule(
        ["loop.batch_size", "loop.micro_batch_size"],
        lambda facts: ["loop.batch_size=64"] if choose_network(facts).is_pretrained else [],
        lambda facts: "few updates fit",
    ),
    Rule(
        ["schedule"],
        lambda facts: (
            ["schedule=cosine"]
            if choose_network(facts).is_pretrained
            else ["schedule=onecycle", "schedule.cycle_momentum=false"]
        ),
        lambda facts: "it is good at any length",
    ),
)


def _takes_policy(facts: Facts) -> bool:
    """Return whether RandAugment pays: drawings or photographs in many epochs."""
    least, most = _POLICY_EPOCHS
    return facts.shows_things and least <= epochs_of(facts) < most


def _is_letters(facts: Facts) -> bool:
    return facts.mirrors < _CROPS


def _mixes_letters(facts: Facts) -> bool:
    epochs = epochs_of(facts)
    return _is_letters(facts) and epochs >= _LETTER_EPOCHS and epochs * facts.images >= _LETTERS_SEEN


def _mixing_words(facts: Facts) -> list[str]:
    """Return mixup for letters, and cutmix for few images."""
    if _mixes_letters(facts):
        return ["task.mixup_alpha=0.4"]
    if _is_letters(facts) or epochs_of(facts) < _MIX_EPOCHS or _takes_policy(facts):
        return []
    return ["task.cutmix_alpha=1.0", "task.mix_probability=0.5"]


def _choose_optimiser(facts: Facts) -> tuple[list[str], str]:
    if choose_network(facts).is_pretrained:
        return ["optim=adamw", "optim.lr=2e-3"], "the network is pretrained"
    if facts.bf16:
        return ["optim=muon", "optim.lr=0.02", "optim.weight_decay=0.05", "+optim.extra.ns_steps=3"], "it beats SGD"
    return ["optim=sgd_train", "optim.lr=0.2"], "Muon is slow without bf16"


def _why_network(facts: Facts) -> str:
    if choose_network(facts).is_pretrained:
        return "features of its weights tell more of the class than small pictures"
    found = f"{facts.reference:,.0f} images of the narrow resnet10t at 64 px fit into the time"
    more = "; this machine has no weights of timm that help: with some, model=timm model.name=NAME init_from=timm"
    return found + (more if facts.shows_things else "")


def _network_words(network: Network) -> list[str]:
    if network.is_pretrained:
        return ["model=timm", f"model.name={network.name}", "init_from=timm"]
    return ["model=timm", f"model.name={network.name}", _word("model.channels", network.channels)]


def _word(key: str, values: Sequence[float]) -> str:
    return f"{key}=[{','.join(map(str, values))}]"


def plan_recipe(
    config: ImageTrainingConfig, job: Job, collection: Collection, labels: np.ndarray | None, runtime: Runtime
) -> tuple[ImageTrainingConfig, Job]:
    """Return the configuration and the job with the words of the rules, or those that the run's first start chose.

    labels: the class of each row of the collection, negative for none; None: it has tags. Other scripts than train.py
    keep the recipe of the command.
    """
    if job.script != "train":
        return config, job
    path = default_run_dir(config.model_dump(mode="json"), job)
    before = distributed.rank_zero_call(lambda: read_minutes(path, config.loop.minutes))
    if before is None:
        words = distributed.rank_zero_call(lambda: _choose_words(config, job, collection, labels, runtime))
    else:
        words = before[1]
    planned = use_pretrained(recompose(job, words, type(config)), [*words, *job.overrides])
    return planned.model_copy(update={"run_dir": str(path)}), replace(job, planned=tuple(words))


def _choose_words(
    config: ImageTrainingConfig, job: Job, collection: Collection, labels: np.ndarray | None, runtime: Runtime
) -> list[str]:
    """Find the facts, apply the rules and log the plan, and what twice the time would change."""
    given = [word for word in job.overrides if word != _NO_WEIGHTS]
    is_own = any(_touches(word, "model") for word in given) or config.init_from is not None
    looks_for_weights = given == job.overrides
    facts = find_facts(config, collection, labels, runtime, is_own=is_own, looks_for_weights=looks_for_weights)
    chosen = []
    lines = []
    longer = replace(facts, reference=2 * facts.reference)
    for rule in RULES:
        if not (facts.has_classes or rule.for_tags):
            continue
        words = rule.words(facts)
        later = rule.words(longer)
        if kept := [word for word in given if any(_touches(word, group) for group in rule.groups)]:
            lines.append((" ".join(kept), "as set"))
            continue
        if not words:
            continue
        chosen += words
        changes = [word for word in later if word not in words]
        more = f"; in twice the time {' '.join(changes)}" if changes else ""
        lines.append((" ".join(words), f"because {rule.why(facts)}{more}"))
    log.debug("plan: %s", facts)
    log.info("%s", Lines(show_lines(f"the plan for {config.loop.minutes:g} minutes", lines)))
    return chosen


def _touches(word: str, group: str) -> bool:
    """Return whether a word of the command sets the rule's group, a key below it, or everything."""
    key = word.lstrip("+~").partition("=")[0]
    return key == "experiment" or key == group or key.startswith(f"{group}.") or group.startswith(f"{key}.")
