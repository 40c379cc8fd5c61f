"""Tagging: any number of tags for an image, each with its own probability."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from data.collection.collection import Collection
from data.collection.rows import training_rows
from data.config import TagRulesConfig, VocabularyConfig
from data.stream.batch import Ragged, Sample, multi_hot
from data.stream.loader import Example, Fields
from data.tags.build_vocabulary import make_vocabulary
from data.tags.orientation import Mirror, build_orientation
from data.tags.rules import read_rules
from data.tags.tag_index import TagIndex, index_tags
from engine.measures.drawings import draw_pr_curves, draw_tag_mistakes
from engine.measures.means import Means
from engine.measures.tag_scores import TagScores, calibrate, to_fit
from engine.measures.tags import TagHistograms
from engine.measures.top_samples import TopSamples
from engine.task import Report, StepOutput
from engine.tasks.kind import ImageTask, ImageTrainingConfig, Kind, Setup
from engine.tasks.mixing import Mixing, MixingConfig
from models.image_model import find_head
from models.weights.fit import is_meta, optional_prefixes
from models.weights.initialise import convert
from optim.schedules import linear
from utils.config.bounds import BelowOne, Count
from utils.config.schema import PathText, Strict
from utils.contracts import Batch
from utils.errors import UserError, about
from utils.io.weights import InitFrom, read_weights
from utils.ranks import distributed
from utils.record.logging import get_logger
from utils.thresholds import DEFAULT_LOGIT, ThresholdTable
from utils.vocabulary import FACTS, RATING, Vocabulary, read_facts, read_vocabulary, vocabulary_of

log = get_logger(__name__)

CACHE = Path("outputs/cache/tags")
_MISTAKES, _LINES = 24, 3  # images in the picture, and tags of each kind of mistake under an image
_LOWEST = -8.0  # of a bias; a tag on no training image has no logarithm
_EPS = 1e-8  # as the published code of the asymmetric loss has it
_Amount = Annotated[float, Field(ge=0, le=100)]
_Number = TypeVar("_Number")
_Pair = Annotated[list[_Number], Field(min_length=2, max_length=2)]


class TagLossConfig(Strict):
    """Which loss: the binary cross-entropy, or the asymmetric loss, which reads the others.

    A parameter is a number, or a pair: its values at the start and at the end of the run, with a straight line between.
    """

    name: Literal["bce", "asl"]
    gamma_pos: _Amount | _Pair[_Amount]
    gamma_neg: _Amount | _Pair[_Amount]
    clip: BelowOne | _Pair[BelowOne]


class TaggingTaskConfig(MixingConfig, TagRulesConfig):
    """How a tagger is trained.

    vocabulary: a selected_tags.csv; null: the general tags and characters on `min_count` training images or more.
    orientation: what a mirror does to tags: booru, glyphs, or the path of a map; null: no image is mirrored.
    """

    name: Literal["tagging"]
    vocabulary: PathText | None
    min_count: Count
    orientation: PathText | None
    loss: TagLossConfig
    label_smoothing: BelowOne

    def check_run(self, config: ImageTrainingConfig) -> None:
        """Raise UserError for a mirror that knows nothing of tags."""
        if config.augment.horizontal_flip > 0:
            raise UserError(
                f"augment.horizontal_flip: {config.augment.horizontal_flip:g} would mirror images without their tags; "
                "set augment.horizontal_flip=0, and task.orientation=booru to mirror both (or augment=tagger)"
            )


def tag_loss(config: TagLossConfig, logits: Tensor, targets: Tensor, progress: Tensor) -> Tensor:
    """Return the loss of each pair, float32 [B, T]. progress: the share of the run, which parameters may follow."""
    if config.name == "bce":
        return bce(logits.float(), targets)
    values = (config.gamma_pos, config.gamma_neg, config.clip)
    return asymmetric(logits.float(), targets, *(linear(*v, progress) if isinstance(v, list) else v for v in values))


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def asymmetric(
    logits: Tensor, targets: Tensor, gamma_pos: Tensor | float, gamma_neg: Tensor | float, clip: Tensor | float
) -> Tensor:
    """Return the asymmetric loss; its focusing weights get no gradient, as in the published training.

    Source: Ridnik et al. 2021 (arXiv 2009.14119), equations 4 to 7; Alibaba-MIIL/ASL:src/loss_functions/losses.py.
    Differs: log p is exact for a positive of p < 1e-8 too, which so keeps its gradient.
    """
    absent = ((-logits).sigmoid() + clip).clamp(max=1)  # 1 - p_m
    log_likelihood = targets * F.logsigmoid(logits) + (1 - targets) * absent.clamp(min=_EPS).log()
    with torch.no_grad():
        right = logits.sigmoid() * targets + absent * (1 - targets)
        weight = (1 - right) ** (gamma_pos * targets + gamma_neg * (1 - targets))
    return -log_likelihood * weight


class TaggingTask(ImageTask):
    """Own a tagger of a vocabulary, whose order is that of its outputs."""

    best_metric: ClassVar[str] = "mAP"
    best_is_lowest: ClassVar[bool] = False

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, outputs=len(setup.facts["tag_names"]))
        config, facts = setup.task, setup.facts
        self.vocabulary = vocabulary_of(facts)
        self.loss, self.label_smoothing = config.loss, config.label_smoothing
        self.mixing = Mixing(config)
        # Facts of training, which weight files do not have.
        orientation, priors = facts.get("orientation"), facts.get("tag_priors")
        self.mirror = None if orientation is None else Mirror(orientation, len(self.vocabulary))
        self._priors = None if priors is None else torch.tensor(priors, device="cpu")
        if priors is not None:
            head = find_head(self.network, "model.name", "choose another network")
            head.bias.data.copy_(prior_bias(self._priors))
        is_rating = torch.tensor(self.vocabulary.categories) == RATING
        self.register_buffer("is_rating", is_rating, persistent=False)
        self.metadata = {"vocabulary_hash": self.vocabulary.hash}

    def initialise(self, source: InitFrom | None) -> None:
        """Load the network of a run or file; of a tagger of ours, the rows of its head by the tags' names."""
        super().initialise(source)
        if source is not None:
            continue_head(self.network, source, self.vocabulary, self._priors)

    @torch.compiler.disable  # the number of tags of a batch is not one to compile for
    def targets(self, batch: Batch) -> Tensor:
        """Return the targets float32 [B, T]: 1 with the tag, 0 without, NaN for the ratings where none is known."""
        targets = multi_hot(batch["tags"], batch["tags_offsets"], len(self.vocabulary))
        return targets.masked_fill(~batch["rating_known"][:, None] & self.is_rating, torch.nan)

    def forward(self, batch: Batch, progress: Tensor) -> StepOutput:
        """Return each sample's loss."""
        images, targets = self.views(batch)
        logits = self.network(images).float()
        return StepOutput(self.label_losses(logits, targets, progress), self._logs(logits, targets, batch["weight"]))

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return images for the network and targets [B, T]; in training both are mirrored and mixed."""
        images, targets = batch["images"], self.targets(batch)
        if self.training and self.mirror is not None:
            images, targets = self.mirror(images, targets, batch.get("flip"), batch["key"])
        return self.mixing(self.normalise(images), targets, batch["weight"])

    def label_losses(self, logits: Tensor, targets: Tensor, progress: Tensor) -> Tensor:
        """Return the loss of each sample [B], the sum over its tags; a target that is NaN counts nothing."""
        known = ~targets.isnan()
        soft = targets.nan_to_num() * (1 - self.label_smoothing) + self.label_smoothing / 2
        return tag_loss(self.loss, logits, soft, progress).where(known, 0.0).sum(dim=1)

    @torch.no_grad()
    def _logs(self, logits: Tensor, targets: Tensor, weight: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return precision and recall of all decisions at one threshold."""
        valid = (weight > 0)[:, None] & ~targets.isnan()
        predicted = (logits > DEFAULT_LOGIT) & valid
        has = (targets > 0.5) & valid
        right = (predicted & has).sum().float()
        return {"precision": (right, predicted.sum().float()), "recall": (right, has.sum().float())}

    # -------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, loaders: Mapping[str, Iterable[Batch]], step: int) -> Report:
        """Measure all samples of `val`: mAP, F1 where precision equals recall, and more (measures/tag_scores.py).

        Tables: `tags`, `tag_groups`, `hardest_tags`. Images: `pr_curves`, `mistakes`.
        """
        means, counts, worst = Means(), TagHistograms(len(self.vocabulary)), TopSamples(_MISTAKES)
        for batch in loaders["val"]:
            logits, targets, valid = self._predict(batch)
            # The cross-entropy, whatever the loss in training, so that runs compare.
            loss = bce(logits, targets.nan_to_num()).where(~targets.isnan(), 0.0).sum(dim=1)
            means.add({"loss": loss}, valid)
            counts.add(logits, targets, valid)
            shown = {name: batch[name] for name in ("sample_id", "images")}
            worst.add(loss, valid, {**_find_mistakes(logits, targets), **shown})
        scores = TagScores(counts.reduce(), self.vocabulary)
        measured, kept = means.reduce(), worst.reduce()
        report = Report({"loss": measured["loss"], **scores.scalars(), "samples": measured["samples"]})
        if distributed.is_main():
            report.tables = scores.tables()
            report.images = {
                "pr_curves": draw_pr_curves(scores.groups),
                "mistakes": draw_tag_mistakes(kept, self.vocabulary.names),
            }
        return report

    def calibrate(self, loader: Iterable[Batch], precision: float, recall: float) -> ThresholdTable:
        """Fit thresholds on one half of the samples, by their keys, and measure them on the other."""
        fitted, others = (TagHistograms(len(self.vocabulary)) for _ in range(2))
        for batch in loader:
            logits, targets, valid = self._predict(batch)
            half = to_fit(batch["key"])
            fitted.add(logits, targets, valid & half)
            others.add(logits, targets, valid & ~half)
        scores = (TagScores(counts.reduce(), self.vocabulary) for counts in (fitted, others))
        return calibrate(*scores, precision, recall)

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits and targets [B, T], and which samples are valid [B]."""
        images, targets = self.views(batch)
        return self.network(images).float(), targets, batch["weight"] > 0


def _find_mistakes(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the worst tags of each sample, as `draw_tag_mistakes` shows them."""
    probs, most = logits.sigmoid(), min(_LINES, logits.shape[1])
    wrong, missed = (probs * (targets == 0)).topk(most), ((1 - probs) * (targets == 1)).topk(most)
    return {
        "wrong": wrong.indices, "wrong_prob": wrong.values, "missed": missed.indices, "missed_prob": missed.values,
    }  # fmt: skip


