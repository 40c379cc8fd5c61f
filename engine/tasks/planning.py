"""The recipe of `train.py loop.minutes=N`: a table of rules over facts of the collection, the machine and the time.

A rule sets keys for which the command has no word. Each stands on a measurement (docs/results.md#by-minutes). The
words that the rules choose are kept in minutes.json, so that a resumed run has the same recipe on any machine.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.collection.collection import Collection
from data.collection.rows import training_rows
from data.open import open_images
from data.stream.source import IMAGE, UnreadableImage
from engine.minutes import count_fitting, read_minutes
from engine.run import show_lines
from engine.runtime import Runtime
from engine.tasks.kind import ImageTrainingConfig
from models.build import build_network
from models.config import TimmConfig
from utils.config.entry_point import Job, recompose
from utils.config.help import STARTED
from utils.hardware import has_fast_bf16
from utils.io.safe_text import Lines
from utils.ranks import distributed
from utils.record.logging import get_logger
from utils.record.run_folder import default_run_dir

log = get_logger(__name__)

_SAMPLE, _SAMPLE_SEC = 1000, 3.0  # images that are decoded for the facts, and at most so long
_LEAST_FOR_COLOUR = 200  # of them, for a word on colours
_SMALL_PX = 16  # side of the pictures in which they are compared
# Of the nearest neighbours' accuracy, the share that mirrored images keep (emoji 0.92, fashion 0.71, glyphs 0.34):
# from _MIRRORS on mirrored images train, and below _CROPS the place and the size of a figure tell its class.
_MIRRORS, _CROPS = 0.85, 0.5
_SHRINK = 2  # as a multiple of the size in training: larger images are reduced when they are decoded
_SHARE = 0.85  # of the minutes is training; the rest is the start, evaluation and files
# At which the reference network is the best: 12,298 glyphs, four minutes, 0.853 of widths from 16, 0.828 from 32.
_REFERENCE_IMAGES = 400_000
# 100 s of one core: 1,485 emoji 0.734 in 146 epochs, 0.760 in 82 of twice the width; with RandAugment 0.749 of widths
# from 16, 0.760 from 32, 0.759 from 48; 600 textures 0.798 in 362, 0.823 in 203, 0.772 in 77 of a resnet18d; 148 emoji
# 0.587 in 1,507, 0.616 in 847.
_MOST_EPOCHS, _MOST_FOR_FEW = 60, 1.75
_BATCH, _WARM_UP, _TIMED_SEC = 128, 2, 1.0


@dataclass(frozen=True)
class Network:
    """A ResNet of timm. cost: of reading and training an image of 64 px, relative to the reference (a core, bf16)."""

    name: str
    width: int  # channels of the first stage; each stage doubles them
    cost: float

    @property
    def channels(self) -> list[int]:
        """The channels of the four stages."""
        return [self.width * 2**stage for stage in range(4)]


_REFERENCE = Network("resnet10t", 32, 1.0)
_NETWORKS = (
    Network("resnet10t", 16, 0.7),
    _REFERENCE,
    Network("resnet10t", 48, 1.5),
    Network("resnet18d", 48, 2.2),
    Network("resnet18d", 64, 3.0),
    Network("resnet34d", 64, 5.5),
)
_LEAST_PX, _UNIT_PX, _MOST_PX, _SIZE_SHARE = 64, 32, 224, 2.2


@dataclass(frozen=True)
class Facts:
    """What the rules know.

    images: of training. side_px: the median of the longer sides of a sample, at most `_MOST_PX`. mirrors: the share of
    the accuracy of nearest neighbours that mirrored images keep. border: the grey level of the images' upper borders.
    colours: whether the mean colour tells something of the class. reference: how many images of a step of `_REFERENCE`
    fit into the minutes. bf16: whether the machine multiplies it fast, which Muon needs.
    """

    images: int
    side_px: int
    mirrors: float
    border: int
    colours: bool
    reference: float
    bf16: bool


@dataclass(frozen=True)
class Rule:
    """Words for the command line, and why. groups: any word of the user for one, or below it, keeps the rule out."""

    groups: Sequence[str]
    words: Callable[[Facts], Sequence[str]]
    why: Callable[[Facts], str]


def cost_of(facts: Facts) -> float:
    """Return what an image of a step should cost, relative to the reference: the square root of the time."""
    return math.sqrt(facts.reference / _REFERENCE_IMAGES)


def _cost_of_px(side: int) -> float:
    return (side / _LEAST_PX) ** 2


def choose_px(facts: Facts) -> int:
    """Return the side of the images: up to their own, if the time allows its cost."""
    most = min(facts.side_px + _UNIT_PX // 2, _MOST_PX)
    sides = range(_LEAST_PX + _UNIT_PX, most + 1, _UNIT_PX)
    return max((side for side in sides if _cost_of_px(side) <= _SIZE_SHARE * cost_of(facts)), default=_LEAST_PX)


def choose_network(facts: Facts) -> Network:
    """Return the network whose cost at the size of the images is nearest to the wanted one, by ratio.

    With few images it costs more: epochs beyond `_MOST_EPOCHS` gain less than a wider network.
    """
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
# Textures of any colour, 25 images a class, 80 s of a core: 0.13 without, 0.48 without the hue, 0.75 with it.
_ANY_COLOUR = ["augment.color_jitter={brightness:0.4,contrast:0.4,saturation:0.4,hue:0.5}"]
_MANY_EPOCHS = 60  # 250 images a class: 0.76 with it and 0.81 without in 8 epochs, 0.88 in 22 and 0.90 in 31
_POLICY, _POLICY_EPOCHS = "rand-m9-mstd0.5-inc1", (50, 500)
_MIX_EPOCHS = 150
_MUON = ["optim=muon", "optim.lr=0.02", "optim.weight_decay=0.05", "+optim.extra.ns_steps=3"]
_IMAGE = "augment.image_size_hw"
# Measured on glyphs, Fashion-MNIST, emoji and textures; docs/results.md#by-minutes has the figures.
RULES = (
    Rule(
        ["model"],
        lambda facts: (
            [
                "model=timm",
                f"model.name={(network := choose_network(facts)).name}",
                _word("model.channels", network.channels),
            ]
        ),
        lambda facts: f"{facts.reference:,.0f} images of the narrow resnet10t at 64 px fit into the time",
    ),
    Rule(
        [_IMAGE],
        lambda facts: [_word(_IMAGE, [choose_px(facts)] * 2)],
        lambda facts: f"the images have {facts.side_px} px{' or more' if facts.side_px == _MOST_PX else ''}",
    ),
    # 1,485 JPEGs of 800 x 600 px, two minutes of one core: 0.642 with it, 0.616 without (42 s late).
    Rule(
        ["augment.shrink", "loop.phases"],
        lambda facts: ["augment.shrink=true"] if facts.side_px > _SHRINK * choose_px(facts) else [],
        lambda facts: "crops of smaller images cost less",
    ),
    Rule(
        ["augment.horizontal_flip"],
        lambda facts: [f"augment.horizontal_flip={0.5 if facts.mirrors >= _MIRRORS else 0.0}"],
        lambda facts: f"the nearest neighbours of mirrored images are right {facts.mirrors:.2f} times as often",
    ),
    Rule(
        ["augment.crop_scale"],
        lambda facts: (
            [*_SMALL_CHANGES, f"augment.fill={facts.border}"]
            if facts.mirrors < _CROPS
            else [_word("augment.crop_scale", [0.5 if facts.mirrors >= _MIRRORS else 0.7, 1.0])]
        ),
        lambda facts: "the same share says how far the place and the size of a figure tell its class",
    ),
    Rule(
        ["augment.color_jitter"],
        lambda facts: [] if facts.colours or epochs_of(facts) < _MANY_EPOCHS else _ANY_COLOUR,
        lambda facts: f"the mean colour tells nothing of the class, in about {epochs_of(facts):.0f} epochs",
    ),
    # One core, with it and without: 1,485 emoji, 475 updates, loss 0.798 and 0.843, 950 updates 0.760 and 0.821; 1,485
    # photographs, 600 updates, top-1 0.683 and 0.621; 148 emoji, 600 updates, 1.238, with cutmix, 950 updates, 1.193.
    # A tenth of Fashion-MNIST, two minutes: 0.901 and 0.906.
    Rule(
        ["augment.rand_augment", "augment.on_device"],
        lambda facts: [f"augment.rand_augment={_POLICY}"] if _takes_policy(facts) else [],
        lambda facts: f"the colour tells something of the class, in about {epochs_of(facts):.0f} epochs",
    ),
    # 100 s of one core, with it and without: 600 textures in 203 epochs 0.843, 0.823; 1,230 glyphs in 63 0.682, 0.682;
    # 1,485 emoji in 82 0.748, 0.760 (two seeds).
    Rule(
        ["task.cutmix_alpha", "task.mixup_alpha"],
        lambda facts: (
            []
            if epochs_of(facts) < _MIX_EPOCHS or _takes_policy(facts)
            else ["task.cutmix_alpha=1.0", "task.mix_probability=0.5"]
        ),
        lambda facts: f"there are about {epochs_of(facts):.0f} epochs",
    ),
    Rule(
        ["augment.on_device", "augment.rand_augment", "augment.pad"],
        lambda facts: [] if _takes_policy(facts) else ["augment.on_device=true"],
        lambda facts: "whole batches are changed in less time",
    ),
    Rule(["augment.eval_crop"], lambda facts: ["augment.eval_crop=1.0"], lambda facts: "small images have no margin"),
    Rule(
        ["optim"],
        lambda facts: _MUON if facts.bf16 else ["optim=sgd_train", "optim.lr=0.2"],
        lambda facts: "it is ahead of SGD" if facts.bf16 else "Muon is slow without bf16",
    ),
    Rule(
        ["schedule"],
        lambda facts: ["schedule=onecycle", "schedule.cycle_momentum=false"],
        lambda facts: "it is good at any length",
    ),
    Rule(["lr_finder"], lambda facts: ["lr_finder.enabled=false"], lambda facts: "the rate is known"),
)


def _takes_policy(facts: Facts) -> bool:
    """Return whether RandAugment pays: coloured drawings or photographs in many epochs, no letters or bare textures."""
    least, most = _POLICY_EPOCHS
    return facts.colours and facts.mirrors >= _MIRRORS and least <= epochs_of(facts) < most


def _word(key: str, values: Sequence[float]) -> str:
    return f"{key}=[{','.join(map(str, values))}]"


def plan_recipe(
    config: ImageTrainingConfig, job: Job, collection: Collection, runtime: Runtime
) -> tuple[ImageTrainingConfig, Job]:
    """Return the configuration and the job with the words of the rules, or those that the run's first start chose."""
    path = default_run_dir(config.model_dump(mode="json"), job)
    before = distributed.rank_zero_call(lambda: read_minutes(path, config.loop.minutes))
    if before is None:
        words = distributed.rank_zero_call(lambda: _choose_words(config, job, collection, runtime))
    else:
        words = before[1]
    planned = recompose(job, words, type(config))
    return planned.model_copy(update={"run_dir": str(path)}), replace(job, planned=tuple(words))


