"""Ridge and logistic regression on frozen features: what a person does with timm and scikit-learn.

    python bench/regressions.py FOLDER NETWORK SIZE_PX

FOLDER: {train,val}/CLASS/*, as bench/minutes.py has it. Images are resized to a square. Features are not standardised,
which lost on three of four collections. Penalties are chosen by cross validation of the training images. Prints a line
of JSON for each regression: `top1` on val, `cross_validated` (top-1 of left-out training images), and `train_sec`, the
CPU seconds of the training images' features and of its fit.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegressionCV, RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold

BATCH = 32
FOLDS = StratifiedKFold(3, shuffle=True, random_state=0)
RIDGES = [10.0**power for power in range(-1, 5)]
INVERSE_PENALTIES = [1e-3, 1e-2, 1e-1, 1.0]


def read_image(path, size_px):
    """Return an image as a tensor of values from -1 to 1, as the network was trained."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((size_px, size_px), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1) / 127.5 - 1


def compute_features(network, files, size_px):
    """Return features [N, C]."""
    parts = []
    for start in range(0, len(files), BATCH):
        images = torch.stack([read_image(path, size_px) for path in files[start : start + BATCH]])
        parts.append(network(images.contiguous(memory_format=torch.channels_last)))
    return torch.cat(parts).numpy()


@torch.inference_mode()
def main(folder, name, size_px):
    network = timm.create_model(name, pretrained=True, num_classes=0).eval().to(memory_format=torch.channels_last)
    started = time.process_time()
    files = sorted(Path(folder, "train").glob("*/*"))
    features = compute_features(network, files, size_px)
    features_sec = time.process_time() - started
    labels = [path.parent.name for path in files]
    judged = sorted(Path(folder, "val").glob("*/*"))
    judged_features = compute_features(network, judged, size_px)
    logistic = LogisticRegressionCV(Cs=INVERSE_PENALTIES, cv=FOLDS, max_iter=300, use_legacy_attributes=False)
    for arm, regression in {"ridge": RidgeClassifierCV(RIDGES, cv=FOLDS), "logistic": logistic}.items():
        started = time.process_time()
        regression.fit(features, labels)
        train_sec = features_sec + time.process_time() - started
        best = regression.best_score_ if arm == "ridge" else regression.scores_.mean(axis=0).max()
        top1 = regression.score(judged_features, [path.parent.name for path in judged])
        row = {"arm": arm, "top1": top1, "cross_validated": float(best), "train_sec": round(train_sec, 1)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
