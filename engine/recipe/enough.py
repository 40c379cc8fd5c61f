"""The question whether there are enough validation images for a figure."""

import time

import numpy as np
import torch

from data.collection.choose import spread
from data.collection.collection import Collection
from data.validity.finding import Finding
from engine.config import TrainingConfig
from engine.frozen.choose import open_frozen_timm
from engine.frozen.features import PIXELS, read_features
from engine.update.runtime import Runtime
from models.weights.timm_hub import cached_names
from optim.linear import count_right
from utils.record.figures import show_figure

_ENOUGH = 100  # groups of validation: the interval of an accuracy is at most 0.2 wide
_MOST = 1000  # groups
_SEC = 5.0


def judge_few(config: TrainingConfig, collection: Collection, runtime: Runtime) -> Finding | None:
    """If few images or groups are for validation, judge frozen features of all: one image a group, without the image.

    The penalty and the accuracy of leaving each image out are those of `count_right`.
    """
    ids = collection.class_ids(collection.class_names("train"))
    ids[collection.rows("test")] = -1
    rows = np.flatnonzero(ids >= 0)
    val = collection.rows("val")
    leads = collection.leads(rows)
    groups = np.unique(leads[rows])
    if config.task.name != "classification" or len(np.unique(leads[val])) >= _ENOUGH or len(groups) < 2:
        return None
    frozen = next((open_frozen_timm(name, runtime) for name in cached_names()), PIXELS)
    deadline = time.monotonic() + _SEC
    features, read = read_features(frozen, collection, config.data, spread(groups, _MOST), runtime, deadline)
    right = count_right(features, torch.from_numpy(ids[read])) / len(read)
    line = (
        f"{len(val):,} validation images are few. Features of {frozen.says} and a regression recognise "
        f"{show_figure('top1', {'top1': right, 'samples': len(read)})} of {len(read):,} images that it has not seen; "
        "evaluate.py folds=5 measures the training so"
    )
    return Finding(0.3, "folds", line, "few validation images")
