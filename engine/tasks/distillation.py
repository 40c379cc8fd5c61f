"""Distillation: a student learns what a frozen teacher makes of the same views, mixed ones too.

The loss is (1 - label_share) * logits + label_share * labels + feature_weight * features, of what `task` names. Logits
are divided by the temperature, and compared by the cross-entropy of each tag, summed, or by the divergence of classes.
A linear map of the student's features (what a head reads) is compared with the teacher's, standardised for each image.

A student of logits is a tagger or classifier: its weight files are those of task=tagging or task=classification, with
the teacher's tags or classes, and need no teacher. A student of features alone has no head.

Source: Hinton et al. 2015 (arXiv 1503.02531); Beyer et al. 2022 (arXiv 2106.05237), the same mixed views; Wei et al.
2022 (arXiv 2205.14141), equation 2, features. Differs: features are pooled.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from data.collection import Collection
from data.config import TagRulesConfig
from data.loader import Fields, no_fields
from data.open import Data
from data.rows import training_rows
from data.tags.index import NoKnownTag
from data.tags.orientation import build_orientation
from engine.measures.means import measure_means
from engine.task import Exported, Report, Roles, StepOutput, Task, log_mean
from engine.tasks.classification import (
    ClassificationKind,
    ClassificationPipeline,
    ClassificationTask,
    ClassificationTaskConfig,
)
from engine.tasks.image_pipeline import ImagePipeline, ImageTrainingConfig
from engine.tasks.kind import Kind, Setup, check_weights
from engine.tasks.mixing import MixingConfig
from engine.tasks.pretrained import stated_preprocessing
from engine.tasks.tag_losses import TagLossConfig, bce
from engine.tasks.tagging import TaggingKind, TaggingPipeline, TaggingTask, TaggingTaskConfig
from models.build import build_network, check_image_size
from models.config import ModelConfig, TimmConfig
from models.normalise import Normalise
from models.weights.fit import load_into
from models.weights.initialise import initialise_from
from models.weights.timm_hub import read_timm
from utils.config.bounds import BelowOne, Positive
from utils.config.schema import PathText
from utils.contracts import Batch
from utils.errors import UserError, close_names
from utils.io.weights import InitFrom, find_weights, read_weights
from utils.record.logging import get_logger
from utils.vocabulary import RATING, vocabulary_of

log = get_logger(__name__)

_KEY = "task.teacher"
_BCE = TagLossConfig(name="bce", gamma_pos=0.0, gamma_neg=0.0, clip=0.0, alpha=None, margin=0.0)


class DistillationTaskConfig(MixingConfig, TagRulesConfig):
    """What a student learns.

    teacher: a run or weight file of a tagger or classifier of ours, or the name of a network of timm that has weights.
    label_share: of the labels' loss beside that of the logits; 0: images need no labels, and none is read in training.
    Rules and orientation are of tags as labels, as in task=tagging.
    """

    name: Literal["distillation"]
    teacher: PathText
    targets: Literal["logits", "features", "both"]
    temperature: Positive
    label_share: BelowOne
    feature_weight: Positive
    orientation: PathText | None

    @property
    def mirrors(self) -> bool:
        """Whether it mirrors images and the tags that are their labels."""
        return self.orientation is not None and self.label_share > 0

    def check_run(self, config: ImageTrainingConfig) -> None:
        """Raise ValueError for images of many shapes, because a teacher sees one."""
        if config.augment.pad == "buckets":
            raise ValueError(
                "augment.pad: buckets gives images many shapes, and a teacher sees images of one; set "
                "augment.pad=square or none"
            )


def _outside(setup: Setup[DistillationTaskConfig]) -> tuple[ImagePipeline | None, Setup]:
    """Return the setup of the task that a student is outside its run, and the pipeline that reads its labels."""
    if "tag_names" in setup.facts:
        shared = setup.task.model_dump(include=TaggingTaskConfig.model_fields.keys() - {"name"})
        task = TaggingTaskConfig(
            name="tagging", vocabulary=None, min_count=1, loss=_BCE, label_smoothing=0.0, tag_weight_power=0.0, **shared
        )
        return TaggingPipeline(), replace(setup, task=task)
    if "class_names" in setup.facts:
        shared = setup.task.model_dump(include=MixingConfig.model_fields.keys() - {"name"})
        task = ClassificationTaskConfig(
            name="classification", label_smoothing=0.0, class_weights="none", allow_missing_classes=True, head="drawn",
            **shared,
        )  # fmt: skip
        return ClassificationPipeline(), replace(setup, task=task)
    return None, setup


# --------------------------------------------------------------------------------------------------------- the students


def _run(network: nn.Module, images: Tensor, targets: str) -> tuple[Tensor | None, Tensor | None]:
    """Return the logits [B, K] and features [B, C] of those that are compared, float32."""
    if targets == "logits":
        return network(images).float(), None
    maps = network.forward_features(images)
    features = network.forward_head(maps, pre_logits=True).float()
    return (network.forward_head(maps).float() if targets == "both" else None), features


def _width(network: nn.Module) -> int:
    return getattr(network, "head_hidden_size", network.num_features)


class Student(Task):
    """What students share: the teacher and the loss. It stands before the task that the student is outside its run."""

    roles = Roles(frozen=("teacher",))

    def __init__(self, setup: Setup[DistillationTaskConfig]) -> None:
        outside = _outside(setup)[1]
        super().__init__(outside)
        config, teacher = setup.task, setup.facts.get("teacher")
        self._config, self._is_labelled, self.teacher = config, setup.facts.get("labelled", False), None
        self._metadata |= {"task": outside.task.model_dump(), "frozen": {}}  # a weight file needs no teacher
        if teacher is None:
            return
        self.teacher = build_network(TypeAdapter(ModelConfig).validate_python(teacher["model"]), teacher["outputs"])
        if config.targets != "logits":
            self.projection = nn.Linear(_width(self.network), _width(self.teacher))
        ours, theirs = setup.preprocessing, teacher["preprocessing"]
        mean = [(b - a) / scale for a, b, scale in zip(ours["mean"], theirs["mean"], ours["std"])]
        std = [b / scale for b, scale in zip(theirs["std"], ours["std"])]
        self.renormalise, self._teacher_hw = Normalise(mean, std, len(mean)), tuple(theirs["image_size_hw"])
        if not self._is_labelled:
            self.best_metric, self.best_is_lowest = "loss", True

    def load_frozen(self) -> None:
        """Load the teacher. Raises UserError (`task.teacher`)."""
        if self.teacher is None:
            return
        if path := _find_file(self._config.teacher):
            load_into(self.teacher, read_weights(path, _KEY)[0], keep_head=True, key=_KEY)
        else:
            load_into(self.teacher, read_timm(self.teacher, _KEY)[0], keep_head=True, key=_KEY)

    def frozen_files(self) -> Mapping[str, Sequence[Path]]:
        """Return the teacher's file."""
        path = _find_file(self._config.teacher)
        return {} if path is None else {"teacher": [path]}

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return images for the student, and targets; [B, 0] where no label is read."""
        if self._config.label_share > 0 if self.training else self._is_labelled:
            return super().views(batch)
        images = self.normalise(batch["images"])
        targets = images.new_zeros(len(images), 0)
        mixes = self.training and self._mixing.is_on
        return self._mixing(images, targets, batch["weight"]) if mixes else (images, targets)

    def forward(self, batch: Batch, progress: Tensor) -> StepOutput:
        """Return each sample's loss; in evaluation without the labels'."""
        images, targets = self.views(batch)
        logits, losses = self._compare(images)
        share = self._config.label_share
        if share > 0 and self.training:
            losses["label_loss"] = self.label_losses(logits, targets, progress)
        weights = {"teacher_loss": 1 - share, "label_loss": share, "feature_loss": self._config.feature_weight}
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum(dim=0)
        return StepOutput(total, {name: log_mean(loss, batch["weight"]) for name, loss in losses.items()})

    def _compare(self, images: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the student's logits, and each sample's losses [B] by name; images: normalised for the student."""
        targets, heat, losses = self._config.targets, self._config.temperature, {}
        logits, features = _run(self.network, images, targets)
        with torch.no_grad():
            seen = self.renormalise(images)
            if seen.shape[-2:] != self._teacher_hw:
                seen = F.interpolate(seen, self._teacher_hw, mode="bicubic", antialias=True)
            taught, wanted = _run(self.teacher, seen, targets)
        if logits is not None:
            losses["teacher_loss"] = heat**2 * self.match(logits / heat, taught / heat)
        if features is not None:
            found, wanted = self.projection(features).float(), F.layer_norm(wanted, wanted.shape[1:])
            losses["feature_loss"] = F.smooth_l1_loss(found, wanted, beta=2.0, reduction="none").mean(dim=1)
        return logits, losses

    def evaluate(self, loaders: Mapping[str, Iterable[Batch]], step: int) -> Report:
        """Measure `val`, by its labels where it has some, else by the loss. Raises UserError without a teacher."""
        if self.teacher is None:
            raise UserError("weights: a student of features is measured in its run alone, beside its teacher")
        if self._is_labelled:
            return super().evaluate(loaders, step)
        end = torch.ones(())  # of the run; nothing reads it here
        return Report(measure_means(loaders["val"], lambda batch: {"loss": self.forward(batch, end).loss}))


