"""Distillation: a student learns the outputs of a frozen teacher for the same views, mixed views included.

`task.targets` says which outputs. Logits are divided by the temperature; their loss is the cross-entropy summed over
tags, or the KL divergence of classes. Features are the pooled input of the head: the loss compares a linear map of the
student's with the teacher's, standardised per image. No labels are read; evaluate.py measures the student by them.

A student of logits is a tagger or classifier with the teacher's tags or classes. It writes the weight files of
task=tagging or task=classification, which need no teacher. A student of features has no head.

Source: Hinton et al. 2015 (arXiv 1503.02531); Beyer et al. 2022 (arXiv 2106.05237), the same mixed views; Wei et al.
2022 (arXiv 2205.14141), equation 2, features, here pooled.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from data.collection.collection import Collection
from engine.measures.means import measure_means
from engine.task import Loaders, Report, StepOutput, Task, Use
from engine.tasks.classification import ClassificationKind
from engine.tasks.config import (
    ClassificationTaskConfig,
    ImageTrainingConfig,
    TaggingTaskConfig,
    TagLossConfig,
)
from engine.tasks.kind import Kind, Setup
from engine.tasks.mixing import Mixing
from engine.tasks.opening import read_setup
from engine.tasks.tagging import TaggingKind, bce
from models.build import build_network
from models.config import ModelConfig, TimmConfig
from models.image_model import Normalise
from models.weights.fit import load_into
from models.weights.timm_hub import read_timm, stated_preprocessing
from utils.contracts import Batch
from utils.errors import UserError, about, close_names
from utils.formats.vocabulary import RATING
from utils.io.files import Json
from utils.io.weights import InitFrom, find_weights, read_weights

_BCE = TagLossConfig(name="bce", gamma_neg=0.0, clip=0.0)
_UNUSED = {"vocabulary": None, "append_to": None, "orientation": None}  # the tags are the teacher's


# ---------------------------------------------------------------------------------------------------------- the student


def find_student(setup: Setup) -> tuple[Kind, Setup]:
    """Return the kind and setup of the student as a model of its own: a tagger, a classifier, or a backbone."""
    if "tag_names" in setup.facts:
        kind, schema = TaggingKind(), TaggingTaskConfig
        more = {"name": "tagging", **_UNUSED, "min_count": 1, "loss": _BCE}
    elif "class_names" in setup.facts:
        kind, schema = ClassificationKind(), ClassificationTaskConfig
        more = {"name": "classification", "head": "random", "allow_missing_classes": True, "label_smoothing": 0.0}
    else:
        return Kind(), setup
    shared = setup.task.model_dump(include=schema.model_fields.keys())
    return kind, replace(setup, task=schema(**{**shared, **more}))


def _run(network: nn.Module, images: Tensor, *, features: bool) -> Tensor:
    """Return the logits [B, K], or the features [B, C], float32."""
    return network.forward_head(network.forward_features(images), pre_logits=features).float()


class DistillationTask(Task):
    """Own the student, which is a complete task, and the teacher. Weight files contain only the student."""

    trained = ("student.network",)
    averaged = ("student.network",)
    helpers = ("teacher",)
    exported = ("student.network",)
    may_be_recorded = True

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        kind, student = find_student(setup)
        self.student = kind.build(student)
        self.mixing = Mixing(setup.task)
        self.metadata = {**self.student.metadata, "task": student.task.model_dump()}
        self._config = setup.task
        teacher = setup.facts.get("teacher")
        self.teacher = None
        if teacher is None:
            return
        self.teacher = build_network(TypeAdapter(ModelConfig).validate_python(teacher["model"]), teacher["outputs"])
        self._learns_features = self._config.targets == "features"
        if self._learns_features:
            widths = (
                getattr(network, "head_hidden_size", network.num_features)
                for network in (self.student.network, self.teacher)
            )
            self.projection = nn.Linear(*widths)
        stated = teacher["preprocessing"]
        self.teacher_normalise = Normalise(stated["mean"], stated["std"], setup.model.in_channels)
        self._teacher_hw = tuple(stated["image_size_hw"])

    @about("task.teacher")
    def load_helpers(self, use: Use) -> None:
        """Load the teacher, for training alone. Raises UserError (`task.teacher`)."""
        if use != "training":
            return
        path = _find_file(self._config.teacher)
        state, _ = read_weights(path) if path else read_timm(self.teacher)
        load_into(self.teacher, state, keep_head=True)

    def initialise(self, source: InitFrom | None) -> None:
        """Load the student's network from a run or file."""
        self.student.initialise(source)
        self.origin = self.student.origin

    def _mix(self, batch: Batch) -> Tensor:
        """Return mixed images, float32 from 0 to 1."""
        images = batch["images"].float() / 255.0
        return self.mixing(images, images.new_zeros(len(images), 0), batch["weight"])[0]

    def show_inputs(self, batch: Batch) -> tuple[Tensor, list[str]]:
        """Return mixed images."""
        return (self._mix(batch) * 255.0).round(), [""] * len(batch["weight"])

    def forward(self, batch: Batch, progress: Tensor) -> StepOutput:
        """Return each sample's loss."""
        images = self._mix(batch)
        learned = _run(self.student.network, self.student.normalise(images), features=self._learns_features)
        taught = self._teach(images)
        if not self._learns_features:
            return StepOutput(self._config.temperature**2 * self._differ(learned, taught))
        target = F.layer_norm(taught, taught.shape[1:])
        projected = self.projection(learned).float()
        return StepOutput(F.smooth_l1_loss(projected, target, beta=2.0, reduction="none").mean(dim=1))

    @torch.no_grad()
    def _teach(self, images: Tensor) -> Tensor:
        """Return the teacher's logits or features; images: float32 from 0 to 1."""
        images = self.teacher_normalise(images)
        if images.shape[-2:] != self._teacher_hw:
            images = F.interpolate(images, self._teacher_hw, mode="bicubic", antialias=True)
        return _run(self.teacher, images, features=self._learns_features)

    def _differ(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy summed over tags, or the KL divergence of classes, of each sample [B]."""
        logits = logits / self._config.temperature
        target = target / self._config.temperature
        if "tag_names" in self.metadata:
            return bce(logits, target.sigmoid()).sum(dim=1)
        return F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="none", log_target=True).sum(dim=1)

    def evaluate(self, loaders: Loaders, step: int) -> Report:
        """Measure `val` by the loss. Raises UserError without a teacher."""
        if self.teacher is None:
            raise UserError("weights: a student of features can be measured only in its run, with its teacher")
        progress = torch.ones(())  # not used in evaluation
        return Report(measure_means(loaders["val"], lambda batch: {"loss": self.forward(batch, progress).loss}))


# ---------------------------------------------------------------------------------------------------------- the teacher


@about("task.teacher")
def _find_file(source: str) -> Path | None:
    """Return the teacher's weight file, or None for the name of a timm network."""
    return find_weights(source, "best") if Path(source).exists() else None


@about("task.teacher")
def find_teacher(source: str, channels: int) -> tuple[Json, Json]:
    """Return a teacher's model, preprocessing and outputs, as a fact, and the names of its outputs ({} without a head).

    channels: the channels of the student's images. Raises UserError (`task.teacher`).
    """
    if path := _find_file(source):
        setup = read_setup(path, ("tagging", "classification"))[1]
        model = setup.model
        preprocessing = dict(setup.preprocessing)
        names = dict(setup.facts)
        outputs = len(next(iter(names.values())))
    else:
        import timm

        if not timm.is_model(source):
            known = close_names(source, timm.list_models())
            raise UserError(f"{source!r} is neither a run nor a weight file nor a timm network; {known}")
        model = TimmConfig(family="timm", name=source, in_channels=channels, drop_path_rate=None)
        preprocessing = stated_preprocessing(model)
        outputs = timm.get_pretrained_cfg(source).num_classes
        names = {"class_names": [str(index) for index in range(outputs)]} if outputs else {}
    if model.in_channels != channels:
        raise UserError(
            f"{source} takes images of {model.in_channels} channels, but the student takes {channels}; set "
            f"model.in_channels={model.in_channels}, and that many numbers in augment.mean and augment.std"
        )
    return {"model": model.model_dump(), "preprocessing": preprocessing, "outputs": outputs}, names


class DistillationKind(Kind):
    """A student and its teacher. Outside its run, a student of logits is a tagger or a classifier."""

    task = DistillationTask
    output = "features"
    network = "student.network"

    def find_facts(self, config: ImageTrainingConfig, collection: Collection) -> Json:
        """Return the teacher, and the names of its outputs if the student learns them."""
        task = config.task
        teacher, names = find_teacher(task.teacher, config.model.in_channels)
        if task.targets == "features":
            names = {}
        elif not names:
            raise UserError(f"task.targets: {task.targets}, but {task.teacher} has no head; set task.targets=features")
        facts = {"teacher": teacher, **names}
        if "tag_names" in names:
            counts = np.array(names["tag_counts"])
            is_rating = np.array(names["tag_categories"]) == RATING
            # The number of images: each has one rating. Without ratings, take the most frequent tag's count.
            facts["tag_priors"] = (counts / max(counts[is_rating].sum(), counts.max(), 1)).tolist()
        return facts

    def write(self, folder: Path, setup: Setup) -> None:
        """Write what the student's kind writes."""
        find_student(setup)[0].write(folder, setup)
