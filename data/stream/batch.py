"""Batches: a dictionary of tensors, and what it always holds.

    sample_id  [B] int64     the row in the collection
    key        [B] int64     the sample's random key, from which noise is drawn on the device
    weight     [B] float32   its weight in the loss; 0 for an unreadable image (blank) and for padding

Shapes may differ from batch to batch. A field of ragged length, such as tag ids, becomes `<name>` [N] (all values,
sample after sample) and `<name>_offsets` [B + 1]; a part of a batch has all values, and its own offsets.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.contracts import Batch


@dataclass(frozen=True)
class Ragged:
    """A field whose length differs from sample to sample: values [n]."""

    values: Tensor


Sample = dict[str, Tensor | Ragged | int | float]


def collate(samples: Iterable[Sample], count: int, *, channels_last: bool = False) -> Batch:
    """Join `count` samples of one shape to a batch; numbers become int64 or float32 [B].

    Each sample is copied as it comes, while the processor's cache still holds it. channels_last: the memory format of
    images, uint8 [B, C, H, W]; it is that of a decoded image, which is then copied as it is.
    """
    batch: Batch = {}
    columns: dict[str, list[Any]] = {}
    for place, sample in enumerate(samples):
        assert place == 0 or sample.keys() == batch.keys() | columns.keys(), (sample.keys(), batch.keys())
        for name, value in sample.items():
            if isinstance(value, Tensor):
                if place == 0:
                    last = channels_last and value.dtype == torch.uint8 and value.dim() == 3
                    form = torch.channels_last if last else torch.contiguous_format
                    batch[name] = torch.empty(count, *value.shape, dtype=value.dtype, memory_format=form)
                into = batch[name][place]
                assert value.shape == into.shape, (value.shape, into.shape)
                if value.dtype == torch.uint8:
                    np.copyto(into.numpy(), value.numpy())  # images: channels to the front in half of torch's time
                else:
                    into.copy_(value)
            else:
                columns.setdefault(name, []).append(value)
    for name, column in columns.items():
        if isinstance(column[0], Ragged):
            lengths = torch.tensor([0, *(len(item.values) for item in column)])
            batch[name] = torch.cat([item.values for item in column])
            batch[f"{name}_offsets"] = lengths.cumsum(0)
        else:
            batch[name] = torch.tensor(column)
    return batch


def multi_hot(values: Tensor, offsets: Tensor, width: int) -> Tensor:
    """Return [B, width] float32 with ones where a sample's ragged ids point; on the ids' device, without a sync.

    Values outside the offsets belong to other parts of a batch that was cut; they go to the rows before and after.
    """
    rows = torch.bucketize(torch.arange(len(values), device=values.device), offsets, right=True)
    targets = torch.zeros(len(offsets) + 1, width, device=values.device)
    return targets.index_put_((rows, values), torch.ones((), device=values.device))[1:-1]


@functools.cache  # memory is kept for each stream, and every evaluation has a loader of its own
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch; from pinned memory without waiting for the copy.

    On a GPU, copies have a stream of their own and overlap with the step before. The host asks for the next batch while
    the device still computes; on the compute stream, the copy would queue behind that work.
    """
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    copies, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    current.wait_stream(copies)
    for tensor in moved.values():
        tensor.record_stream(current)  # the copies' stream may not reuse its memory before the step is done
    return moved
