"""The rival of the tagger: a plain loop of timm, binary cross-entropy and torchmetrics, as people write it.

python bench/timm_tagger.py vocabulary=FILE out=FILE.json [data=FOLDER] [network=resnet18] [seconds=60] [lr=0.002]
                            [size=32] [threads=1]

Seconds of a single thread are CPU seconds: other work on the machine takes none of them.
It reads the same images and tags as train.py task=tagging, at the same size, with the same random crops and turns, in
batches of 128, by torch's DataLoader, AdamW and one cycle. The last figures are mAP by torchmetrics (exact), and macro
F1 where precision equals recall, by the counting that train.py uses, so that both sides are measured alike.
"""

import fnmatch
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MultilabelAveragePrecision
from torchvision.transforms import v2

from bench.commands import fail, read_number, read_settings
from data.tags.names import parse_tag
from engine.measures.tag_scores import TagScores
from engine.measures.tags import TagHistograms
from utils.vocabulary import read_vocabulary

BATCH = 128
TURN = v2.RandomAffine(8, (0.08, 0.08), (0.8, 1.1), (-10, 10), interpolation=v2.InterpolationMode.BILINEAR, fill=255)
FLOAT = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]


def pad(image):
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class Tagged(Dataset):
    """The images of a split that have a tag of the vocabulary, and their multi-hot targets."""

    def __init__(self, root, split, vocabulary, steps, paths="*"):
        table = pq.read_table(root / "manifest.parquet", columns=["path", "tags", "split"]).to_pylist()
        table = [row for row in table if fnmatch.fnmatch(row["path"], paths)]
        columns = {name: index for index, name in enumerate(vocabulary.names)}
        rows = [(row["path"], [columns[name] for tag in row["tags"] if (name := parse_tag(tag).name) in columns])
                for row in table if row["split"] == split]  # fmt: skip
        self.rows = [row for row in rows if row[1]]
        self.root, self.width, self.transform = root, len(vocabulary), v2.Compose([*steps, *FLOAT])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        path, tags = self.rows[index]
        targets = torch.zeros(self.width)
        targets[tags] = 1
        with Image.open(self.root / path) as image:
            return self.transform(pad(image.convert("RGB"))), targets


def train(network, loader, seconds, lr, precision):
    """Train for some seconds; returns (steps, seconds). The cycle's length is estimated from the first steps."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    started, step, schedule, images = clock(), 0, None, iter(loader)
    while clock() - started < seconds:
        try:
            batch, targets = next(images)
        except StopIteration:
            images = iter(loader)
            continue
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = network(batch)
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step == 10:
            left = int((seconds - (clock() - started)) / (clock() - started) * 10)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(left, 1) + 50, pct_start=0.1)
        elif schedule is not None and schedule.last_epoch < schedule.total_steps - 1:
            schedule.step()
    return step, clock() - started


@torch.inference_mode()
def evaluate(network, loader, vocabulary):
    """Return mAP by torchmetrics, macro F1 by our counts, the same of the tags' frequencies, and seconds."""
    started = time.perf_counter()
    network.eval()
    logits, targets = map(torch.cat, zip(*[(network(batch).float(), targets) for batch, targets in loader]))
    exact = MultilabelAveragePrecision(len(vocabulary), average="none")(logits, targets.int())
    found = {"mAP": float(exact[targets.sum(0) > 0].mean()), "evaluation_seconds": time.perf_counter() - started}
    prior = torch.tensor(np.maximum(vocabulary.counts, 1) / max(vocabulary.counts)).logit(eps=1e-4).float()
    for name, scores in (("", logits), ("frequency_", prior.expand(len(targets), -1))):
        counts = TagHistograms(len(vocabulary))
        for start in range(0, len(targets), 512):
            own = slice(start, start + 512)
            counts.add(scores[own], targets[own], torch.ones(len(targets[own]), dtype=torch.bool))
        figures = TagScores(counts.reduce(), vocabulary).scalars()
        found |= {f"{name}macro_f1": figures["macro_f1"]} | ({"frequency_mAP": figures["mAP"]} if name else {})
    return found


def main():
    given, _ = read_settings(
        vocabulary="", out="", data="collections/glyphs", network="resnet18", seconds="60", lr="0.002", threads="0",
        precision="bf16", paths="*", size="32",
    )  # fmt: skip
    if not given["vocabulary"] or not given["out"]:
        fail("vocabulary and out must be given")
    torch.manual_seed(0)
    if given["threads"] != "0":
        torch.set_num_threads(int(given["threads"]))
    vocabulary = read_vocabulary(Path(given["vocabulary"]), "vocabulary")
    root = Path(given["data"])
    size, bicubic = read_number("size", given["size"], int), v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(size, (0.87, 1.0), (1.0, 1.0), bicubic)
    train_set = Tagged(root, "train", vocabulary, [TURN, crop], given["paths"])
    val_set = Tagged(root, "val", vocabulary, [v2.Resize((size, size), bicubic)])
    network = timm.create_model(given["network"], num_classes=len(vocabulary))
    loader = DataLoader(train_set, BATCH, shuffle=True, drop_last=True)
    precision = torch.bfloat16 if given["precision"] == "bf16" else torch.float32
    seconds = read_number("seconds", given["seconds"], float)
    steps, spent = train(network, loader, seconds, read_number("lr", given["lr"], float), precision)
    figures = evaluate(network, DataLoader(val_set, 256), vocabulary)
    figures |= {"steps": steps, "seconds": spent, "images_per_sec": steps * BATCH / spent}
    figures["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    Path(given["out"]).write_text(json.dumps(figures, indent=2) + "\n")
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
