"""A thin tagging task, written only to prove the contracts: ragged tag ids, multi-hot on the device, sample weights.

python tests/tasks/tagging.py data.root=COLLECTION
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.nn import functional as F

from data.batch import Ragged, multi_hot
from data.build import build_loaders, load_collection
from data.config import AugmentConfig, DataConfig
from engine.config import TrainingConfig
from engine.start import build_task, run_path, run_training, start_ranks
from engine.task import Report, StepOutput, Task, log_mean
from models.build import build_network
from models.config import ModelConfig
from models.normalise import Normalise
from utils.config.entry_point import entry_point
from utils.config.schema import Strict
from utils.ranks import distributed


class TaggingTaskConfig(Strict):
    name: str
    positive_weight: float


class TaggingConfig(TrainingConfig):
    model: ModelConfig
    task: TaggingTaskConfig
    data: DataConfig
    augment: AugmentConfig


class TagFields:
    """Add a sample's tag ids, as many as it has."""

    def __init__(self, vocabulary):
        self._ids = {tag: number for number, tag in enumerate(vocabulary)}

    def __call__(self, index, row, generator):
        return {
            "tags": Ragged(torch.tensor([self._ids[tag] for tag in row.tags if tag in self._ids], dtype=torch.int64))
        }


class TaggingTask(Task):
    def __init__(self, config, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        self.network = build_network(config.model, num_classes=len(vocabulary))
        self.normalise = Normalise(config.augment.mean, config.augment.std, config.model.in_channels)
        self.register_buffer("positive_weight", torch.tensor(config.task.positive_weight))

    def _losses(self, batch):
        logits = self.network(self.normalise(batch["images"])).float()
        tag_targets = multi_hot(batch["tags"], batch["tags_offsets"], len(self.vocabulary))
        losses = F.binary_cross_entropy_with_logits(
            logits, tag_targets, reduction="none", pos_weight=self.positive_weight
        )
        return losses.mean(dim=1), logits, tag_targets

    def forward(self, batch, knobs):
        loss, logits, tag_targets = self._losses(batch)
        recall = (tag_targets * (logits > 0)).sum(1) / tag_targets.sum(1).clamp_min(1)
        return StepOutput(loss, {"recall": log_mean(recall, batch["weight"])})

    def evaluate(self, loaders, step):
        total = torch.zeros(2, dtype=torch.float64, device=self.positive_weight.device)
        for batch in loaders["val"]:
            loss, valid = self._losses(batch)[0].double(), batch["weight"] > 0
            total += torch.stack([torch.where(valid, loss, 0.0).sum(), valid.double().sum()])
        total = distributed.all_reduce_sum(total).tolist()
        return Report({"loss": total[0] / total[1], "samples": total[1]})


@entry_point("tagging", TaggingConfig, config_dir=Path(__file__).parent / "conf")
def main(config, job):
    runtime = start_ranks(config)
    collection = load_collection(config.data)
    vocabulary = sorted(collection.tag_counts("train"))
    loader, evaluation = build_loaders(
        collection, config.data, config.augment, TagFields(vocabulary),
        train_rows=collection.rows("train"), val_rows=collection.rows("val"), channels=config.model.in_channels,
        seed=config.seed, loop=config.loop, runtime=runtime, prefetch_batches=config.runtime.prefetch_batches,
        run_path=run_path(config, job),
    )  # fmt: skip
    task = build_task(lambda: TaggingTask(config, vocabulary), config)
    return run_training(
        task, loader, evaluation, config, job, runtime, fingerprints={"data.root": collection.fingerprint},
        depths=config.model.depths,
    )  # fmt: skip


if __name__ == "__main__":
    main()
