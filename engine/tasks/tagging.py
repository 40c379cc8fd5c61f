"""Tagging: any number of tags per image, each with its own probability."""

import copy
from collections.abc import Iterable
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from data.collection.choose import training_rows
from data.collection.collection import Collection
from data.open import Data
from data.stream.loader import Fields
from data.tags.fields import read_targets, tag_fields
from data.tags.orientation import Mirror, build_orientation
from data.tags.rules import TagRulesConfig, VocabularyConfig, read_rules
from data.tags.tag_index import TagIndex, index_tags
from data.tags.vocabulary import append_vocabulary, make_vocabulary
from engine.measures.means import Means
from engine.measures.tag_drawings import draw_pr_curves, draw_tag_mistakes
from engine.measures.tag_scores import TagScores, calibrate, is_fitted
from engine.measures.tags import TagCounts, TagHistograms
from engine.measures.top_samples import TopSamples
from engine.task import Loaders, Report, StepOutput
from engine.tasks.change import AnyConfig, ConfigChange, Start
from engine.tasks.config import ImageTrainingConfig, TaggingTaskConfig
from engine.tasks.head import fit_new_tags
from engine.tasks.kind import Kind, Setup
from engine.tasks.mixing import MixingTask
from engine.tasks.opening import initial_metadata, read_tagger, stated_by_tagger
from engine.tasks.tag_losses import bce, prior_bias, tag_loss
from engine.update.runtime import Runtime
from models.image_model import output_layers
from models.weights.initialise import initialise_from
from utils.contracts import Batch, InitFrom, State
from utils.errors import UserError, about
from utils.formats.thresholds import DEFAULT, PER_TAG, ThresholdTable, find_thresholds
from utils.formats.vocabulary import (
    FACTS,
    FILE,
    Vocabulary,
    read_any_vocabulary,
    read_facts,
    vocabulary_of,
    write_vocabulary,
)
from utils.io.files import Json
from utils.io.weight_files import find_weights
from utils.ranks import distributed
from utils.record.logging import log

CACHE = Path("outputs/cache/tags")
_SHOWN_MISTAKES = 24  # images in the picture
_SHOWN_TAGS = 3  # of a kind of mistake, under an image
_LEAST_PRIOR = 1e-4  # for the entropy of a tag that no or every training image has
_LEAST_WEIGHT = 0.2  # of a tag that is learned


