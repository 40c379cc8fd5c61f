"""Tagging, thin: ragged tag ids, multi-hot targets on the device, a sigmoid per tag.

python -m tests.tasks.thin_tagging data.root=COLLECTION
"""

from typing import Literal

import torch
from torch.nn import functional as F

from data.batch import Ragged, multi_hot
from engine.measures.means import measure_means
from engine.task import Report, StepOutput, log_mean
from engine.tasks.image_kind import ImageKind, ImageTask, ImageTrainingConfig
from engine.tasks.kind import TaskConfig
from tests.tasks.entry import add_kind


class ThinTaggingTaskConfig(TaskConfig):
    name: Literal["thin_tagging"]
    positive_weight: float


class ThinTaggingConfig(ImageTrainingConfig):
    task: ThinTaggingTaskConfig


class TagFields:
    """Add a sample's tag ids, as many as it has."""

    def __init__(self, tag_names):
        self._ids = {tag: number for number, tag in enumerate(tag_names)}

    def __call__(self, example):
        ids = [self._ids[tag] for tag in example.row.tags if tag in self._ids]
        return {"tags": Ragged(torch.tensor(ids, dtype=torch.int64))}


class ThinTaggingTask(ImageTask):
    def __init__(self, setup):
        super().__init__(setup, outputs=len(setup.facts["tag_names"]))
        self.tag_names = setup.facts["tag_names"]
        self.register_buffer("positive_weight", torch.tensor(setup.task.positive_weight))

    def _losses(self, batch):
        logits = self.network(self.normalise(batch["images"])).float()
        tag_targets = multi_hot(batch["tags"], batch["tags_offsets"], len(self.tag_names))
        losses = F.binary_cross_entropy_with_logits(
            logits, tag_targets, reduction="none", pos_weight=self.positive_weight
        )
        return losses.mean(dim=1), logits, tag_targets

    def forward(self, batch, progress):
        loss, logits, tag_targets = self._losses(batch)
        recall = (tag_targets * (logits > 0)).sum(1) / tag_targets.sum(1).clamp_min(1)
        return StepOutput(loss, {"recall": log_mean(recall, batch["weight"])})

    def evaluate(self, loaders, step):
        return Report(measure_means(loaders["val"], lambda batch: {"loss": self._losses(batch)[0]}))


class ThinTaggingKind(ImageKind):
    config, task, names = ThinTaggingTaskConfig, ThinTaggingTask, ("tag_names",)
    output = "tags"

    def find_facts(self, config, collection):
        return {"tag_names": sorted(collection.tag_counts("train"))}

    def fields(self, collection, setup):
        return TagFields(setup.facts["tag_names"])


main = add_kind("thin_tagging", ThinTaggingKind(), ThinTaggingConfig)

if __name__ == "__main__":
    main()
