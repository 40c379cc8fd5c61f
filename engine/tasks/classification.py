"""Classification: one class per image, with mixup, cutmix and label smoothing."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from engine.task import Batch, Knobs, Report, StepOutput, Task, log_mean, mean_over_readable
from engine.tasks.config import ClassificationTaskConfig
from engine.tasks.confusion import Confusion, TopSamples, gather_confusion
from models.build import build_network, check_image_size
from models.config import ModelConfig
from models.normalise import Normalise
from utils.ranks import distributed
from utils.record import pictures

_MISTAKES, _PREDICTIONS = 48, 40  # images in a picture
_WHOLE_MATRIX, _PART_OF_MATRIX = 40, 24  # up to so many classes all are drawn, else so many of them
_PAIRS = 1000  # rows of the table of confusions


class LabelFields:
    """Add a sample's class index [], int64; `class_ids` [N] are the collection's, by row."""

    def __init__(self, class_ids: Sequence[int]) -> None:
        self._class_ids = torch.as_tensor(class_ids, dtype=torch.int64)

    def __call__(self, index: int, row: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the label."""
        return {"labels": self._class_ids[index]}


class ClassificationTask(Task):
    """Own a classifier.

    `class_names` fix the order of its outputs; `preprocessing` (AugmentConfig.preprocessing) goes into weight files.
    """

    best_metric: ClassVar[str] = "top1"
    best_is_lowest: ClassVar[bool] = False

    def __init__(
        self,
        model: ModelConfig,
        config: ClassificationTaskConfig,
        *,
        class_names: Sequence[str],
        preprocessing: Mapping[str, Any],
    ) -> None:
        super().__init__()
        height, width = preprocessing["image_size_hw"]
        check_image_size(model, (height, width))
        self.class_names = list(class_names)
        self.network = build_network(model, num_classes=len(self.class_names))
        self.normalise = Normalise(preprocessing["mean"], preprocessing["std"], model.in_channels)
        self.label_smoothing = config.label_smoothing
        mixes = []
        if config.mixup_alpha > 0:
            mixes.append(v2.MixUp(alpha=config.mixup_alpha, num_classes=len(self.class_names)))
        if config.cutmix_alpha > 0:
            mixes.append(v2.CutMix(alpha=config.cutmix_alpha, num_classes=len(self.class_names)))
        self._mix = v2.RandomChoice(mixes) if mixes else None
        self._preprocessing = dict(preprocessing)

    def forward(self, batch: Batch, knobs: Knobs) -> StepOutput:
        """Return each sample's cross-entropy; targets are mixed where the images are."""
        images, targets = self.normalise(batch["images"]), batch["labels"]
        if self._mix is not None and self.training:
            images, targets = self._mix_images(images, targets, batch["weight"])
        logits = self.network(images).float()
        loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        correct = (logits.argmax(dim=1) == batch["labels"]).float()
        return StepOutput(loss, {"accuracy": log_mean(correct, batch["weight"])})

    @torch.compiler.disable
    def _mix_images(self, images: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images and soft targets [B, K]; train_step has seeded the draws.

        torchvision mixes each sample with the one before it, the first with the last. Where that one weighs 0 (a blank
        image for one that could not be read), the sample stays as it is.
        """
        mixed, targets = self._mix(images, labels)
        mixes = weight.roll(1) > 0
        plain = F.one_hot(labels, targets.shape[1]).to(targets.dtype)
        # The mixed ones first: they give the result its memory format.
        return torch.where(mixes.view(-1, 1, 1, 1), mixed, images), torch.where(mixes[:, None], targets, plain)

    def evaluate(self, loaders: Mapping[str, Iterable[Batch]], step: int) -> Report:
        """Measure all samples of `val`.

        Figures: loss, top-1, top-5 (of at most as many classes as there are), and the means over classes that have
        samples of accuracy and F1. Tables: `classes`, `confusions`. Pictures: `confusion`, `mistakes`, `predictions`.
        """
        total = torch.zeros(4, dtype=torch.float64, device=self.normalise.mean.device)
        most = min(5, len(self.class_names))
        pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        mistakes, chosen = TopSamples(_MISTAKES), TopSamples(_PREDICTIONS)
        for batch in loaders["val"]:
            labels, valid = batch["labels"], batch["weight"] > 0
            logits = self.network(self.normalise(batch["images"])).float()
            loss = F.cross_entropy(logits, labels, reduction="none")
            top = logits.topk(most, dim=1)
            hits, predicted = top.indices == labels[:, None], top.indices[:, 0]
            figures = torch.stack([torch.ones_like(loss), loss, hits[:, 0].float(), hits.any(dim=1).float()])
            total += torch.where(valid, figures, 0.0).double().sum(dim=1)
            pairs.append((labels, predicted, valid))
            prob = (top.values[:, 0] - logits.logsumexp(dim=1)).exp()
            fields = {name: batch[name] for name in ("sample_id", "images", "labels")}
            fields |= {"predicted": predicted, "prob": prob}
            mistakes.add(prob, valid & ~hits[:, 0], fields)
            chosen.add(~batch["key"], valid, fields)  # a row's key is fixed and random: so is the choice of the lowest
        count, loss, top1, top5 = distributed.all_reduce_sum(total).tolist()
        figures = {"loss": loss, "top1": top1, f"top{most}": top5}
        means = {name: mean_over_readable(total, count) for name, total in figures.items()}
        confusion = gather_confusion(pairs, len(self.class_names))
        report = Report({**means, **confusion.macro_scalars(), "samples": count})
        shown = mistakes.gather(), chosen.gather()
        if distributed.is_main():
            report.tables["classes"] = confusion.class_rows(self.class_names)
            report.tables["confusions"] = confusion.pair_rows(self.class_names, _PAIRS)
            report.images["confusion"] = self._draw_confusion(confusion)
            report.images["mistakes"], report.images["predictions"] = self._draw_samples(confusion, *shown)
        return report

    def _draw_confusion(self, confusion: Confusion) -> np.ndarray:
        """Draw the whole confusion matrix of few classes, or that of the most confused ones of many."""
        number, samples = len(self.class_names), confusion.samples
        wrong, total = int((samples - confusion.correct).sum()), int(samples.sum())
        if number <= _WHOLE_MATRIX:
            title = f"Confusion matrix of {number} classes; images wrong: {wrong:,} of {total:,}\n"
            title += "numbers are images, the shade is the share of the row; blue right, red wrong"
            return pictures.confusion_matrix(confusion.matrix(range(number)), samples, self.class_names, title)
        classes = confusion.most_confused(_PART_OF_MATRIX)
        title = f"The {len(classes)} most confused of {number:,} classes; images wrong in all: {wrong:,} of {total:,}\n"
        title += "numbers are per cent of the row's images; blue right, red wrong, other: classes that are not shown"
        counts, names = confusion.matrix(classes), [self.class_names[number] for number in classes]
        elsewhere = samples[classes] - counts.sum(axis=1)
        return pictures.confusion_matrix(counts, samples[classes], names, title, percent=True, elsewhere=elsewhere)

    def _draw_samples(self, confusion: Confusion, mistakes: Mapping, chosen: Mapping) -> tuple[np.ndarray, np.ndarray]:
        """Draw the most confident mistakes, and samples of every kind in the order of their rows."""
        total = int(confusion.samples.sum())
        wrong = total - int(confusion.correct.sum())
        about = "true → predicted (probability)"
        drawn = self._predictions(mistakes, np.arange(len(mistakes["sample_id"])))
        title = f"Mistakes, the most confident first: {len(drawn)} of {wrong:,} (images: {total:,})\n{about}"
        worst = pictures.prediction_grid(drawn, title)
        drawn = self._predictions(chosen, chosen["sample_id"].argsort())
        title = (
            f"Predictions: {len(drawn)} of {total:,} images, the same ones each time\n{about}; blue right, red wrong"
        )
        return worst, pictures.prediction_grid(drawn, title)

    def _predictions(self, kept: Mapping[str, np.ndarray], order: np.ndarray) -> list[pictures.Prediction]:
        """Return kept samples in an order as a picture takes them."""
        images = kept["images"]
        if images.dtype != np.uint8:
            images = (images * 255.0).round().clip(0, 255).astype(np.uint8)
        return [
            pictures.Prediction(
                images[index].transpose(1, 2, 0),
                self.class_names[kept["labels"][index]],
                self.class_names[kept["predicted"][index]],
                float(kept["prob"][index]),
            )
            for index in order
        ]

    def metadata(self) -> dict[str, Any]:
        """Return what a prediction needs."""
        return {"class_names": self.class_names, "preprocessing": self._preprocessing}