class TagStudent(Student, TaggingTask):
    """A tagger of the teacher's vocabulary."""

    def match(self, logits: Tensor, taught: Tensor) -> Tensor:
        """Return the cross-entropy of each sample [B], summed over tags."""
        return bce(logits, taught.sigmoid()).sum(dim=1)


class ClassStudent(Student, ClassificationTask):
    """A classifier of the teacher's classes."""

    def match(self, logits: Tensor, taught: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence of each sample [B]."""
        return F.kl_div(logits.log_softmax(1), taught.log_softmax(1), reduction="none", log_target=True).sum(dim=1)


class _Headless(Task):
    """A network without a head."""

    def __init__(self, setup: Setup[DistillationTaskConfig]) -> None:
        super().__init__()
        check_image_size(setup.model, tuple(setup.preprocessing["image_size_hw"]))
        self.network = build_network(setup.model, num_classes=0)
        self.normalise, self._mixing = setup.normalise(), setup.task.mixing()
        self._metadata = setup.metadata()

    def initialise(self, source: InitFrom | None) -> None:
        """Load the network of a run or file."""
        self.origin = initialise_from(self.network, source, keep_head=False)

    def exported(self) -> Exported:
        """Return the network and its preprocessing."""
        return Exported(metadata=self._metadata)


class FeatureStudent(Student, _Headless):
    """A network that gives features."""


# ------------------------------------------------------------------------------------------------ the teacher, the data


def _find_file(source: str) -> Path | None:
    """Return the teacher's weight file; None for the name of a network of timm."""
    return find_weights(source, "best", _KEY) if Path(source).exists() else None


def find_teacher(source: str, channels: int) -> dict[str, Any]:
    """Return facts: `teacher`, from which it is built, and where it has a head, the names of its outputs.

    channels: of the student's images. Raises UserError (`task.teacher`).
    """
    if path := _find_file(source):
        shapes, metadata = read_weights(path, _KEY, shapes_only=True)
        kinds = {"tagging": TaggingKind(), "classification": ClassificationKind()}
        setup = check_weights(path, _KEY, shapes, metadata, kinds)[1]
        model, stated, names = setup.model, dict(setup.preprocessing), dict(setup.facts)
        outputs = len(next(iter(names.values())))
    else:
        import timm

        if not timm.is_model(source):
            known = close_names(source, timm.list_models())
            raise UserError(f"{_KEY}: {source!r} is neither a run nor a weight file nor a network of timm; {known}")
        model = TimmConfig(family="timm", name=source, in_channels=channels, drop_path_rate=None)
        stated = stated_preprocessing(model, _KEY, "choose another teacher", _KEY)
        outputs = timm.get_pretrained_cfg(source).num_classes
        names = {"class_names": [str(index) for index in range(outputs)]} if outputs else {}
    if model.in_channels != channels:
        raise UserError(
            f"{_KEY}: {source} takes images of {model.in_channels} channels, and the student of {channels}; set "
            f"model.in_channels={model.in_channels}, and augment.mean and augment.std of as many numbers"
        )
    if stated.get("buckets_hw") is not None:
        raise UserError(
            f"{_KEY}: {source} was trained on images of several shapes (augment.pad=buckets) and would see squares, "
            "where it is wrong far more often; name a teacher that was trained with augment.pad=square or none"
        )
    return {"teacher": {"model": model.model_dump(), "preprocessing": stated, "outputs": outputs}, **names}


class DistillationPipeline(ImagePipeline[DistillationTaskConfig]):
    """Images, with labels where the task reads them."""

    def labelled(self, collection: Collection, setup: Setup[DistillationTaskConfig], rows: np.ndarray) -> np.ndarray:
        """Return those of some rows that have a tag or class of the teacher."""
        pipeline, outside = _outside(setup)
        return rows[:0] if pipeline is None else pipeline.rows(collection, outside, rows)

    def rows(self, collection: Collection, setup: Setup[DistillationTaskConfig], rows: np.ndarray) -> np.ndarray:
        """Return the labelled rows where labels are trained on, else all."""
        return self.labelled(collection, setup, rows) if setup.task.label_share > 0 else rows

    def fields(self, collection: Collection, setup: Setup[DistillationTaskConfig]) -> Fields:
        """Return what adds labels, where any are read."""
        if setup.task.label_share == 0 and not setup.facts.get("labelled"):
            return no_fields
        pipeline, outside = _outside(setup)
        return pipeline.fields(collection, outside)

    def evaluation(
        self, data: Data, setup: Setup[DistillationTaskConfig], *, training: bool
    ) -> dict[str, Iterable[Batch]]:
        """Return `val`: its labelled images, where it has some."""
        rows = data.collection.rows("val")
        rows = self.labelled(data.collection, setup, rows) if setup.facts.get("labelled") else rows
        return {"val": data.prepared(rows, self.fields(data.collection, setup), setup.preprocessing)}


class DistillationKind(Kind[DistillationTaskConfig]):
    """A student of features is of this kind; one of logits is a tagger or a classifier outside its run."""

    config = DistillationTaskConfig
    pipeline = DistillationPipeline()
    scripts = ("train", "finetune")
    output = "features"

    def find_facts(self, config: ImageTrainingConfig, collection: Collection) -> dict[str, Any]:
        """Return the teacher, the names of its outputs where they are learned, and whether `val` has labels."""
        task, rows = config.task, training_rows(collection, config.loop.train_paths)
        facts = find_teacher(task.teacher, config.model.in_channels)
        if task.targets == "features":
            facts = {"teacher": facts["teacher"]}
        elif len(facts) == 1:
            raise UserError(f"task.targets: {task.targets}, but {task.teacher} has no head; set task.targets=features")
        setup = Setup(config.model, task, facts=facts)
        if "tag_names" in facts:
            vocabulary = vocabulary_of(facts)
            # Each image has one rating; of a vocabulary without ratings, the commonest tag.
            ratings = (count for count, kind in zip(vocabulary.counts, vocabulary.categories) if kind == RATING)
            images = max(sum(ratings), *vocabulary.counts, 1)
            facts["tag_priors"] = [count / images for count in vocabulary.counts]
            if task.label_share > 0:
                _outside(setup)[1].task.check_run(config)
                if task.orientation:
                    facts["orientation"] = build_orientation(vocabulary, task.orientation, "task.orientation")
        if len(self.pipeline.rows(collection, setup, rows)) == 0:
            raise UserError(
                f"task.label_share: {task.label_share:g}, but no training image has a label that the student's outputs "
                "know; set task.label_share=0"
            )
        try:
            facts["labelled"] = len(self.pipeline.labelled(collection, setup, collection.rows("val"))) > 0
        except NoKnownTag as error:
            log.warning("evaluation measures the loss, because there are no labels: %s", error)
            facts["labelled"] = False
        return facts

    def build(self, setup: Setup[DistillationTaskConfig]) -> Student:
        """Return the task of the teacher's output."""
        if "tag_names" in setup.facts:
            return TagStudent(setup)
        return ClassStudent(setup) if "class_names" in setup.facts else FeatureStudent(setup)
