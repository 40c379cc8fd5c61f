"""FCMAE learns one batch. The helpers serve the tests of other tasks too."""

from types import SimpleNamespace

import pytest
import torch

from bench.measure import build_bench_run, read_group
from engine.tasks.classification import ClassificationTask
from engine.tasks.config import ClassificationTaskConfig, FCMAETaskConfig
from engine.tasks.fcmae import FCMAETask, patch_count
from engine.tasks.kind import Setup
from engine.update.runtime import Runtime
from models.config import ConvNeXtV2Config
from models.fcmae import draw_mask
from optim.schedules import GroupValues
from tests.support import refuses

MODEL = ConvNeXtV2Config(
    family="convnextv2", name="tiny", in_channels=3, depths=[1, 1], dims=[16, 32], stem_stride=2, drop_path_rate=0.0,
    head_init_scale=1.0,
)  # fmt: skip
FCMAE = read_group(FCMAETaskConfig, "task", "fcmae", decoder_dim=32)
CLASSIFY = read_group(ClassificationTaskConfig, "task", "classification", label_smoothing=0.0)
PREPROCESSING = {"image_size_hw": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def runtime():
    return Runtime(torch.device("cpu"), precision="fp32", channels_last=False, workers=0, prefetch_batches=1)


def make_batch(size=8, seed=0):
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return {"sample_id": torch.arange(size), "key": torch.arange(size), "weight": torch.ones(size), "images": images}


def make_classifier(classes=4):
    torch.manual_seed(0)
    facts = {"class_names": [f"c{number}" for number in range(classes)]}
    return ClassificationTask(Setup(MODEL, CLASSIFY, PREPROCESSING, facts))


def learn(task, batch, runtime, steps=60, lr=3e-3):
    """Train on one batch; return the first and the last loss."""
    machine = {"device": "cpu", "precision": runtime.precision}
    learner = build_bench_run(task, batch_size=len(batch["weight"]), runtime=machine).learner
    learner.schedule = SimpleNamespace(at=lambda step: GroupValues(lr, 0.01), progress_at=lambda step: 0.0)
    losses = []
    for _ in range(steps):
        total, count = learner.update([batch]).sums["loss"]
        losses.append(float(total / count))
    return losses[0], losses[-1]


def test_fcmae_learns_one_batch(runtime):
    """Noise cannot be guessed, so the images are stripes that continue into the masked patches."""
    with refuses(r"^task\.mask_ratio: .*leaves 0 visible"):
        patch_count(MODEL, FCMAE.model_copy(update={"mask_ratio": 0.999}), [32, 32])
    patches = patch_count(MODEL, FCMAE, [32, 32])
    batch = make_batch()
    batch["images"] = (torch.arange(32) // 3 % 2 * 255).to(torch.uint8).expand(8, 3, 32, 32).clone()
    batch["mask"] = torch.stack([draw_mask(torch.Generator().manual_seed(key), patches, 0.6) for key in range(8)])
    torch.manual_seed(0)
    first, last = learn(FCMAETask(Setup(MODEL, FCMAE, PREPROCESSING)), batch, runtime)
    assert first > 0.5 and last < first / 10
