"""Rectified flow with class labels, written as a stranger would: one file, one YAML, one entry in the table.

Two image shapes in one run; a frozen encoder that is not checkpointed; noise and times drawn on the device from each
sample's key; labels dropped in training only; an average kept on the CPU. Source: Liu et al. 2022 (arXiv 2209.03003).

    python tests/tasks/flow.py data.root=COLLECTION
"""

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from torchvision.transforms import v2

import finetune
from data.stream import GroupedSampler
from engine.measures.means import Means
from engine.streams import Streams
from engine.task import Exported, Report, Roles, StepOutput, Task, log_mean
from engine.tasks.kind import ImageTrainingConfig, Kind
from engine.tasks.kinds import KINDS
from models.normalise import Normalise
from utils import rng
from utils.config.entry_point import entry_point
from utils.config.schema import Strict

SHAPES_HW = [(32, 32), (24, 40)]


class FlowTaskConfig(Strict):
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


class ShapeTransform:
    """Mirror at random in training, and resize to the shape of the sample's group."""

    def __call__(self, image, draw):
        image = v2.RandomHorizontalFlip(0.5)(image) if draw.position >= 0 else image
        return v2.functional.resize(image, list(SHAPES_HW[draw.group]), antialias=True)


class FlowFields:
    """Add the class, counted from 1; 0 is no class, which training draws now and then."""

    def __init__(self, class_ids, dropout):
        self.class_ids, self.dropout = class_ids, dropout

    def __call__(self, example):
        dropped = example.training and torch.rand((), generator=example.generator) < self.dropout
        return {"labels": torch.tensor(0 if dropped else int(self.class_ids[example.index]) + 1)}


class FlowTask(Task):
    roles = Roles(trained=("velocity",), averaged={"velocity": "cpu"}, frozen=("encoder",))

    def __init__(self, setup):
        super().__init__()
        channels, width = setup.model.in_channels, setup.model.width
        self.encoder = nn.Conv2d(channels, 4, kernel_size=4, stride=4)
        nn.init.orthogonal_(self.encoder.weight, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.encoder.bias)
        self.velocity = nn.ModuleDict({
            "label": nn.Embedding(len(setup.facts["class_names"]) + 1, 4),
            "body": nn.Sequential(nn.Conv2d(5, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1)),
        })  # fmt: skip
        self.normalise = Normalise(setup.preprocessing["mean"], setup.preprocessing["std"], channels)
        self._metadata = setup.metadata()

    def initialise(self, source):
        assert source is None

    def exported(self):
        return Exported(("velocity",), self._metadata)

    def _losses(self, batch):
        with torch.no_grad():
            latents = self.encoder(self.normalise(batch["images"])).float()
        times = rng.uniform(batch["key"], (1, 1, 1))
        noise = rng.normal(batch["key"], latents.shape[1:], draw=1)
        noisy_latents = (1 - times) * latents + times * noise
        inputs = noisy_latents + self.velocity["label"](batch["labels"])[:, :, None, None]
        level = times.expand(-1, 1, *latents.shape[2:])
        pred = self.velocity["body"](torch.cat([inputs, level], dim=1)).float()
        return (pred - (noise - latents)).square().mean(dim=(1, 2, 3))

    def forward(self, batch, knobs):
        dropped = (batch["labels"] == 0).float()
        return StepOutput(self._losses(batch), {"dropped": log_mean(dropped, batch["weight"])})

    def evaluate(self, loaders, step):
        means = Means()
        for batch in loaders["val"]:
            dropped = (batch["labels"] == 0).float()
            means.add({"loss": self._losses(batch), "dropped": dropped}, batch["weight"] > 0)
        return Report(means.reduce())


class FlowKind(Kind):
    config = FlowTaskConfig
    model_schema = ToyModelConfig
    fact_names = ("class_names",)

    def find_facts(self, config, collection):
        return {"class_names": collection.class_names("train")}

    def build(self, setup):
        return FlowTask(setup)

    def fields(self, collection, setup):
        return FlowFields(collection.class_ids(setup.facts["class_names"]), setup.task.label_dropout)

    def views(self, setup, augment):
        return {"images": ShapeTransform()}

    def streams(self, data, setup, config):
        rows, fields = data.collection.rows("train"), self.fields(data.collection, setup)
        sampler = GroupedSampler(rows, rows % len(SHAPES_HW), setup.task.chunk, config.seed)
        train = data.train(rows, fields, self.views(setup, config.augment), sampler=sampler)
        return Streams(train, self.evaluation(data, setup, training=True), data.fingerprints)


KINDS["flow"] = FlowKind()
main = entry_point("flow", FlowConfig, config_dir=Path(__file__).parent / "conf")(finetune.main.main)

if __name__ == "__main__":
    main()
