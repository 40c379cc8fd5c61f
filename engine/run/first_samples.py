"""Draw the first samples of a run as the network will see them (`dry_run=true`)."""

import numpy as np
import torch

from engine.config import TrainingConfig
from engine.plan import Plan
from engine.task import Streams, Task
from utils import rng
from utils.record.figures import INK
from utils.record.pictures import image_grid, wrap

_SAMPLES = 24
_MOST_LINES = 12  # of a text


def draw_first_samples(task: Task, streams: Streams, plan: Plan, config: TrainingConfig) -> np.ndarray:
    """Draw the first samples of the first rank: cropped, augmented, mixed, masked, with their texts."""
    train = streams.in_order[0]
    micro = plan.micro_batch_size
    tiles = []
    for number, batch in enumerate(train.show(plan.batch_size, micro, plan.world_size)):
        step, part = divmod(number, plan.batch_size // plan.world_size // micro)
        rng.seed_micro_step(config.seed, step, part, 0, torch.device("cpu"))
        images, texts = task.show_inputs(batch)
        images = images.float().round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for image, text, sample, weight in zip(images, texts, batch["sample_id"].tolist(), batch["weight"].tolist()):
            size = f"{image.shape[0]} x {image.shape[1]} px" + ("" if weight == 1 else f", weight {weight:.3g}")
            parts = [*wrap(f"{len(tiles)}: {train.path_of(sample)}", 2), size, *text.split("\n")]
            tiles.append((image, [(line, INK) for part in parts for line in wrap(part, _MOST_LINES)]))
        if len(tiles) >= _SAMPLES:
            break
    images, captions = zip(*tiles[:_SAMPLES])
    title = f"The first samples of a run; seed {config.seed}; weight 0: unreadable"
    return image_grid(images, captions, title, columns=6, tile_px=258)