def prior_bias(priors: Tensor) -> Tensor:
    """Return the biases at which an untrained head gives each tag its frequency; priors: [T], shares of images."""
    return priors.logit(eps=1e-6).clamp(_LOWEST, 0.0)


@about("init_from")
@torch.no_grad()
def continue_head(network: nn.Module, source: InitFrom, vocabulary: Vocabulary, priors: Tensor) -> None:
    """Copy the head's rows of the tags that `init_from` has too; nothing where it is no tagger of ours.

    A new tag begins with the mean of all rows of `init_from`, and the bias of its own frequency.
    Raises UserError (`init_from`) where a file's vocabulary and head do not fit together.
    """
    if source.source == "timm" or is_meta(network):
        return
    path = source.find()
    state, metadata = read_weights(path, which=source.weights)
    if "tag_names" not in metadata:
        return
    known, state = read_facts(path, metadata), convert(network, state)[1]
    head, (prefix, *_) = find_head(network), optional_prefixes(network)[0]
    weight, bias = (state.get(f"{prefix}{name}", torch.empty(0)) for name in ("weight", "bias"))
    if len(weight) != len(known) or len(bias) != len(known) or weight[0].numel() != head.in_features:
        raise UserError(f"init_from: {path} has no head of its {len(known)} tags; give the file of a whole tagger")
    weight = weight.flatten(1)
    pairs = {row: known.columns[key] for key, row in vocabulary.columns.items() if key in known.columns}
    rows, old = list(pairs), list(pairs.values())
    head.weight.copy_(weight.mean(0))
    head.bias.copy_(prior_bias(priors))
    head.weight[rows], head.bias[rows] = weight[old].to(head.weight), bias[old].to(head.bias)
    log.info("init_from: the head continues %d tags of %s; new: %d", len(pairs), path, len(vocabulary) - len(pairs))


