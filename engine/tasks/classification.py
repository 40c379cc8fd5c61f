"""Classification: one class per image, with mixup, cutmix and label smoothing."""

from collections.abc import Iterable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from data.augment.steps import evaluation_views
from data.collection.choose import spread, training_rows
from data.collection.collection import Collection, check_classes
from data.open import Data
from data.stream.loader import Fields
from engine.config import TrainingConfig
from engine.measures.confusion import ConfusionCounts
from engine.measures.drawings import draw_confusion, draw_predictions
from engine.measures.means import Means
from engine.measures.tags import TagCounts, TagHistograms, decision_rows
from engine.measures.top_samples import TopSamples
from engine.task import Finish, Loaders, Report, StepOutput, log_mean
from engine.tasks.config import ImageTrainingConfig
from engine.tasks.kind import Kind, Setup, label_fields
from engine.tasks.mixing import MixingTask
from engine.update.runtime import Runtime
from optim.linear import TRAINED_PENALTY, fit_classes, fit_softmax
from utils.contracts import Batch
from utils.io.files import Json
from utils.ranks import distributed
from utils.record.figures import BALANCED

if TYPE_CHECKING:
    from utils.formats.thresholds import ThresholdTable

_SHOWN_MISTAKES = 48  # images in a picture
_UNEQUAL = 1.5  # times an even share of the images: from here on the largest class rules the accuracy
_MOST_PAIRS = 1000  # in the table of confusions
HEAD_IMAGES = 16384  # enough for a good linear head, fitted in seconds
_HEAD_IMAGES_A_MINUTE = 3000  # with loop.minutes: 1.5 to 6 ms each on one core, and a second time where updates fit
_FROZEN = 0.01  # of the weights (docs/results.md#from-weights-in-two-minutes)
_MOST_SCORES = 400_000  # images times classes: a logistic regression of more takes over half a minute of a core
_MOST_SCORES_AGAIN = 5_000_000  # the same with one penalty


def count_head_images(config: TrainingConfig) -> int:
    """Return the most images to which a head is fitted."""
    if config.loop.minutes is None:
        return HEAD_IMAGES
    return min(HEAD_IMAGES, int(_HEAD_IMAGES_A_MINUTE * config.loop.minutes))


def freeze_first(network: nn.Module) -> None:
    """Freeze the first layers: a hundredth of the weights takes a third of the time of an update."""
    left = _FROZEN * sum(parameter.numel() for parameter in network.parameters())
    for parameter in network.parameters():
        left -= parameter.numel()
        if left < 0:
            break
        parameter.requires_grad_(False)


