"""Self-distillation with several crops, written as a stranger would: one file, one YAML, one entry in the table.

Two global and four local crops of each image are named views. An EMA teacher, initialised with the student, is what is
exported and judged; its outputs are centred, and its temperature is warmed up and then held.

    python -m tests.tasks.multicrop data.root=COLLECTION
"""

import copy
from typing import Literal

import torch

from data.augment.steps import TrainTransform
from engine.measures.means import measure_means
from engine.task import Report, StepOutput, Task
from engine.tasks.config import ImageTrainingConfig, TaskConfig
from engine.tasks.kind import Kind
from models.build import build_network
from models.weights.initialise import initialise_from
from optim.schedules import cosine, linear
from tests.tasks.entry import add_kind
from utils.ranks import distributed

GLOBAL, LOCAL = ("global_1", "global_2"), ("local_1", "local_2", "local_3", "local_4")


WARM_UP = 6 / 19  # of the run: the first 6 of 20 steps


class MultiCropTaskConfig(TaskConfig):
    name: Literal["multicrop"]
    dim: int
    local_size_hw: list[int]
    student_temperature: float
    centre_momentum: float


class MultiCropConfig(ImageTrainingConfig):
    task: MultiCropTaskConfig


class MultiCropTask(Task):
    trained, averaged = ("student",), ()
    exported = ("teacher",)

    def __init__(self, setup):
        super().__init__()
        self.student = build_network(setup.model, num_classes=setup.task.dim)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.normalise = setup.normalise()
        self.register_buffer("centre", torch.zeros(setup.task.dim))
        self.register_buffer("outputs", torch.zeros(setup.task.dim + 1))  # their sum, and number
        self.config = setup.task

    def initialise(self, source):
        if source is not None:
            self.origin = initialise_from(self.student, source, keep_head=False)
        self.teacher.load_state_dict(self.student.state_dict())

    def forward(self, batch, progress):
        with torch.no_grad():
            taught = [self.teacher(self.normalise(batch[name])).float() for name in GLOBAL]
            valid = (batch["weight"] > 0)[:, None]
            for logits in taught:
                counted = torch.cat([logits, torch.ones_like(logits[:, :1])], dim=1)
                self.outputs += torch.where(valid, counted, 0.0).sum(dim=0)
            temperature = linear(0.04, 0.07, progress / WARM_UP)
            targets = [((logits - self.centre) / temperature).softmax(dim=1) for logits in taught]
        students = [self.student(self.normalise(batch[name])).float() for name in GLOBAL + LOCAL]
        logs = [(logits / self.config.student_temperature).log_softmax(dim=1) for logits in students]
        pairs = [(target, log) for i, target in enumerate(targets) for j, log in enumerate(logs) if i != j]
        return StepOutput(torch.stack([-(target * log).sum(dim=1) for target, log in pairs]).mean(dim=0))

    @torch.no_grad()
    def after_step(self, step, progress, applied):
        share = (1.0 - cosine(0.9, 1.0, progress)) * applied
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters()):
            teacher.add_((student - teacher) * share)
        *total, count = distributed.all_reduce_sum(self.outputs).split([self.config.dim, 1])
        self.centre += ((total[0] / count.clamp_min(1)) - self.centre) * (1.0 - self.config.centre_momentum) * applied
        self.outputs.zero_()

    def evaluate(self, loaders, step):
        return Report(measure_means(loaders["val"], self._disagreement))

    def _disagreement(self, batch):
        images = self.normalise(batch["images"])
        target, mirrored = (self.teacher(view).float().log_softmax(dim=1) for view in (images, images.flip(-1)))
        return {"loss": -(target.exp() * mirrored).sum(dim=1)}


class MultiCropKind(Kind):
    task = MultiCropTask
    output, network = "features", "teacher"

    def views(self, setup, augment):
        small = augment.model_copy(update={"image_size_hw": setup.task.local_size_hw, "crop_scale": [0.05, 0.4]})
        return {name: TrainTransform(augment) for name in GLOBAL} | {name: TrainTransform(small) for name in LOCAL}


main = add_kind(
    "multicrop", "tests.tasks.multicrop:MultiCropKind", "tests.tasks.multicrop:MultiCropTaskConfig", MultiCropConfig
)

if __name__ == "__main__":
    main()
