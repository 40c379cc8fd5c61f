"""The range test's rate beside the best of a grid, fastai's and torch-lr-finder's, in twelve cases.

python bench/lr_finder.py fashion_mnist=FOLDER [steps=200] [quick]      (on an idle machine)

Cases: Fashion-MNIST and made images (noise of ten bands of frequencies), three networks, SGD and AdamW. For each:
train.py with every rate of the grid, and once more with a range test. From that test's losses come our rate, fastai's
`valley`, and torch-lr-finder's steepest gradient; theirs are smoothed as they do. The table has the rates, and top-1
after the last step with the rate of the grid that is nearest. A run that diverges counts as top-1 0.
fashion_mnist: a folder of class folders, from `prepare.py job=idx` (docs/collections.md).
"""

import itertools
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from bench.commands import ROOT, last_top1, log_of, read_number, read_settings, run_command
from utils.record.run_config import is_complete
from utils.text_table import align_columns

OUT = ROOT / "outputs/bench/lr_finder"
NETWORKS = {
    "resnet10t": ["model=timm", "model.name=resnet10t"],
    "convnextv2_glyph": ["model=convnextv2_glyph"],
    "regnetx_002": ["model=timm", "model.name=regnetx_002"],
}
OPTIMISERS = {  # words and the grid
    "sgd": (["optim=sgd_train"], (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    "adamw": (["optim=adamw"], (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)),
}
COMMON = [
    "data=image_folder", "model.in_channels=1", "augment.image_size_hw=[32,32]", "augment.mean=[0.5]",
    "augment.std=[0.5]", "loop.global_batch_size=64", "loop.evaluate_every_epochs=1.0e+9", "runtime.compile=false",
    "loop.checkpoint_every_steps=1000000000", "tracking.live_plots=false",
]  # fmt: skip


def make_images(folder, count, classes=10):
    """Write grey images of 32 px: noise of one band of frequencies for each class, in noise of all frequencies."""
    if (folder / "complete").exists():
        return folder
    draw, frequency = np.random.default_rng(0), np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32)))
    for number in range(count):
        kind, split = number % classes, "val" if number % (5 * classes) < classes else "train"
        band = np.abs(frequency - 0.04 * (kind + 1)) < 0.02
        texture = np.fft.ifft2(np.fft.fft2(draw.normal(size=(32, 32))) * band).real
        pixels = 128 + 40 * texture / texture.std() * draw.uniform(0.3, 1) + 30 * draw.normal(size=(32, 32))
        place = folder / split / f"class{kind}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number:05}.png")
    (folder / "complete").touch()
    return folder


def link_images(source, folder):
    """Link the first images of each class of a collection: 1,000 for training, 100 for validation."""
    for split, count in (("train", 1000), ("val", 100)):
        for place in (source / split).iterdir():
            (folder / split / place.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(place.iterdir())[:count]:
                link = folder / split / place.name / image.name
                link.unlink(missing_ok=True)
                link.symlink_to(image.resolve())
    return folder


def train(folder, words):
    """Run train.py into a folder, unless that was done; returns its top-1, 0 where the loss diverged."""
    result = folder.with_name(f"{folder.name}.top1")
    if not result.exists():
        run_command([sys.executable, "train.py", f"run_dir={folder}", *COMMON, *words], log_of(folder), may_fail=True)
        result.write_text(str(last_top1(folder) if is_complete(folder) else 0.0))
    return float(result.read_text())


def valley(rates, losses):
    """Return fastai's default suggestion: half way through the longest fall of the loss, smoothed by 0.98.

    Source: fastai.callback.schedule `valley`, and the losses that `LRFinder` gives it.
    """
    losses = exponential_means(losses, 0.98)
    cut = slice(len(losses) // 10, -5)
    rates, losses = rates[cut], losses[cut]
    length, before = [1] * len(losses), [None] * len(losses)
    for last in range(len(losses)):
        for first in range(last):
            if losses[first] > losses[last] and length[first] + 1 > length[last]:
                length[last], before[last] = length[first] + 1, first
    last = start = int(np.argmax(length))
    while before[start] is not None:
        start = before[start]
    third = (last - start) / 3
    return rates[start + int(third) + int(third / 2)]


def steepest(rates, losses):
    """Return torch-lr-finder's suggestion: the steepest gradient of the loss, smoothed by 0.05, without its ends."""
    smoothed = [losses[0]]
    for loss in losses[1:]:
        smoothed.append(0.05 * loss + 0.95 * smoothed[-1])
    cut = slice(10, -5)
    return rates[cut][int(np.argmin(np.gradient(smoothed[cut])))]


def exponential_means(losses, factor):
    """Return exponential means with bias correction."""
    mean, means = 0.0, []
    for number, loss in enumerate(losses, start=1):
        mean = factor * mean + (1 - factor) * loss
        means.append(mean / (1 - factor**number))
    return means


def measure(out, name, words, rates):
    """Return the row of a case, whose runs lie in `out`."""
    found = train(out / f"{name}_test", [*words, "lr_finder.max_share=1.0"])
    top1 = {
        rate: train(out / f"{name}_{rate:g}", [*words, "lr_finder.enabled=false", f"optim.lr={rate}"]) for rate in rates
    }
    test, best = json.loads((out / f"{name}_test/lr_finder.json").read_text()), max(top1, key=top1.get)
    suggested = {"ours": test["taken"], "fastai valley": valley(test["rates"], test["losses"]),
                 "torch-lr-finder": steepest(test["rates"], test["losses"])}  # fmt: skip
    return {"case": name, "best": best, "top1": top1, "top1_found": found, "suggested": suggested}


def table(rows):
    """Return the rows, and for each finder the share within a factor of 3 of the best rate."""
    finders = list(rows[0]["suggested"])
    lines = [("case", "best of the grid", *finders)]
    for row in rows:
        cells = [f"{row['best']:g}: {row['top1'][row['best']]:.3f}"]
        for rate in row["suggested"].values():
            near = rate and min(row["top1"], key=lambda known: abs(math.log(known / rate)))
            cells.append(f"{rate:.2g}: {row['top1'][near]:.3f}" if rate else "no answer")
        lines.append((row["case"], *cells))
    hits = [sum(is_near(row["suggested"][name], row["best"]) for row in rows) for name in finders]
    lines.append(("within a factor of 3", "", *(f"{hit} of {len(rows)}" for hit in hits)))
    return align_columns(lines)


def is_near(rate, best):
    """Return whether a rate is there, and within a factor of 3 of the best of the grid, which has steps of about 3."""
    return rate is not None and max(rate / best, best / rate) <= 3.0 + 1e-9


def main():
    given, quick = read_settings(fashion_mnist=None, steps=None)
    steps = read_number("steps", given["steps"] or ("100" if quick else "200"), int)
    out = OUT / "quick" if quick else OUT
    roots = {"made": make_images(out / "made", count=800 if quick else 4000)}
    if given["fashion_mnist"] is not None:
        roots = {"fashion": link_images(Path(given["fashion_mnist"]), out / "fashion"), **roots}
    cases = list(itertools.product(roots, NETWORKS, OPTIMISERS))[: 1 if quick else None]
    rows = []
    for data, network, optimiser in cases:
        own, rates = OPTIMISERS[optimiser]
        words = [f"data.root={roots[data]}", *NETWORKS[network], *own, f"loop.total_steps={steps}"]
        words += ["loop.global_batch_size=16"] if quick else []
        rows.append(measure(out, f"{data}_{network}_{optimiser}", words, rates[3:4] if quick else rates))
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