def _choose_words(config: ImageTrainingConfig, job: Job, collection: Collection, runtime: Runtime) -> list[str]:
    """Find the facts, apply the rules and log the plan, and what twice the time would change."""
    facts, chosen, lines = find_facts(config, collection, runtime), [], []
    longer = replace(facts, reference=2 * facts.reference)
    for rule in RULES:
        words, later = rule.words(facts), rule.words(longer)
        if kept := [word for word in job.overrides if any(_touches(word, group) for group in rule.groups)]:
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


def find_facts(config: ImageTrainingConfig, collection: Collection, runtime: Runtime) -> Facts:
    """Return the facts of a collection and a machine; takes a few seconds."""
    ids = collection.class_ids(collection.class_names("train"))
    rows = training_rows(collection, config.loop, ids >= 0)
    source = open_images(collection, config.data, {"channels": 3, "shortest_px": _MOST_PX})
    started = time.monotonic()
    kept, sides, pictures = [], [], [torch.zeros(0, 3, _SMALL_PX, _SMALL_PX)]
    for row in np.random.default_rng(0).permutation(rows)[:_SAMPLE]:
        if time.monotonic() > started + _SAMPLE_SEC:
            break
        with suppress(UnreadableImage):
            image = source.read(int(row))[IMAGE]
            pictures.append(F.adaptive_avg_pool2d(image[None].float(), _SMALL_PX))
            sides.append(min(max(image.shape[-2:]), _MOST_PX))
            kept.append(row)
    read_sec, step_sec = (time.monotonic() - started) / max(len(kept), 1), 1 / _time_reference(runtime)
    first_sec = max(read_sec / runtime.workers, step_sec) if runtime.workers else read_sec + step_sec
    small, labels = torch.cat(pictures), torch.from_numpy(ids[np.array(kept, np.int64)])
    seconds = max(_SHARE * 60 * config.loop.minutes - (time.monotonic() - STARTED), 1.0)
    ranks = distributed.planned_world_size()  # each reads its part of the first epoch, then the memory cache has all
    return Facts(
        images=len(rows),
        side_px=int(np.median(sides or [0])),
        mirrors=_compare_mirrored(small, labels),
        border=round(small[:, :, 0].median().item()) if kept else 0,
        colours=_tells_colour(small, labels),
        reference=count_fitting(seconds, len(rows), first_sec / ranks, step_sec / ranks),
        bf16=has_fast_bf16(runtime.device.type),
    )


