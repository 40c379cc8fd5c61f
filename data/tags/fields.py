"""The tags of a sample as fields of a batch, and the targets of a batch of them."""

import numpy as np
import torch
from torch import Tensor

from data.layouts.table import TAG_LISTS
from data.stream.batch import Ragged, Sample, multi_hot
from data.stream.loader import Example, Fields
from data.tags.tag_index import TagIndex
from utils.contracts import Batch


def tag_fields(index: TagIndex) -> Fields:
    """Return a function that adds a sample's tags and its unknown ones."""

    def add(example: Example) -> Sample:
        row = example.draw.index
        outputs = zip(TAG_LISTS, (index.of_row(row), index.unknown_of(row)))
        return {name: Ragged(torch.from_numpy(ids.astype(np.int64))) for name, ids in outputs}

    return add


@torch.compiler.disable  # the number of tags changes with each batch
def read_targets(batch: Batch, width: int) -> Tensor:
    """Return the targets float32 [B, T]: 1 with the tag, 0 without, NaN if unknown."""
    targets, unknown = (multi_hot(batch[name], batch[f"{name}_offsets"], width) for name in TAG_LISTS)
    return targets.masked_fill(unknown > targets, torch.nan)
