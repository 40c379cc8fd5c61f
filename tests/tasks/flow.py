"""Rectified flow with class labels, written as a stranger would: one file, one YAML, one entry in the table.

Two image shapes in one run; a frozen encoder that is not checkpointed; noise and times drawn on the device from each
sample's key; labels dropped in training only; an average kept on the CPU. Source: Liu et al. 2022 (arXiv 2209.03003).

    python -m tests.tasks.flow data.root=COLLECTION
"""

from typing import Literal

import torch
from torch import nn
from torchvision.transforms import v2

from data.stream.order import GroupedSampler
from engine.measures.means import measure_means
from engine.task import Report, StepOutput, Task, log_mean
from engine.tasks.kind import ImageTrainingConfig, Kind, TaskConfig
from tests.tasks.entry import add_kind
from utils import rng
from utils.config.schema import Strict

SHAPES_HW = [(32, 32), (24, 40)]


class FlowTaskConfig(TaskConfig):
    name: Literal["flow"]
    chunk: int
    label_dropout: float


class ToyModelConfig(Strict):
    name: str
    in_channels: int
    width: int


class FlowConfig(ImageTrainingConfig):
    model: ToyModelConfig
    task: FlowTaskConfig


class FlowTask(Task):
    trained, averaged, helpers = ("velocity",), ("velocity",), ("encoder",)
    exported = ("velocity",)

    def __init__(self, setup):
        super().__init__()
        body = [nn.Conv2d(5, setup.model.width, 3, padding=1), nn.SiLU(), nn.Conv2d(setup.model.width, 4, 3, padding=1)]
        label = nn.Embedding(len(setup.facts["class_names"]) + 1, 4)  # 0: no class
        self.velocity = nn.ModuleDict({"label": label, "body": nn.Sequential(*body)})
        self.encoder = None
        self.normalise, self.channels = setup.normalise(), setup.model.in_channels

    def load_helpers(self, use):
        if use == "export":
            return
        self.encoder = nn.Conv2d(self.channels, 4, kernel_size=4, stride=4, bias=False)
        nn.init.orthogonal_(self.encoder.weight, generator=torch.Generator().manual_seed(0))

    def _losses(self, batch):
        latents = self.encoder(self.normalise(batch["images"])).float()
        times = rng.uniform(batch["key"], (1, 1, 1))
        noise = rng.normal(batch["key"], latents.shape[1:], draw=1)
        noisy = (1 - times) * latents + times * noise + self.velocity["label"](batch["labels"])[:, :, None, None]
        level = times.expand(-1, 1, *latents.shape[2:])
        pred = self.velocity["body"](torch.cat([noisy, level], dim=1)).float()
        return {"loss": (pred - noise + latents).square().mean(dim=(1, 2, 3)), "dropped": batch["labels"] == 0}

    def forward(self, batch, progress):
        loss, dropped = self._losses(batch).values()
        return StepOutput(loss, {"dropped": log_mean(dropped, batch["weight"])})

    def evaluate(self, loaders, step):
        return Report(measure_means(loaders["val"], self._losses))


class FlowKind(Kind):
    config, model, task, names = FlowTaskConfig, ToyModelConfig, FlowTask, ("class_names",)

    def find_facts(self, config, collection):
        return {"class_names": collection.class_names("train")}

    def samples(self, collection, setup):
        class_ids = collection.class_ids(setup.facts["class_names"])

        def label(example):
            dropped = example.training and torch.rand((), generator=example.generator) < setup.task.label_dropout
            return {"labels": torch.tensor(0 if dropped else int(class_ids[example.draw.index]) + 1)}

        return super().samples(collection, setup)[0], label

    def views(self, setup, augment):
        return {"images": lambda image, draw: v2.functional.resize(image, list(SHAPES_HW[draw.group]), antialias=True)}

    def sampler(self, collection, setup, config, rows):
        return GroupedSampler(rows, rows % len(SHAPES_HW), setup.task.chunk, config.seed)


main = add_kind("flow", FlowKind(), FlowConfig)

if __name__ == "__main__":
    main()