class TaggingTask(MixingTask):
    """Own a tagger. Its outputs have the order of its vocabulary."""

    best_metric = "mAP"
    best_is_lowest = False
    helpers = ("old",)  # a frozen copy of the tagger of `init_from`

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, setup.facts["tag_names"])
        self.vocabulary = vocabulary_of(setup.facts)
        self.loss = setup.task.loss
        self.append_to = setup.task.append_to
        self.thresholds = np.full(len(self.vocabulary), DEFAULT, np.float32)  # for `describe_images`
        self.keep_old = setup.task.keep_old
        self.old = None
        self.register_buffer(
            "old_tags", torch.tensor(setup.facts.get("old_tags", []), dtype=torch.bool), persistent=False
        )
        self.mirror = None
        self._priors = None
        self._tag_rule = None
        # Facts for training only; weight files do not have them.
        if "orientation" in setup.facts:
            self.mirror = Mirror(setup.facts["orientation"], len(self.vocabulary))
        if "tag_priors" in setup.facts:
            self._priors = torch.tensor(setup.facts["tag_priors"], device="cpu")
            for head in output_layers(self.network, "model.name", "choose another network").values():
                head.bias.data.copy_(prior_bias(self._priors))
            self._tag_rule = setup.task.tag_weights
        if self._tag_rule is not None:
            self.may_be_recorded = False
            priors = self._priors.clamp(_LEAST_PRIOR, 1 - _LEAST_PRIOR)
            self.register_buffer("entropy", F.binary_cross_entropy(priors, priors, reduction="none"), persistent=False)
            # Losses and labels of recent updates, and of this one on this rank.
            self.register_buffer("recent", torch.stack([self.entropy, torch.ones_like(priors)]))
            self.register_buffer("newest", torch.zeros_like(self.recent))

    def initialise(self, source: InitFrom | None) -> None:
        """Load the network of a run or file. The head of a tagger is matched by the names of tags."""
        if source is not None:
            self.origin = initialise_from(self.network, source, keep_head=False, match=self.match_head)

    @torch.no_grad()
    def match_head(self, state: State, metadata: Json, path: Path) -> State:
        """Return the tensors of the head with the rows of another tagger for the tags that it has, too.

        The row of a new tag starts as the mean of its rows, with the bias for the frequency of the tag. Raises
        UserError (`init_from`) if the vocabulary does not fit the head.
        """
        known = read_facts(path, metadata)
        pairs = {row: known.spelled[key] for key, row in self.vocabulary.spelled.items() if key in known.spelled}
        tensors = {}
        for name, head in output_layers(self.network, "init_from", "name another file").items():
            for part, parameter in head.named_parameters():
                values = state.get(f"{name}.{part}", torch.empty(0))
                if values.shape != (len(known), *parameter.shape[1:]):
                    raise UserError(f"init_from: {path} has no head of its {len(known)} tags; name a whole tagger")
                rows = parameter.clone() if part == "bias" else values.mean(0).expand_as(parameter).clone()
                rows[list(pairs)] = values[list(pairs.values())].to(rows)
                tensors[f"{name}.{part}"] = rows
        new = len(self.vocabulary) - len(pairs)
        log.info("init_from: the head keeps %d tags of %s; new: %d", len(pairs), path, new)
        return tensors

    def forward(self, batch: Batch, progress: Tensor) -> StepOutput:
        """Return each sample's loss."""
        images, targets = self.views(batch)
        logits = self.network(images).float()
        if self.old is None:
            losses = self.label_losses(logits, targets)
        else:
            is_open = targets.isnan() & self.old_tags
            with torch.no_grad():
                answers = self.old(images).float().sigmoid()
            losses = self.label_losses(logits, targets.where(~is_open, answers))
            losses = losses * torch.where(is_open, self.keep_old, 1.0)
        if self._tag_rule is not None:
            losses = losses * self.tag_weights()
            known = ~targets.isnan() & (batch["weight"] > 0)[:, None]
            self.newest += torch.stack([bce(logits.detach(), targets).where(known, 0.0), known]).sum(dim=1)
        return StepOutput(losses.sum(dim=1))

    def tag_weights(self) -> Tensor:
        """Return the weights of tags by `task.tag_weights`, float32 [T]: what the tagger still gets wrong counts more.

        (loss / entropy) ** power, from 0.2 to 1, divided by the mean. loss: the mean cross-entropy of recent updates,
        which fade over `window_steps`. entropy: the same of a tagger that knows the tag's frequency alone.
        Source: Guo et al., "Dynamic Task Prioritization for Multitask Learning", ECCV 2018: (1 - kappa) ** gamma, where
        kappa is a running measure of success. Differs: without the factor -log kappa; kappa is McFadden's pseudo R2.
        """
        weights = (self.recent[0] / self.recent[1] / self.entropy) ** self._tag_rule.power
        weights = weights.clamp(_LEAST_WEIGHT, 1)
        return weights / weights.mean()

    def after_step(self, step: int, progress: Tensor, applied: Tensor) -> None:
        """Take in the losses of tags in this update."""
        if self._tag_rule is not None:
            self.recent.mul_(1 - 1 / self._tag_rule.window_steps).add_(distributed.all_reduce_sum(self.newest))
            self.newest.zero_()

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return images for the network, and targets [B, T]. In training, both are mirrored and mixed."""
        images = batch["images"]
        targets = read_targets(batch, len(self.vocabulary))
        if self.training and self.mirror is not None:
            images, targets = self.mirror(images, targets, batch["key"])
        return self.mixing(self.normalise(images), targets, batch["weight"])

    def label_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the losses of the samples and tags [B, T], 0 where the target is NaN."""
        return tag_loss(self.loss, logits, targets.nan_to_num()).where(~targets.isnan(), 0.0)

    # -------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, loaders: Loaders, step: int) -> Report:
        """Measure all samples of `val`: mAP, F1 at equal precision and recall, and more (measures/tag_scores.py).

        Tables: `tags`, `tag_groups`, `tag_weights`. Images: `pr_curves`, `mistakes`.
        """
        report = self._measure(loaders["val"], None)[0]
        if self._tag_rule is not None:
            columns = [self.names, (self.recent[0] / self.recent[1]).tolist(), self.tag_weights().tolist()]
            report.tables["tag_weights"] = pa.table(columns, ["tag", "loss", "weight"]).to_pylist()
        return report

    def _measure(self, batches: Iterable[Batch], leads: np.ndarray | None) -> tuple[Report, list[TagCounts]]:
        """Return the report and counts: of the samples that thresholds are fitted to and of the others, or of all."""
        means = Means()
        worst = TopSamples(_SHOWN_MISTAKES)
        parts = [TagHistograms(len(self.vocabulary)) for _ in range(1 if leads is None else 2)]
        for batch in batches:
            logits, targets, loss = self._predict(batch)
            valid = batch["weight"] > 0
            means.add({"loss": loss}, valid)
            shares = [valid]
            if leads is not None:
                to_fit = is_fitted(torch.from_numpy(leads)[batch["sample_id"].cpu()]).to(valid.device)
                shares = [valid & to_fit, valid & ~to_fit]
            for part, share in zip(parts, shares):
                part.add(logits, targets, share)
            worst.add(loss, valid, _find_mistakes(batch, logits.sigmoid(), targets))
        counts = [part.reduce() for part in parts]
        scores = TagScores(reduce(TagCounts.join, counts), self.vocabulary, self.old_tags.cpu().numpy())
        measured = means.reduce()
        mistakes = worst.reduce()
        report = Report({"loss": measured["loss"], **scores.scalars(), "samples": measured["samples"]})
        if distributed.is_main():
            report.tables = scores.tables()
            report.images = {
                "pr_curves": lambda: draw_pr_curves(scores.groups),
                "mistakes": lambda: draw_tag_mistakes(mistakes, self.vocabulary.names),
            }
        return report, counts

    def describe_images(self, batch: Batch) -> pa.Table:
        """Return the tags, the predicted tags above `thresholds`, the errors and the loss.

        wrong_by, missed_by: the distances of the errors' probabilities from the thresholds.
        """
        logits, targets, loss = self._predict(batch)
        probs = logits.sigmoid().cpu().numpy()
        targets = targets.cpu().numpy()
        has = targets == 1
        predicted = probs >= self.thresholds
        wrong = predicted & (targets == 0)
        masks = {"tags": has, "prediction": predicted, "wrong": wrong, "missed": has & ~predicted}
        names = np.broadcast_to(np.array(self.vocabulary.names, object), probs.shape)
        columns = {name: _select(names, mask, pa.string()) for name, mask in masks.items()}
        distance = np.abs(probs - self.thresholds)
        columns["probability"] = _select(probs, predicted, pa.float32())
        columns |= {f"{name}_by": _select(distance, masks[name], pa.float32()) for name in ("wrong", "missed")}
        return pa.table({**columns, "loss": loss.cpu().numpy()})

    def calibrate(
        self, batches: Iterable[Batch], leads: np.ndarray, precision: float, recall: float
    ) -> tuple[Report, ThresholdTable]:
        """Measure all samples, as `evaluate`. Fit thresholds to one half of them, and measure these on the other half.

        leads: `Collection.leads`, so that near-duplicates are in one half. With `append_to`, tags that the samples do
        not label keep their thresholds.
        """
        report, halves = self._measure(batches, leads)
        if not all(counts.histograms[:, 1].any() for counts in halves):
            lack = "tag" if all(counts.histograms.any() for counts in halves) else "image"
            raise UserError(f"calibrate: the images are too few: one half has no {lack}; name more images (data.root)")
        table = calibrate(*(TagScores(counts, self.vocabulary) for counts in halves), precision, recall)
        labels = sum(counts.histograms.sum((1, 2)) for counts in halves).tolist()
        unlabelled = {key for key, count in zip(self.vocabulary.columns, labels) if not count}
        if self.append_to and unlabelled:
            earlier = find_thresholds(
                None, find_weights(self.append_to, "best"), (self.origin or {}).get("weights_hash")
            )
            table = table.keep(unlabelled, earlier)
        self.use_thresholds(table)
        return report, table

    def use_thresholds(self, table: ThresholdTable | None) -> None:
        """Let `describe_images` decide by a table's thresholds; None keeps the default one."""
        if table is not None:
            self.thresholds = np.float32(table.of_tags(self.vocabulary, PER_TAG))

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits and targets [B, T], and the cross-entropy [B], which compares runs with different losses."""
        images, targets = self.views(batch)
        logits = self.network(images).float()
        return logits, targets, bce(logits, targets.nan_to_num()).where(~targets.isnan(), 0.0).sum(dim=1)


def _select(values: np.ndarray, mask: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return lists of the values of the rows where the mask is true."""
    return pa.array([row[chosen] for row, chosen in zip(values, mask)], pa.list_(kind))


