"""A toy diffusion task, written only to prove the contracts: two image shapes in one run, a frozen network inside the
task, timesteps drawn by the workers, noise from the sample's key, loss weights.

python tests/tasks/diffusion.py data.root=COLLECTION
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from torchvision.transforms import v2

from data.build import load_collection
from data.config import AugmentConfig, DataConfig
from data.loader import EvaluationLoader, ImageReader, TrainLoader, UnreadableLog
from data.stream import GroupedSampler
from engine.config import TrainingConfig
from engine.start import build_task, run_path, run_training, start_ranks
from engine.task import Report, StepOutput, Task, log_mean
from models.normalise import Normalise
from utils import rng
from utils.config.entry_point import entry_point
from utils.config.schema import Strict
from utils.ranks import distributed

STEPS = 1000
SHAPES_HW = [(32, 32), (24, 40)]


class DiffusionTaskConfig(Strict):
    name: str
    width: int
    chunk: int
    min_snr_gamma: float


class ToyModelConfig(Strict):
    name: str
    in_channels: int


class DiffusionConfig(TrainingConfig):
    model: ToyModelConfig
    task: DiffusionTaskConfig
    data: DataConfig
    augment: AugmentConfig


class ShapeTransform:
    """Resize to the shape of the sample's group, after a random mirror."""

    def __call__(self, image, draw):
        image = v2.RandomHorizontalFlip(0.5)(image) if draw.position >= 0 else image
        return v2.functional.resize(image, list(SHAPES_HW[draw.group]), antialias=True)


def timestep_field(index, row, generator):
    return {"timesteps": torch.randint(STEPS, (), generator=generator)}


class DiffusionTask(Task):
    def __init__(self, config):
        super().__init__()
        width, channels = config.task.width, config.model.in_channels
        self.encoder = nn.Conv2d(channels, 4, kernel_size=4, stride=4).requires_grad_(False)
        self.network = nn.Sequential(
            nn.Conv2d(5, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, 4, 3, padding=1),
        )  # fmt: skip
        self.normalise = Normalise(config.augment.mean, config.augment.std, channels)
        self.gamma = config.task.min_snr_gamma
        self.register_buffer("alphas_cumprod", torch.cos(torch.linspace(0.01, 1.56, STEPS)) ** 2, persistent=False)

    def _losses(self, batch):
        with torch.no_grad():
            latents = self.encoder(self.normalise(batch["images"]))
        timesteps, device = batch["timesteps"], latents.device
        keys = batch["key"].tolist()
        noise = torch.stack(
            [torch.randn(latents.shape[1:], generator=rng.generator_for(key, device), device=device) for key in keys]
        )
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy_latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        level = (timesteps / STEPS).view(-1, 1, 1, 1).expand_as(noisy_latents[:, :1])
        pred = self.network(torch.cat([noisy_latents, level], dim=1)).float()
        snr = (alpha / (1 - alpha)).flatten()
        return (pred - noise).square().mean(dim=(1, 2, 3)) * (snr.clamp(max=self.gamma) / snr)

    def forward(self, batch, knobs):
        loss = self._losses(batch)
        wide = torch.full_like(loss, float(batch["images"].shape[-1] == SHAPES_HW[1][1]))
        return StepOutput(loss, {"wide": log_mean(wide, batch["weight"])})

    def evaluate(self, loaders, step):
        total = torch.zeros(2, dtype=torch.float64, device=self.alphas_cumprod.device)
        for batch in loaders["val"]:
            loss, valid = self._losses(batch).double(), batch["weight"] > 0
            total += torch.stack([torch.where(valid, loss, 0.0).sum(), valid.double().sum()])
        total = distributed.all_reduce_sum(total).tolist()
        return Report({"loss": total[0] / total[1], "samples": total[1]})


@entry_point("diffusion", DiffusionConfig, config_dir=Path(__file__).parent / "conf")
def main(config, job):
    runtime = start_ranks(config)
    collection = load_collection(config.data)
    rows, unreadable = collection.rows("train"), UnreadableLog(run_path(config, job) / "unreadable.jsonl")
    reader = ImageReader(
        collection, ShapeTransform(), timestep_field, channels=config.model.in_channels,
        max_pixels=config.data.max_pixels,
    )  # fmt: skip
    loader = TrainLoader(
        reader, GroupedSampler(rows, rows % len(SHAPES_HW), config.task.chunk, config.seed), seed=config.seed,
        device=runtime.device, workers=runtime.workers, prefetch_batches=config.runtime.prefetch_batches,
        unreadable=unreadable,
    )  # fmt: skip
    evaluation = EvaluationLoader(
        reader, collection.rows("val"), seed=config.seed, batch_size=config.loop.batch_size, device=runtime.device,
        workers=runtime.workers, unreadable=unreadable,
    )  # fmt: skip
    task = build_task(lambda: DiffusionTask(config), config)
    return run_training(
        task, loader, {"val": evaluation}, config, job, runtime, fingerprints={"data.root": collection.fingerprint}
    )


if __name__ == "__main__":
    main()