def index_of(collection: Collection, setup: Setup) -> TagIndex:
    """Return a collection's tags as outputs. Raises UserError (`task.rating_s`, `data.root`)."""
    return index_tags(collection, vocabulary_of(setup.facts), read_rules(setup.task, "task."), CACHE)


def tag_fields(index: TagIndex, flip: np.ndarray | None) -> Fields:
    """Return what adds a sample's outputs, whether its rating is known, and `flip`, for `Mirror`."""

    def add(example: Example) -> Sample:
        row = example.draw.index
        tags = Ragged(torch.from_numpy(index.of_row(row).astype(np.int64)))
        fields = {"tags": tags, "rating_known": bool(index.rating_known[row])}
        return fields if flip is None else {**fields, "flip": int(flip[row])}

    return add


def read_flips(collection: Collection) -> np.ndarray | None:
    """Return the signs of a manifest's column `flip`, int8 [N], 0 where it is empty; None without the column.

    Raises UserError (`data.root`) where it has no numbers.
    """
    if "flip" not in collection.table.column_names:
        return None
    flips = collection.column("flip")
    if flips.dtype.kind not in "if":
        raise UserError(f"data.root: the column flip of {str(collection.root)!r} has no numbers; write -1, 0 or 1")
    return np.sign(np.nan_to_num(flips)).astype(np.int8)