def _find_mistakes(batch: Batch, probs: Tensor, targets: Tensor) -> State:
    """Return the images [B] and their worst tags of both kinds of mistakes, with the error of the probabilities."""
    mistakes = {name: batch[name] for name in ("sample_id", "images")}
    errors = {"wrong": probs * (targets == 0), "missed": (1 - probs) * (targets == 1)}
    for name, error in errors.items():
        mistakes[f"{name}_prob"], mistakes[name] = error.topk(min(_SHOWN_TAGS, error.shape[1]))
    return mistakes


def index_of(collection: Collection, setup: Setup) -> TagIndex:
    """Return a collection's tags as output numbers. Raises UserError (`task.rating_s`, `data.root`)."""
    return index_tags(
        collection,
        vocabulary_of(setup.facts),
        read_rules(setup.task, "task."),
        CACHE,
        setup.task.known if setup.task.append_to or "old_tags" in setup.facts else ["*"],
    )


def old_vocabulary(config: ImageTrainingConfig) -> Vocabulary | None:
    """Return the vocabulary of the tagger that a run begins with; None for other weights."""
    if config.init_from in (None, "timm"):
        return None
    metadata = initial_metadata(config)
    return vocabulary_of(metadata) if "tag_names" in metadata else None


def _describe_old(index: TagIndex, collection: Collection, is_old: list[bool], keeps: bool) -> str:
    """Return how the tags of the tagger that a run begins with are trained and judged. is_old: of each output."""
    old = np.array(is_old)
    unknown = index.count_known(np.arange(len(collection)), len(old)) == 0
    unjudged = np.array(index.shares(collection.rows("val"), len(old))) == 0
    kept = "a frozen copy of the tagger holds them" if keeps else "nothing holds them (task.keep_old=0)"
    return (
        f"tags of the tagger: {old.sum():,}, of which {unknown[old].sum():,} are unknown on all images (task.known): "
        f"{kept}; new tags: {(~old).sum():,}; not judged: {unjudged.sum():,} tags that no validation image has"
    )


