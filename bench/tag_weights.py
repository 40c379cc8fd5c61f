"""Compare task.tag_weights with equal weights: the words of the glyphs' names, a small ResNet, equal updates.

python bench/tag_weights.py steps=600 seeds=3

Prints mAP of all tags, and of the rarest, the middle and the most frequent third, for a typeface never seen.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.measure import read_group
from data.config import DataConfig
from data.load import load_collection
from data.tags.rules import read_rules
from data.tags.tag_index import index_tags
from engine.tasks.config import TaggingTaskConfig
from engine.tasks.kind import Setup
from engine.tasks.tagging import TaggingKind, choose_vocabulary
from models.config import timm_config

SIDE = 16
BATCH = 128
ARMS = {"equal": None, "power 0.5": 0.5, "power 1": 1.0, "power 2": 2.0}


def read_all(root: Path):
    """Return vocabulary, shares, and images with targets of both splits."""
    collection = load_collection(read_group(DataConfig, "data", "glyphs", root=str(root)))
    config = read_group(TaggingTaskConfig, "task", "tagging")
    vocabulary = choose_vocabulary(config, collection)
    index = index_tags(collection, vocabulary, read_rules(config, "task."), Path("outputs/cache/tags"))
    parts = []
    for split in ("train", "val"):
        rows = collection.rows(split)
        rows = rows[index.tagged[rows]]
        images = np.empty((len(rows), 1, SIDE, SIDE), np.uint8)
        targets = np.zeros((len(rows), len(vocabulary)), bool)
        for number, row in enumerate(rows.tolist()):
            with Image.open(collection.absolute_path(row)) as image:
                images[number, 0] = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            targets[number, index.of_row(row)] = True
        parts.append((torch.from_numpy(images), torch.from_numpy(targets)))
    return vocabulary, index.shares(collection.rows("train"), len(vocabulary)), *parts


def train(vocabulary, shares, images, targets, power, steps, seed):
    """Return a trained task."""
    rule = None if power is None else {"power": power, "window_steps": 100}
    config = read_group(TaggingTaskConfig, "task", "tagging", tag_weights=rule)
    model = timm_config("resnet18", [16, 32, 64, 128]).model_copy(update={"in_channels": 1})
    preprocessing = {"image_size_hw": [SIDE, SIDE], "mean": [0.5], "std": [0.5]}
    torch.manual_seed(seed)
    task = TaggingKind().build(Setup(model, config, preprocessing, {**vocabulary.facts(), "tag_priors": shares}))
    optimizer = torch.optim.AdamW(task.network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, steps)
    order = torch.cat([torch.randperm(len(images)) for _ in range(-(-steps * BATCH // len(images)))])
    task.train()
    for step in range(steps):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        batch = images[chosen], targets[chosen].float()
        task.views = lambda _, batch=batch: (task.normalise(batch[0]), batch[1])
        task({"weight": torch.ones(BATCH)}, torch.tensor(0.0)).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        task.after_step(step, torch.tensor(0.0), torch.tensor(1.0))
    return task.eval()


@torch.no_grad()
def measure(task, images, targets, shares):
    """Return mAP of all tags and of the thirds by frequency, and the cross-entropy."""
    logits = torch.cat([task.network(task.normalise(part)) for part in images.split(512)])
    scores = logits.numpy()
    found = np.full(targets.shape[1], np.nan)
    for tag in np.flatnonzero(targets.any(0).numpy()):
        ranked = targets[np.argsort(-scores[:, tag], kind="stable"), tag].numpy()
        found[tag] = (np.cumsum(ranked) / np.arange(1, len(ranked) + 1))[ranked].mean()
    thirds = np.array_split(np.argsort(shares, kind="stable"), 3)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.float()) * targets.shape[1]
    return [np.nanmean(found), *(np.nanmean(found[third]) for third in thirds), float(loss)]


def main() -> None:
    """Print a row for each arm."""
    words = {
        "steps": "600",
        "seeds": "3",
        "root": "outputs/collections/glyphs",
        **dict(word.split("=") for word in sys.argv[1:]),
    }
    vocabulary, shares, train_part, val_part = read_all(Path(words["root"]))
    print(len(vocabulary), "tags;", len(train_part[0]), "and", len(val_part[0]), "images", flush=True)
    for seed in range(int(words["seeds"])):
        for name, power in ARMS.items():
            task = train(vocabulary, shares, *train_part, power, int(words["steps"]), seed)
            figures = measure(task, *val_part, shares)
            print(f"seed {seed}  {name:10}  " + "  ".join(f"{figure:.4f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
