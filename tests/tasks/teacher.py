"""A thin self-distillation task, written only to prove the contracts: a teacher that after_step moves by a knob.

python tests/tasks/teacher.py data.root=COLLECTION
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.nn import functional as F

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


class TeacherTaskConfig(Strict):
    name: str
    dim: int
    temperature: float


class TeacherConfig(TrainingConfig):
    model: ModelConfig
    task: TeacherTaskConfig
    data: DataConfig
    augment: AugmentConfig


def no_fields(index, row, generator):
    return {}


class TeacherTask(Task):
    knob_names = frozenset({"teacher_momentum"})

    def __init__(self, config):
        super().__init__()
        self.network = build_network(config.model, num_classes=config.task.dim)
        self.teacher = copy.deepcopy(self.network).requires_grad_(False)
        self.normalise = Normalise(config.augment.mean, config.augment.std, config.model.in_channels)
        self.temperature = config.task.temperature

    def _losses(self, batch):
        images = self.normalise(batch["images"])
        with torch.no_grad():
            target = self.teacher(images).float().div(self.temperature).softmax(dim=1)
        student = self.network(images.flip(-1)).float().log_softmax(dim=1)
        return F.cross_entropy(student, target, reduction="none")

    def forward(self, batch, knobs):
        loss = self._losses(batch)
        return StepOutput(loss, {"momentum": log_mean(knobs["teacher_momentum"].expand_as(loss), batch["weight"])})

    @torch.no_grad()
    def after_step(self, step, knobs, applied):
        share = (1.0 - knobs["teacher_momentum"]) * applied
        for teacher, student in zip(self.teacher.parameters(), self.network.parameters()):
            teacher.add_((student - teacher) * share)

    def evaluate(self, loaders, step):
        total = torch.zeros(2, dtype=torch.float64, device=self.normalise.mean.device)
        for batch in loaders["val"]:
            loss, valid = self._losses(batch).double(), batch["weight"] > 0
            total += torch.stack([torch.where(valid, loss, 0.0).sum(), valid.double().sum()])
        total = distributed.all_reduce_sum(total).tolist()
        return Report({"loss": total[0] / total[1], "samples": total[1]})


@entry_point("teacher", TeacherConfig, config_dir=Path(__file__).parent / "conf")
def main(config, job):
    runtime = start_ranks(config)
    collection = load_collection(config.data)
    loader, evaluation = build_loaders(
        collection, config.data, config.augment, no_fields,
        train_rows=collection.rows("train"), val_rows=collection.rows("val"), channels=config.model.in_channels,
        seed=config.seed, loop=config.loop, runtime=runtime, prefetch_batches=config.runtime.prefetch_batches,
        run_path=run_path(config, job),
    )  # fmt: skip
    task = build_task(lambda: TeacherTask(config), config)
    return run_training(
        task, loader, evaluation, config, job, runtime, fingerprints={"data.root": collection.fingerprint}
    )


if __name__ == "__main__":
    main()