class ClassificationTask(MixingTask):
    """Own a classifier. `facts["class_names"]` gives the order of its outputs."""

    best_metric = "top1"
    best_is_lowest = False

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, setup.facts["class_names"])
        self.class_names = self.names
        self.label_smoothing = setup.task.label_smoothing
        self.head = setup.task.head
        self.keep_head = self.head == "kept"
        if self.head == "refitted":
            freeze_first(self.network)

    def fit(self, features: Tensor, labels: Tensor, num_classes: int, again: bool) -> tuple[Tensor, ...]:
        """Return a logistic regression (optim/linear.py): weight, bias, left-out loss and accuracy.

        With up to two images a class, or very many images and classes, it is a ridge regression. again: the features
        have been trained on these labels.
        """
        if again:
            some = slice(_MOST_SCORES_AGAIN // num_classes)
            return fit_softmax(features[some], labels[some], num_classes, [TRAINED_PENALTY])
        is_usual = 2 * num_classes < len(features) <= _MOST_SCORES / num_classes
        return (fit_softmax if is_usual else fit_classes)(features, labels, num_classes)

    def train(self, mode: bool = True) -> Self:
        """Set the mode. Batch norms below a refitted head keep the statistics that the head was fitted with."""
        super().train(mode)
        for module in self.network.modules():
            if self.head == "refitted" and isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, batch: Batch, progress: Tensor) -> StepOutput:
        """Return each sample's loss."""
        images, targets = self.views(batch)
        logits = self.network(images).float()
        correct = (logits.argmax(dim=1) == batch["labels"]).float()
        return StepOutput(
            F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing),
            {"accuracy": log_mean(correct, batch["weight"])},
        )

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return images for the network, and labels [B], or targets [B, K] if images are mixed."""
        images = self.normalise(batch["images"])
        labels = batch["labels"]
        if not self.mixing.is_on:
            return images, labels
        return self.mixing(images, F.one_hot(labels, len(self.class_names)).to(images.dtype), batch["weight"])

    def evaluate(self, loaders: Loaders, step: int) -> Report:
        """Measure all samples of `val`.

        Scalars: loss, top-1, top-5 (with K < 6 classes, top-K-1), accuracy and F1, averaged over the classes that have
        samples, and the share of the largest class. Of classes of unequal size, the averaged accuracy is the first.
        Tables: `classes`, `confusions`, `decisions`. Images: `confusion`, `mistakes`.
        """
        return self._measure(loaders["val"])[0]

    def calibrate(self, batches: Iterable[Batch], leads: np.ndarray, risk: float) -> tuple[Report, "ThresholdTable"]:
        """Measure all samples, as `evaluate`; find a threshold for the answers, of which at most `risk` are wrong.

        leads: `Collection.leads`; of near-duplicates, the first one counts. Raises UserError (`risk`).
        """
        from engine.measures.promise import make_promise

        report, answers = self._measure(batches, leads)
        return report, make_promise(answers, risk)

    def _measure(self, batches: Iterable[Batch], leads: np.ndarray | None = None) -> tuple[Report, TagCounts]:
        """Return the report, and the right and wrong answers by probability. With leads, only they count."""
        names = self.class_names
        most = min(5, max(1, len(names) - 1))
        means = Means()
        counts = ConfusionCounts(len(names))
        decisions = TagHistograms(1)
        mistakes = TopSamples(_SHOWN_MISTAKES)
        for batch in batches:
            labels = batch["labels"]
            valid = batch["weight"] > 0
            logits = self.predict(batch)
            top = logits.topk(most, dim=1)
            hits = top.indices == labels[:, None]
            predicted = top.indices[:, 0]
            means.add(
                {
                    "loss": F.cross_entropy(logits, labels, reduction="none"),
                    "top1": hits[:, 0],
                    f"top{most}": hits.any(dim=1),
                },
                valid,
            )
            counts.add(labels, predicted, valid)
            prob = (top.values[:, 0] - logits.logsumexp(dim=1)).exp()
            ids = batch["sample_id"]
            is_lead = valid
            if leads is not None:
                is_lead = valid & (torch.as_tensor(leads, device=valid.device)[ids] == ids)
            decisions.add(prob.logit()[:, None], hits[:, :1], is_lead)
            fields = {"sample_id": ids, "images": batch["images"], "labels": labels}
            mistakes.add(prob, valid & ~hits[:, 0], {**fields, "predicted": predicted, "prob": prob})
        scalars = means.reduce()
        confusion = counts.reduce()
        figures = {**scalars, **confusion.macro_scalars()}
        if confusion.samples.max() >= _UNEQUAL * confusion.samples.mean():
            figures = {BALANCED: 0.0, **figures}  # the first one; it keeps its value
        report = Report(figures)
        wrong = mistakes.reduce()
        answers = decisions.reduce()
        if distributed.is_main():
            report.tables = {
                "classes": confusion.class_rows(names),
                "confusions": confusion.pair_rows(names, _MOST_PAIRS),
            }
            ((_, *tails),) = answers.tails()
            correct, predicted = (counts[0].cpu().numpy() for counts in tails)
            report.tables["decisions"] = decision_rows("all", predicted, correct, int(scalars["samples"]))
            report.images = {
                "confusion": lambda: draw_confusion(confusion, names),
                "mistakes": lambda: draw_predictions(wrong, names),
            }
        return report, answers

    def describe_images(self, batch: Batch) -> pa.Table:
        """Return the label, the first class and its probability, and the loss."""
        logits = self.predict(batch)
        labels = batch["labels"]
        prob, first = logits.softmax(dim=1).max(dim=1)
        columns = {
            "probability": prob,
            "wrong": first != labels,
            "loss": F.cross_entropy(logits, labels, reduction="none"),
        }
        columns = {name: column.cpu().numpy() for name, column in columns.items()}
        names = np.array(self.class_names, object)
        return pa.table({"label": names[labels.cpu()], "prediction": names[first.cpu()], **columns})


class ClassificationKind(Kind):
    """Labelled images. The classes are those in the training split."""

    task = ClassificationTask
    names = ("class_names",)
    output = "classes"
    next_commands = (
        "python predict.py weights={run} input=FOLDER output=predictions.jsonl",
        "python export.py format=onnx run_dir={run}",
    )

    def find_facts(self, config: ImageTrainingConfig, collection: Collection) -> Json:
        """Return the class names, which include the classes of the validation split."""
        return {"class_names": check_classes(collection)}

    def samples(self, collection: Collection, setup: Setup) -> tuple[np.ndarray, Fields]:
        """Return the rows of known classes, and a function that adds a sample's label."""
        class_ids = collection.class_ids(setup.facts["class_names"])
        return class_ids >= 0, label_fields(labels=class_ids)

    def prepare(
        self,
        task: ClassificationTask,
        data: Data,
        setup: Setup,
        config: ImageTrainingConfig,
        runtime: Runtime,
        is_new: bool,
    ) -> Finish | None:
        """Fit the head of a new run, with `task.head=fitted` or `refitted`, which may be fitted again at the end."""
        if task.head not in ("fitted", "refitted"):
            return None
        from engine.tasks.head import fit_head

        is_usable, fields = self.samples(data.collection, setup)
        rows = spread(training_rows(data.collection, config.loop, is_usable), count_head_images(config))
        views = evaluation_views(setup.preprocessing)
        if task.head == "fitted":
            # A head fitted to images without augmentation is overconfident, and the first steps would undo the fit.
            views = self.views(setup, config.augment)
        fit = partial(fit_head, task, data.evaluation(rows, fields, views), runtime)
        started = monotonic()
        if is_new:
            fit()
        return Finish(fit, monotonic() - started, len(rows)) if task.head == "refitted" else None
