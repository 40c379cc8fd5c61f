"""What is trained, before step 1: the first samples of a run as they enter the network."""

import numpy as np
import torch

from engine.config import TrainingConfig
from engine.plan import Plan
from engine.task import Streams, Task
from utils import rng
from utils.record.pictures import WRONG, Line, image_grid, legible, shorten, wrap
from utils.record.plots import INK

_SAMPLES, _LINES = 24, 9  # lines of a text


def draw_seen(task: Task, streams: Streams, plan: Plan, config: TrainingConfig) -> np.ndarray:
    """Draw the first positions of the first rank: cropped, augmented, mixed, masked, with their texts."""
    train, micro = [*streams.earlier, streams.train][0], plan.micro_batch_size
    if plan.phases:
        micro = plan.phases[0][1]
        for module in task.modules():
            if hasattr(module, "enter_phase"):
                module.enter_phase(config.by_phase()[0].task)
    images: list[np.ndarray] = []
    captions: list[list[Line]] = []
    for number, batch in enumerate(train.show(plan.global_batch_size, micro, plan.world_size)):
        step, part = divmod(number, plan.global_batch_size // plan.world_size // micro)
        rng.seed_micro_step(config.seed, step, part, 0, torch.device("cpu"))
        seen, texts = task.show_inputs(batch)
        seen = seen.float().round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for image, text, sample, weight in zip(seen, texts, batch["sample_id"].tolist(), batch["weight"].tolist()):
            size = f"{image.shape[0]} x {image.shape[1]} px"
            lines = [(legible(shorten(f"{len(images)}: {train.path_of(sample)}", 28)), INK)]
            lines += [(size, INK) if weight == 1 else (f"{size}, weight {weight:.3g}", WRONG)]
            wrapped = [line for paragraph in text.split("\n") for line in wrap(paragraph, _LINES)]
            images, captions = [*images, image], [*captions, [*lines, *((line, INK) for line in wrapped)]]
        if len(images) >= _SAMPLES:
            break
    title = f"The first samples of a run; seed {config.seed}; weight 0: unreadable"
    return image_grid(images[:_SAMPLES], captions[:_SAMPLES], title, columns=6, tile_px=226)
