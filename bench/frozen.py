"""Frozen features beside timm's own inference on the same files, in one run: equal network, size, batches, precision.

python bench/frozen.py [quick]
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import timm
import torch
from PIL import Image

from bench.measure import OUT, Comparison, run_bench, runtime_of
from data.open import load_collection
from engine.frozen import choose, features
from tests.support import data_config

NAME = "tf_efficientnet_lite0.in1k"


def draw_photographs(count):
    """Write JPEG files of 320 x 240 px; returns their folder."""
    root = OUT / f"photographs_{count}"
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        small = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((320, 240), Image.BICUBIC).save(root / f"{number}.jpg")
    return root


def compare_features(count, precision):
    """Return the comparison from files to features [N, C]. Ours also keeps them."""
    root = draw_photographs(count)
    runtime = runtime_of(precision)
    config = data_config(root=str(root))
    collection = load_collection(config)
    rows = np.flatnonzero(collection.weights())
    choose.load_timm = timm.create_model  # random weights take the same time
    features.FOLDER = OUT / "features"
    frozen = choose.open_timm(NAME, runtime)
    version = itertools.count()

    def ours():
        fresh = frozen._replace(version=str(next(version)))  # so that nothing is known
        features.read_features(fresh, collection, config, rows, runtime)

    side = frozen.predictor.preprocessing["image_size_hw"][0]
    network = timm.create_model(NAME, num_classes=0).eval().to(runtime.device)
    if runtime.channels_last:
        network = network.to(memory_format=torch.channels_last)
    settings = timm.data.resolve_model_data_config(network) | {"input_size": (3, side, side)}
    images = timm.data.ImageDataset(str(root), transform=timm.data.create_transform(**settings))
    loader = torch.utils.data.DataLoader(images, batch_size=features._BATCH, num_workers=runtime.workers)

    @torch.inference_mode()
    def theirs():
        found = []
        for batch, _ in loader:
            with runtime.autocast():
                found.append(network(batch.to(runtime.device)).float().cpu())
        return torch.cat(found)

    return Comparison({"Atelier": ours, "timm": theirs}, steps=count)


def settings(device, quick):
    """Yield the settings."""
    count = 32 if quick else 640
    yield f"features of {count} photographs, fp32", lambda: compare_features(count, "fp32")
    yield f"features of {count} photographs, bf16", lambda: compare_features(count, "bf16")


if __name__ == "__main__":
    run_bench(settings)