def append_tags(known: Vocabulary, wanted: Vocabulary) -> Vocabulary:
    """Return a tagger's vocabulary, followed by the tags that only `wanted` has. Raises UserError if there are none."""
    both = append_vocabulary(known, wanted)
    if len(both) == len(known):
        raise UserError(
            f"task.append_to: it has all {len(wanted):,} tags; lower task.min_count, or name a longer task.vocabulary"
        )
    return both


def choose_vocabulary(config: TaggingTaskConfig, collection: Collection) -> Vocabulary:
    """Read `task.vocabulary`, or build the vocabulary from the training split."""
    if config.vocabulary is not None:
        with about("task.vocabulary"):
            return read_any_vocabulary(Path(config.vocabulary))
    rules = VocabularyConfig(
        min_count=config.min_count, categories=["general", "character"], ignore=None, keep=None,
        **config.model_dump(include=set(TagRulesConfig.model_fields)),
    )  # fmt: skip
    return make_vocabulary(collection, rules, "task.")


@about("task.append_to")
def _append(config: AnyConfig, start: Start) -> AnyConfig:
    """Return the configuration with the weights, network and image decoding of `append_to`, and without steps."""
    if config.task.append_to is None:
        return config
    path = find_weights(config.task.append_to, "best")
    read_tagger(path)
    config = config.changed({"init_from": str(path), "loop.total_steps": 0})
    return config.changed(stated_by_tagger(config))


