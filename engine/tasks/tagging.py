"""Tagging: any number of tags for an image, each with its own probability."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from data.batch import Ragged, Sample, multi_hot
from data.collection import Collection
from data.config import TagRulesConfig, VocabularyConfig
from data.loader import Example, Fields
from data.open import Data
from data.rows import training_rows
from data.tags.index import TagIndex, describe_report, index_tags
from data.tags.orientation import Mirror, build_orientation
from data.tags.rules import read_rules
from data.tags.vocabulary import make_vocabulary
from engine.measures.drawings import draw_pr_curves, draw_tag_mistakes
from engine.measures.means import Means
from engine.measures.tag_confusions import TagConfusions
from engine.measures.tag_scores import TagScores
from engine.measures.tags import TagHistograms
from engine.measures.thresholds import calibrate, to_fit
from engine.measures.top_samples import TopSamples
from engine.streams import Streams
from engine.task import Exported, Report, StepOutput, Task
from engine.tasks.image_pipeline import ImagePipeline, ImageTrainingConfig
from engine.tasks.kind import Kind, Setup, Targets
from engine.tasks.mixing import MixingConfig
from engine.tasks.tag_head import continue_head, prior_bias
from engine.tasks.tag_losses import TagLoss, TagLossConfig, bce, frequency_weights
from models.build import build_network, check_image_size
from models.image_model import find_head
from models.weights.initialise import initialise_from
from utils.config.bounds import BelowOne, Count, Fraction
from utils.config.schema import PathText
from utils.contracts import Batch
from utils.errors import UserError
from utils.io.weights import InitFrom
from utils.ranks import distributed
from utils.record.logging import get_logger
from utils.thresholds import DEFAULT_LOGIT, PER_TAG, ThresholdTable
from utils.vocabulary import FACTS, RATING, Vocabulary, read_facts, read_vocabulary, vocabulary_of

log = get_logger(__name__)

CACHE = Path("outputs/cache/tags")
_MISTAKES, _LINES = 24, 3  # images in the picture, and tags of each kind of mistake under an image
_PICTURE = ("sample_id", "images")


class TaggingTaskConfig(MixingConfig, TagRulesConfig):
    """How a tagger is trained.

    vocabulary: a selected_tags.csv; null: the general tags and characters on `min_count` training images or more.
    orientation: what a mirror does to tags: booru, glyphs, or the path of a map; null: no image is mirrored.
    tag_weight_power: 0 for equal weights (tag_losses.frequency_weights).
    """

    name: Literal["tagging"]
    vocabulary: PathText | None
    min_count: Count
    orientation: PathText | None
    loss: TagLossConfig
    label_smoothing: BelowOne
    tag_weight_power: Fraction

    @property
    def mirrors(self) -> bool:
        """Whether it mirrors images and their tags."""
        return self.orientation is not None

    def check_run(self, config: ImageTrainingConfig) -> None:
        """Raise UserError for a mirror that knows nothing of tags."""
        if config.augment.horizontal_flip > 0:
            raise UserError(
                f"augment.horizontal_flip: {config.augment.horizontal_flip:g} would mirror images without their tags; "
                "set augment.horizontal_flip=0, and task.orientation=booru to mirror both (or augment=tagger)"
            )


class TagFields:
    """Add a sample's outputs, whether its rating is known, and whether it may be mirrored (`Mirror`)."""

    def __init__(self, index: TagIndex, flip: np.ndarray | None) -> None:
        self._index, self._flip = index, flip

    def __call__(self, example: Example) -> Sample:
        """Return the fields."""
        row = example.draw.index
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
        self._mixing = config.mixing()
        # Facts of training, which weight files do not have.
        orientation, priors = facts.get("orientation"), facts.get("tag_priors")
        self.mirror = None if orientation is None else Mirror(orientation, width)
        self._priors = None if priors is None else torch.tensor(priors, device="cpu")
        if priors is not None:
            head = find_head(self.network, "model.name", "choose another network")
            head.bias.data.copy_(prior_bias(self._priors))
        counts = torch.tensor(self.vocabulary.counts)
        weights = frequency_weights(counts, config.tag_weight_power) if config.tag_weight_power else None
        self.register_buffer("tag_weights", weights, persistent=False)
        is_rating = torch.tensor(self.vocabulary.categories) == RATING
        self.register_buffer("is_rating", is_rating, persistent=False)
        self._metadata = {**setup.metadata(*FACTS), "vocabulary_hash": self.vocabulary.hash}

    def initialise(self, source: InitFrom | None) -> None:
        """Load the network of a run or file; of a tagger of ours, the rows of its head by the tags' names."""
        self.origin = initialise_from(self.network, source, keep_head=False)
        if source is not None:
            continue_head(self.network, source, self.vocabulary, self._priors)

    def exported(self) -> Exported:
        """Return the network, its vocabulary and its preprocessing."""
        return Exported(metadata=self._metadata)

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
        images = self.normalise(images)
        mixes = self.training and self._mixing.is_on
        return self._mixing(images, targets, batch["weight"]) if mixes else (images, targets)

    def label_losses(self, logits: Tensor, targets: Tensor, progress: Tensor) -> Tensor:
        """Return the loss of each sample [B], the sum over its tags; a target that is NaN counts nothing."""
        known = ~targets.isnan()
        soft = targets.nan_to_num() * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = self.loss(logits, soft, progress).where(known, 0.0)
        return (losses if self.tag_weights is None else losses * self.tag_weights).sum(dim=1)

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

        Tables: `tags`, `tag_groups`, `hardest_tags`, `confusions`. Images: `pr_curves`, `mistakes`.
        """
        means, counts, worst = Means(), TagHistograms(len(self.vocabulary)), TopSamples(_MISTAKES)
        confusions = TagConfusions(self.vocabulary)
        for batch in loaders["val"]:
            logits, targets, valid = self._measure(batch)
            # The cross-entropy, whatever the loss in training, so that runs compare.
            loss = bce(logits, targets.nan_to_num()).where(~targets.isnan(), 0.0).sum(dim=1)
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

    def calibrate(self, loader: Iterable[Batch], wanted: Targets) -> tuple[ThresholdTable, Report]:
        """Fit thresholds on one half of the samples, by their keys, and measure them on the other."""
        fitted, others = (TagHistograms(len(self.vocabulary)) for _ in range(2))
        for batch in loader:
            logits, targets, valid = self._measure(batch)
            half, known = to_fit(batch["key"]), ~targets.isnan()
            for counts, own in ((fitted, half), (others, ~half)):
                counts.add(logits, targets.nan_to_num(), valid & own, known)
        mine, theirs = (TagScores(counts.reduce(), self.vocabulary) for counts in (fitted, others))
        table = calibrate(mine, theirs, wanted.precision, wanted.recall)
        profiles = [asdict(row) for row in table.rows if row.profile != PER_TAG]
        return table, Report(tables={"thresholds": profiles})

    def _measure(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
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


class TaggingPipeline(ImagePipeline[TaggingTaskConfig]):
    """Images with a tag of the vocabulary."""

    def check_metadata(self, path: Path, key: str, metadata: Mapping[str, Any]) -> None:
        """Raise UserError (`key`) that names the first wrong value of a weight file's preprocessing and vocabulary."""
        super().check_metadata(path, key, metadata)
        read_facts(path, key, metadata)

    def index(self, collection: Collection, setup: Setup[TaggingTaskConfig]) -> TagIndex:
        """Return the collection's tags as outputs."""
        return index_of(collection, vocabulary_of(setup.facts), setup.task)

    def rows(self, collection: Collection, setup: Setup[TaggingTaskConfig], rows: np.ndarray) -> np.ndarray:
        """Return the rows that have a tag, beside a rating."""
        return rows[self.index(collection, setup).tagged[rows]]

    def fields(self, collection: Collection, setup: Setup[TaggingTaskConfig]) -> Fields:
        """Return what adds the tags."""
        return TagFields(self.index(collection, setup), read_flips(collection))

    def streams(self, data: Data, setup: Setup[TaggingTaskConfig], config: ImageTrainingConfig) -> Streams:
        """Return the data of a run."""
        streams = super().streams(data, setup, config)
        tags = f"{len(setup.facts['tag_names']):,}; {describe_report(self.index(data.collection, setup).report)}"
        return replace(streams, described={**streams.described, "tags": tags})