def _compare_mirrored(small: Tensor, labels: Tensor) -> float:
    """Return how often the nearest image of a mirrored one has its class, as a share of how often its own nearest has.

    small: images as small pictures, float32 [N, 3, H, W]. 1 where the nearest ones tell nothing.
    """

    def flatten(pictures: Tensor) -> Tensor:
        flat = pictures.flatten(1)
        return F.normalize(flat - flat.mean(1, keepdim=True), dim=1)

    def accuracy(pictures: Tensor) -> float:
        likeness = flatten(pictures) @ flatten(small).T
        likeness.fill_diagonal_(-torch.inf)  # an image is not its own neighbour
        return (labels[likeness.argmax(1)] == labels).float().mean().item()

    if len(small) < 2:
        return 1.0
    plain, mirrored = accuracy(small), accuracy(small.flip(3))
    noise = 2 * math.sqrt(plain * (1 - plain) / len(small))
    return 1.0 if plain - mirrored <= noise else mirrored / plain


def _tells_colour(small: Tensor, labels: Tensor) -> bool:
    """Return whether images of the nearest mean colour are of one class more often than by chance, or are too few."""
    if len(small) < _LEAST_FOR_COLOUR:
        return True
    means = small.mean((2, 3))
    distance = torch.cdist(means, means).fill_diagonal_(torch.inf)
    right = (labels[distance.argmin(1)] == labels).float().mean().item()
    chance = (torch.bincount(labels).float() / len(labels)).square().sum().item()
    return right > chance + 3 * math.sqrt(chance * (1 - chance) / len(small))


def _time_reference(runtime: Runtime) -> float:
    """Return how many images a second this machine trains with the reference network."""
    layout = torch.channels_last if runtime.channels_last else torch.contiguous_format
    model = TimmConfig(
        family="timm", name=_REFERENCE.name, in_channels=3, drop_path_rate=None, channels=_REFERENCE.channels
    )
    with torch.random.fork_rng(devices=[]):
        network = build_network(model, num_classes=10).to(runtime.device, memory_format=layout)
    images = torch.zeros(_BATCH, 3, _LEAST_PX, _LEAST_PX, device=runtime.device).to(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)

    def update() -> None:
        with runtime.autocast():
            loss = network(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)

    for _ in range(_WARM_UP):
        update()
    started, count = time.monotonic(), 0
    while time.monotonic() < started + _TIMED_SEC:
        update()
        count += 1
    return count * _BATCH / (time.monotonic() - started)