class TaggingKind(Kind):
    """Images with at least one tag of the vocabulary."""

    task = TaggingTask
    names = FACTS
    optional_names = ("old_tags",)
    output = "tags"
    changes = (
        ConfigChange(_append, "new tags are fitted to a tagger without training", "task.append_to"),
        *Kind.changes,
    )
    evaluation_command = "python evaluate.py run_dir={run} calibrate=true"
    next_commands = (
        "python export.py format=wd14 run_dir={run}",
        "python predict.py weights={run} input=FOLDER output=predictions.jsonl",
    )

    def find_facts(self, config: ImageTrainingConfig, collection: Collection) -> Json:
        """Return the vocabulary and, for training only, the tags' frequencies and how mirroring changes them."""
        vocabulary = choose_vocabulary(config.task, collection)
        old = old_vocabulary(config)
        if config.task.append_to is not None:
            vocabulary = append_tags(old, vocabulary)
        elif old is not None and config.task.vocabulary is None:
            vocabulary = append_vocabulary(old, vocabulary)
        facts = vocabulary.facts()
        if old is not None:
            facts["old_tags"] = [key in old.spelled for key in vocabulary.spelled]
        index = index_of(collection, Setup(config.model, config.task, facts=facts))
        priors = index.shares(training_rows(collection, config.loop, index.tagged), len(vocabulary))
        facts["tag_priors"] = priors
        without = f"{priors.count(0):,} of them on no training image"
        log.info("tags: %s, %s; %s", f"{len(vocabulary):,}", without, index.describe(vocabulary))
        if old is not None:
            log.info("%s", _describe_old(index, collection, facts["old_tags"], config.task.keep_old > 0))
        if config.task.orientation is not None:
            facts["orientation"] = build_orientation(vocabulary, config.task.orientation)
        return facts

    def preprocessing(self, config: ImageTrainingConfig) -> Json:
        """Return how evaluation prepares an image; with `append_to`, as the existing tagger does."""
        if config.task.append_to is None:
            return super().preprocessing(config)
        return read_tagger(Path(config.init_from))["preprocessing"]

    def prepare(
        self,
        task: TaggingTask,
        data: Data,
        setup: Setup,
        config: ImageTrainingConfig,
        runtime: Runtime,
        is_new: bool,
    ) -> None:
        """Fit the new tags of `task.append_to`, or keep the tagger that the run begins with (`task.keep_old`)."""
        if config.task.append_to is None and config.task.keep_old and task.old_tags.any():
            task.old = copy.deepcopy(task.network)
            if not is_new:
                source = InitFrom(config.init_from, config.init_weights)
                initialise_from(task.old, source, keep_head=False, match=task.match_head)
            task.train()
        elif is_new and config.task.append_to is not None:
            index = index_of(data.collection, setup)
            fit_new_tags(task, data, training_rows(data.collection, config.loop, index.tagged), index, setup)

    def write(self, folder: Path, setup: Setup) -> None:
        """Write the vocabulary."""
        write_vocabulary(folder / FILE, vocabulary_of(setup.facts))

    def samples(self, collection: Collection, setup: Setup) -> tuple[np.ndarray, Fields]:
        """Return the rows with at least one tag other than a rating, and a function that adds the tags."""
        index = index_of(collection, setup)
        return index.tagged, tag_fields(index)
