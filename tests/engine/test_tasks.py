"""FCMAE learns one batch."""

from types import SimpleNamespace

import torch

from engine.runtime import Runtime
from engine.step import Buffers, LossScale, train_step
from engine.tasks.fcmae import FCMAETask, FCMAETaskConfig, ProbeConfig, patch_count
from engine.tasks.kind import Setup
from models.config import ConvNeXtV2Config
from models.fcmae import draw_mask
from utils.rng import generator_for

MODEL = ConvNeXtV2Config(
    family="convnextv2", name="tiny", in_channels=3, depths=[1, 1], dims=[16, 32], stem_stride=2, drop_path_rate=0.0,
    head_init_scale=1.0,
)  # fmt: skip
FCMAE = FCMAETaskConfig(
    name="fcmae", mask_ratio=0.6, patch_px=None, decoder_dim=32, decoder_depth=1, norm_pix_loss=True,
    execution="sparse", probe=ProbeConfig(every_epochs=None, train_images=10, val_images=10, k=3),
)  # fmt: skip


def test_fcmae_learns_one_batch():
    """Noise cannot be guessed, so the images are stripes that continue into the masked patches."""
    patches = patch_count(MODEL, FCMAE, [32, 32])
    batch = {
        "weight": torch.ones(8),
        "images": (torch.arange(32) // 3 % 2 * 255).to(torch.uint8).expand(8, 3, 32, 32).clone(),
        "mask": torch.stack([draw_mask(generator_for(key), patches, 0.6) for key in range(8)]),
    }
    torch.manual_seed(0)
    task = FCMAETask(Setup(MODEL, FCMAE, {"image_size_hw": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}))
    runtime = Runtime(torch.device("cpu"), "fp32", channels_last=False, workers=0, prefetch_batches=1)
    learner = SimpleNamespace(
        model=task, task=task, optimizer=torch.optim.AdamW(task.parameters(), lr=3e-3, fused=True),
        buffers=Buffers(task), scale=LossScale(runtime), runtime=runtime, seed=0, clip_grad_norm=None,
    )  # fmt: skip
    losses = []
    for learner.step in range(60):
        total, count = train_step(learner, [batch], 0.0).sums["loss"]
        losses.append(float(total / count))
    assert losses[0] > 0.5 and losses[-1] < losses[0] / 10
