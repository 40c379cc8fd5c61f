"""Tagging: any number of tags for an image, each with its own probability."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from data.batch import Ragged, Sample, multi_hot
from data.collection import Collection
from data.config import VocabularyConfig
from data.image_data import ImageData
from data.loader import Example, Fields
from data.rows import refuse_weightless, training_rows
from data.tags.index import TagIndex, describe_report, index_tags
from data.tags.mirror import Mirror
from data.tags.orientation import build_orientation
from data.tags.rules import read_rules
from data.tags.vocabulary import make_vocabulary
from engine.measures.drawings import draw_pr_curves, draw_reliability, draw_tag_mistakes
from engine.measures.means import Means
from engine.measures.tag_confusions import TagConfusions
from engine.measures.tag_scores import TagScores
from engine.measures.tags import TagHistograms
from engine.measures.thresholds import calibrate, calibration_rows, fit_platt, measure_reliability, to_fit
from engine.measures.top_samples import TopSamples
from engine.streams import Streams
from engine.task import Exported, Knobs, Report, StepOutput, Task
from engine.tasks.head import find_head
from engine.tasks.image_pipeline import ImagePipeline, ImageTrainingConfig
from engine.tasks.kind import Calibrated, Kind, Setup, Targets, TaskConfig
from engine.tasks.mixing import Mixing
from engine.tasks.tag_exports import TAG_EXPORTS
from engine.tasks.tag_head import continue_head, prior_bias
from engine.tasks.tag_losses import TagLoss, TagLossConfig, frequency_weights
from models.build import build_network, check_image_size
from models.weights.initialise import initialise_from
from utils.config.schema import PathText
from utils.contracts import Batch
from utils.io.weights import InitFrom
from utils.ranks import distributed
from utils.record.logging import get_logger
from utils.vocabulary import FACTS, RATING, Vocabulary, read_vocabulary, vocabulary_of

log = get_logger(__name__)

CACHE = Path("outputs/cache/tags")
_SHOWN_AT = 0.35  # the threshold of the figures in training
_MISTAKES, _LINES = 24, 3  # images in the picture, and tags of each kind of mistake under an image
_PICTURE = ("sample_id", "images")
Alpha = Annotated[float, Field(ge=0, le=100)]


class TaggingTaskConfig(TaskConfig):
    """`mixup_alpha`, `cutmix_alpha` and their probabilities are those of `Mixing`.

    vocabulary: a selected_tags.csv; null: the general tags and characters on `min_count` training images or more.
    rating_s, aliases, implications: as in prepare.py. orientation: what a mirror does to tags: booru, glyphs, or the
    path of a map; null: no image is mirrored. tag_weight_power: 0 for equal weights (tag_losses.frequency_weights).
    """

    name: Literal["tagging"]
    vocabulary: PathText | None
    min_count: Annotated[int, Field(ge=1)]
    rating_s: Literal["sensitive", "general"] | None
    aliases: PathText | None
    implications: PathText | None
    orientation: PathText | None
    loss: TagLossConfig
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    tag_weight_power: Annotated[float, Field(ge=0, le=1)]
    mixup_alpha: Alpha
    cutmix_alpha: Alpha
    mix_probability: Annotated[float, Field(ge=0, le=1)]
    mix_switch_probability: Annotated[float, Field(ge=0, le=1)]

    def check_run(self, config: ImageTrainingConfig) -> None:
        """Raise ValueError for a mirror that knows nothing of tags."""
        if config.augment.horizontal_flip > 0:
            raise ValueError(
                f"augment.horizontal_flip: {config.augment.horizontal_flip:g} would mirror images without their tags; "
                "set augment.horizontal_flip=0, and task.orientation=booru to mirror both (or augment=tagger)"
            )


class TagFields:
    """Add a sample's outputs, whether its rating is known, and whether it may be mirrored (data/tags/mirror.py)."""

    def __init__(self, index: TagIndex, flip: np.ndarray | None) -> None:
        self._index, self._flip = index, flip

    def __call__(self, example: Example) -> Sample:
        """Return the fields."""
        row = example.index
        fields: Sample = {
            "tags": Ragged(torch.from_numpy(self._index.of_row(row).astype(np.int64))),
            "rating_known": torch.tensor(bool(self._index.rating_known[row])),
        }
        if self._flip is not None:
            fields["flip"] = torch.tensor(int(self._flip[row]), dtype=torch.int8)
        return fields