def index_of(collection: Collection, vocabulary: Vocabulary, config: TaggingTaskConfig) -> TagIndex:
    """Return a collection's tags as outputs of a vocabulary. Raises UserError (`task.rating_s`, `data.root`)."""
    return index_tags(collection, vocabulary, read_rules(config, "task."), CACHE)


def read_flips(collection: Collection) -> np.ndarray | None:
    """Return the column `flip` of a manifest, int8 [N], 0 where it is empty; None without one.

    Raises UserError (`data.root`) for other values than those of `TagFields`.
    """
    if "flip" not in collection.table.column_names:
        return None
    values = collection.column("flip")
    if wrong := set(values[values == values].tolist()) - {-1, 0, 1}:
        raise UserError(
            f"data.root: the column flip of {str(collection.root)!r} has {next(iter(wrong))!r}; it may have -1 (never "
            "mirrored), 1 (always) and 0 or nothing (by chance)"
        )
    return np.nan_to_num(values).astype(np.int8)


def measure_priors(index: TagIndex, rows: np.ndarray, vocabulary: Vocabulary) -> list[float]:
    """Return the share of some images that has each output, of a rating among those with a known rating.

    Raises UserError (`data.root`) where no image has a tag.
    """
    rows = rows[index.tagged[rows]]
    if len(rows) == 0:
        raise UserError(
            "data.root: no training image has a tag of the vocabulary; give the training split sidecars, or choose "
            "another task.vocabulary or loop.train_paths"
        )
    is_rating = np.asarray(vocabulary.categories) == RATING
    images = np.where(is_rating, max(1, index.rating_known[rows].sum()), len(rows))
    return (index.count(rows, len(vocabulary)) / images).tolist()


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

    def find_facts(self, config: ImageTrainingConfig, collection: Collection) -> dict[str, Any]:
        """Return the vocabulary, and what training alone reads: the tags' frequencies, and what a mirror does."""
        rows = training_rows(collection, config.loop.train_paths)
        vocabulary = choose_vocabulary(config.task, collection)
        index = index_of(collection, vocabulary, config.task)
        facts = {**vocabulary.facts(), "tag_priors": measure_priors(index, rows, vocabulary)}
        if config.task.orientation is not None:
            facts["orientation"] = build_orientation(vocabulary, config.task.orientation, "task.orientation")
        return facts

    def build(self, setup: Setup[TaggingTaskConfig]) -> TaggingTask:
        """Return the task."""
        return TaggingTask(setup)

    def calibrate(self, task: TaggingTask, loader: Iterable[Batch], targets: Targets) -> tuple[ThresholdTable, Report]:
        """Return thresholds, and how well the probabilities are calibrated."""
        return task.calibrate(loader, targets)


def choose_vocabulary(config: TaggingTaskConfig, collection: Collection) -> Vocabulary:
    """Return the vocabulary of `task.vocabulary`, or that of the training split."""
    if config.vocabulary is not None:
        return read_vocabulary(Path(config.vocabulary), "task.vocabulary")
    wanted = VocabularyConfig(
        min_count=config.min_count, categories=["general", "character"], ignore=None, keep=None,
        append_to=None, **config.model_dump(include=set(TagRulesConfig.model_fields)),
    )  # fmt: skip
    vocabulary, report = make_vocabulary(collection, wanted, "task.")
    log.debug("vocabulary: %s", report)
    return vocabulary
