"""Classification: one class per image, with mixup, cutmix and label smoothing."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from engine.task import Batch, Knobs, Report, StepOutput, Task, log_mean, mean_over_readable
from engine.tasks.config import ClassificationTaskConfig
from models.build import build_network, check_image_size
from models.config import ModelConfig
from models.normalise import Normalise
from utils import distributed


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
            images, targets = self._mix_images(images, targets)
        logits = self.network(images).float()
        loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        correct = (logits.argmax(dim=1) == batch["labels"]).float()
        return StepOutput(loss, {"accuracy": log_mean(correct, batch["weight"])})

    @torch.compiler.disable
    def _mix_images(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images and soft targets [B, K]; train_step has seeded the draws."""
        return self._mix(images, labels)

    def evaluate(self, loaders: Mapping[str, Iterable[Batch]], step: int) -> Report:
        """Return top-1, top-5 (of at most as many classes as there are) and loss over all samples of `val`."""
        total = torch.zeros(4, dtype=torch.float64, device=self.normalise.mean.device)
        most = min(5, len(self.class_names))
        for batch in loaders["val"]:
            logits = self.network(self.normalise(batch["images"])).float()
            valid = batch["weight"] > 0
            loss = F.cross_entropy(logits, batch["labels"], reduction="none")
            hits = logits.topk(most, dim=1).indices == batch["labels"][:, None]
            figures = torch.stack([torch.ones_like(loss), loss, hits[:, 0].float(), hits.any(dim=1).float()])
            total += torch.where(valid, figures, 0.0).double().sum(dim=1)
        count, loss, top1, top5 = distributed.all_reduce_sum(total).tolist()
        figures = {"loss": loss, "top1": top1, f"top{most}": top5}
        means = {name: mean_over_readable(total, count) for name, total in figures.items()}
        return Report({**means, "samples": count})

    def metadata(self) -> dict[str, Any]:
        """Return what a prediction needs."""
        return {"class_names": self.class_names, "preprocessing": self._preprocessing}