class TaggingTask(Task):
    """Own a tagger of a vocabulary, whose order is that of its outputs."""

    best_metric: ClassVar[str] = "mAP"
    best_is_lowest: ClassVar[bool] = False

    def __init__(self, setup: Setup[TaggingTaskConfig]) -> None:
        super().__init__()
        config, facts = setup.task, setup.facts
        check_image_size(setup.model, tuple(setup.preprocessing["image_size_hw"]))
        self.vocabulary = vocabulary_of(facts)
        width = len(self.vocabulary)
        self.network = build_network(setup.model, num_classes=width)
        self.normalise = setup.normalise()
        self.loss, self.label_smoothing = TagLoss(config.loss), config.label_smoothing
        self.knob_names = self.loss.scheduled
        self._mixing = Mixing(
            config.mixup_alpha, config.cutmix_alpha, config.mix_probability, config.mix_switch_probability
        )
        # Facts of training, which weight files do not have.
        self.mirror = Mirror(facts["orientation"], width) if facts.get("orientation") else None
        priors = facts.get("tag_priors")
        self._priors = None if priors is None else torch.tensor(priors, device="cpu")
        if priors is not None:
            find_head(self.network).bias.data.copy_(prior_bias(torch.tensor(priors)))
        counts = torch.tensor(self.vocabulary.counts)
        weights = frequency_weights(counts, config.tag_weight_power) if config.tag_weight_power else None
        self.register_buffer("tag_weights", weights, persistent=False)
        is_rating = torch.tensor(self.vocabulary.categories) == RATING
        self.register_buffer("is_rating", is_rating, persistent=False)
        self._metadata = {**setup.metadata(), "vocabulary_hash": self.vocabulary.hash}
        for name in ("orientation", "tag_priors"):
            self._metadata.pop(name, None)

    def initialise(self, source: InitFrom | None) -> None:
        """Load the network of a run or file; of a tagger of ours, the rows of its head by the tags' names."""
        self.origin = initialise_from(self.network, source, keep_head=False)
        if source is not None and self._priors is not None:
            continue_head(self.network, source, self.vocabulary, self._priors)

    def exported(self) -> Exported:
        """Return the network, its vocabulary and its preprocessing."""
        return Exported(metadata=self._metadata)

    def targets(self, batch: Batch) -> Tensor:
        """Return the targets float32 [B, T]: 1 with the tag, 0 without, NaN for the ratings where none is known."""
        targets = multi_hot(batch["tags"], batch["tags_offsets"], len(self.vocabulary))
        return targets.masked_fill(~batch["rating_known"][:, None] & self.is_rating, torch.nan)

    def forward(self, batch: Batch, knobs: Knobs) -> StepOutput:
        """Return each sample's loss, the sum over the tags that are known of it."""
        images, targets = batch["images"], self.targets(batch)
        if self.mirror is not None and self.training:
            images, targets = self.mirror(images, targets, batch.get("flip"), batch["key"])
        images = self.normalise(images)
        if self._mixing.is_on and self.training:
            images, targets = self._mix(images, targets, batch["weight"])
        logits = self.network(images).float()
        return StepOutput(self.sum_losses(logits, targets, knobs), self._logs(logits, targets, batch["weight"]))

    def sum_losses(self, logits: Tensor, targets: Tensor, knobs: Knobs) -> Tensor:
        """Return the loss of each sample [B]; a target that is NaN counts nothing."""
        known = ~targets.isnan()
        soft = targets.nan_to_num() * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = self.loss(logits, soft, knobs).where(known, 0.0)
        return (losses if self.tag_weights is None else losses * self.tag_weights).sum(dim=1)

    @torch.compiler.disable
    def _mix(self, images: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images and targets; train_step has seeded the draws."""
        return self._mixing(images, targets, weight)

    @torch.no_grad()
    def _logs(self, logits: Tensor, targets: Tensor, weight: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return precision and recall of all decisions at one threshold."""
        valid = (weight > 0)[:, None] & ~targets.isnan()
        predicted = (logits > np.log(_SHOWN_AT / (1 - _SHOWN_AT))) & valid
        has = (targets > 0.5) & valid
        right = (predicted & has).sum().float()
        return {"precision": (right, predicted.sum().float()), "recall": (right, has.sum().float())}

    # -------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, loaders: Mapping[str, Iterable[Batch]], step: int) -> Report:
        """Measure all samples of `val`: mAP, F1 where precision equals recall, and more (measures/tag_scores.py).

        Tables: `tags`, `tag_groups`, `hardest_tags`, `confusions`. Images: `pr_curves`, `mistakes`.
        """
        means, counts, worst = Means(), TagHistograms(len(self.vocabulary)), TopSamples(_MISTAKES)
        confusions = TagConfusions(self.vocabulary)
        for batch in loaders["val"]:
            logits, targets, valid = self._measure(batch)
            loss = self._plain_loss(logits, targets)
            means.add({"loss": loss}, valid)
            counts.add(logits, targets.nan_to_num(), valid, ~targets.isnan())
            confusions.add(logits, targets, valid)
            worst.add(loss, valid, {**_find_mistakes(logits, targets), **{name: batch[name] for name in _PICTURE}})
        scores = TagScores(counts.reduce(), self.vocabulary)
        measured, kept, pairs = means.reduce(), worst.reduce(), confusions.reduce()
        report = Report({"loss": measured["loss"], **scores.scalars(), "samples": measured["samples"]})
        if distributed.is_main():
            report.tables = {**scores.tables(), "confusions": pairs}
            report.images = {
                "pr_curves": draw_pr_curves(scores.groups),
                "mistakes": draw_tag_mistakes(kept, self.vocabulary.names),
            }
        return report

    def calibrate(self, loader: Iterable[Batch], wanted: Targets) -> Calibrated:
        """Fit thresholds on one half of the samples, by their keys, and measure them on the other."""
        fitted, others = (TagHistograms(len(self.vocabulary)) for _ in range(2))
        for batch in loader:
            logits, targets, valid = self._measure(batch)
            half, known = to_fit(batch["key"]), ~targets.isnan()
            for counts, own in ((fitted, half), (others, ~half)):
                counts.add(logits, targets.nan_to_num(), valid & own, known)
        mine, theirs = (TagScores(counts.reduce(), self.vocabulary) for counts in (fitted, others))
        table = calibrate(mine, theirs, wanted.precision, wanted.recall)
        group, scaling = theirs.groups["all"], fit_platt(mine.groups["all"])
        curves = {"as trained": measure_reliability(group), "scaled": measure_reliability(group, *scaling)}
        rows = calibration_rows(mine, theirs)
        return Calibrated(table, Report(tables={"calibration": rows}, images={"reliability": draw_reliability(curves)}))

    def _measure(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits and targets [B, T], and which samples are valid [B]."""
        return self.network(self.normalise(batch["images"])).float(), self.targets(batch), batch["weight"] > 0

    def _plain_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each sample [B], whatever the loss in training, so that runs compare."""
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
        return losses.where(~targets.isnan(), 0.0).sum(dim=1)


def _find_mistakes(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the worst tags of each sample, as `draw_tag_mistakes` shows them."""
    probs, most = logits.sigmoid(), min(_LINES, logits.shape[1])
    wrong, missed = (probs * (targets == 0)).topk(most), ((1 - probs) * (targets == 1)).topk(most)
    return {
        "wrong": wrong.indices, "wrong_prob": wrong.values, "missed": missed.indices, "missed_prob": missed.values,
    }  # fmt: skip


class TaggingPipeline(ImagePipeline[TaggingTaskConfig]):
    """Images with a tag of the vocabulary."""

    def index(self, collection: Collection, setup: Setup[TaggingTaskConfig]) -> TagIndex:
        """Return the collection's tags as outputs."""
        return index_of(collection, vocabulary_of(setup.facts), setup.task)

    def rows(self, collection: Collection, setup: Setup[TaggingTaskConfig], rows: np.ndarray) -> np.ndarray:
        """Return the rows that have a tag, beside a rating."""
        return rows[self.index(collection, setup).tagged[rows]]

    def fields(self, collection: Collection, setup: Setup[TaggingTaskConfig]) -> Fields:
        """Return what adds the tags."""
        flip = collection.column("flip") if "flip" in collection.table.column_names else None
        return TagFields(self.index(collection, setup), flip)

    def streams(self, data: ImageData, setup: Setup[TaggingTaskConfig], config: ImageTrainingConfig) -> Streams:
        """Return the data of a run."""
        streams = super().streams(data, setup, config)
        tags = f"{len(setup.facts['tag_names']):,}; {describe_report(self.index(data.collection, setup).report)}"
        return replace(streams, described={**streams.described, "tags": tags})


def index_of(collection: Collection, vocabulary: Vocabulary, config: TaggingTaskConfig) -> TagIndex:
    """Return a collection's tags as outputs of a vocabulary. Raises UserError (`task.rating_s`, `data.root`)."""
    rules = read_rules(config.rating_s, config.aliases, config.implications, "task.")
    return index_tags(collection, vocabulary, rules, CACHE)


class TaggingKind(Kind[TaggingTaskConfig]):
    """Images with tags."""

    config = TaggingTaskConfig
    pipeline = TaggingPipeline()
    scripts = ("train", "finetune")
    output = "tags"
    fact_names = FACTS
    next_commands = (
        "python evaluate.py run_dir={run} calibrate=true",
        "python export.py format=wd14 run_dir={run}",
        "python predict.py weights={run} input=FOLDER output=predictions.jsonl",
    )
    exports = TAG_EXPORTS

    def find_facts(self, config: ImageTrainingConfig, collection: Collection) -> dict[str, Any]:
        """Return the vocabulary, and what training alone reads: the tags' frequencies, and what a mirror does."""
        refuse_weightless(collection)
        vocabulary = choose_vocabulary(config.task, collection)
        index = index_of(collection, vocabulary, config.task)
        rows = training_rows(collection, config.loop.train_paths)
        rows = rows[index.tagged[rows]]
        counts = np.bincount(np.concatenate([index.of_row(row) for row in rows]), minlength=len(vocabulary))
        facts = {**vocabulary.facts(), "tag_priors": (counts / len(rows)).tolist()}
        if config.task.orientation is not None:
            orientation = build_orientation(vocabulary, config.task.orientation, "task.orientation")
            log.debug("task.orientation=%s: %s", config.task.orientation, orientation.describe())
            facts["orientation"] = orientation.facts()
        return facts

    def build(self, setup: Setup[TaggingTaskConfig]) -> TaggingTask:
        """Return the task."""
        return TaggingTask(setup)

    def calibrate(self, task: TaggingTask, loader: Iterable[Batch], targets: Targets) -> Calibrated:
        """Return thresholds, and how well the probabilities are calibrated."""
        return task.calibrate(loader, targets)


def choose_vocabulary(config: TaggingTaskConfig, collection: Collection) -> Vocabulary:
    """Return the vocabulary of `task.vocabulary`, or that of the training split."""
    if config.vocabulary is not None:
        return read_vocabulary(Path(config.vocabulary), "task.vocabulary")
    wanted = VocabularyConfig(
        output=None, min_count=config.min_count, categories=["general", "character"], ignore=None, keep=None,
        aliases=config.aliases, implications=config.implications, rating_s=config.rating_s, append_to=None,
    )  # fmt: skip
    vocabulary, report = make_vocabulary(collection, wanted, "task.")
    log.debug("vocabulary: %s", report)
    return vocabulary