def measure_priors(index: TagIndex, rows: np.ndarray, vocabulary: Vocabulary) -> list[float]:
    """Return the share of some images that has each output, of a rating among those with a known rating."""
    rows = rows[index.tagged[rows]]
    is_rating = np.asarray(vocabulary.categories) == RATING
    images = np.where(is_rating, index.rating_known[rows].sum(), len(rows))
    return (index.count(rows, len(vocabulary)) / np.maximum(images, 1)).tolist()


def choose_vocabulary(config: TaggingTaskConfig, collection: Collection) -> Vocabulary:
    """Return the vocabulary of `task.vocabulary`, or that of the training split."""
    if config.vocabulary is not None:
        with about("task.vocabulary"):
            return read_vocabulary(Path(config.vocabulary))
    wanted = VocabularyConfig(
        min_count=config.min_count, categories=["general", "character"], ignore=None, keep=None,
        **config.model_dump(include=set(TagRulesConfig.model_fields)),
    )  # fmt: skip
    return make_vocabulary(collection, wanted, "task.")


class TaggingKind(Kind):
    """Images with a tag of the vocabulary."""

    config, task = TaggingTaskConfig, TaggingTask
    names = FACTS
    output = "tags"
    next_commands = (
        "python evaluate.py run_dir={run} calibrate=true",
        "python export.py format=wd14 run_dir={run}",
        "python predict.py weights={run} input=FOLDER output=predictions.jsonl",
    )

    def find_facts(self, config: ImageTrainingConfig, collection: Collection) -> dict[str, Any]:
        """Return the vocabulary, and what training alone reads: the tags' frequencies, and what a mirror does."""
        rows = training_rows(collection, config.loop.train_paths)
        vocabulary = choose_vocabulary(config.task, collection)
        facts = vocabulary.facts()
        index = index_of(collection, Setup(config.model, config.task, facts=facts))
        log.info("tags: %s; %s", f"{len(vocabulary):,}", index.describe())
        facts["tag_priors"] = measure_priors(index, rows, vocabulary)
        if config.task.orientation is not None:
            facts["orientation"] = build_orientation(vocabulary, config.task.orientation, "task.orientation")
        return facts

    def samples(self, collection: Collection, setup: Setup) -> tuple[np.ndarray, Fields]:
        """Return the rows that have a tag, beside a rating, and what adds the tags."""
        index = index_of(collection, setup)
        return index.tagged, tag_fields(index, read_flips(collection))
