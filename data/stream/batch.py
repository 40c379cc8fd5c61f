"""Batches: dictionaries of tensors. Every batch has:

    sample_id  [B] int64     the row in the collection
    key        [B] int64     the random key of the sample, the seed of noise on the device
    weight     [B] float32   its weight in the loss; 0 for unreadable images (blank) and for padding

Shapes may differ from batch to batch. A ragged field, such as tag ids, becomes `<name>` [N] (all values, sample after
sample, then zeros up to a power of two, so that few shapes occur) and `<name>_offsets` [B + 1]; a slice of a batch
keeps all values and has its own offsets.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.contracts import Batch


@dataclass(frozen=True)
class Ragged:
    """A field whose length varies between samples: values [n]."""

    values: Tensor


Sample = dict[str, Tensor | Ragged | int | float]
_ALIGNED_BYTES = 64  # where a tensor of a packed batch begins


def collate(samples: Iterable[Sample], count: int, *, channels_last: bool = False) -> Batch:
    """Collate `count` samples of equal shapes into a batch; numbers become int64 or float32 [B].

    Each sample is copied when it arrives, while it is in the CPU cache. channels_last: memory format of images, uint8
    [B, C, H, W]; decoded images already have it, so they are copied without a permutation.
    """
    batch: Batch = {}
    columns: dict[str, list[Any]] = {}
    for index, sample in enumerate(samples):
        assert index == 0 or sample.keys() == batch.keys() | columns.keys(), (sample.keys(), batch.keys())
        for name, value in sample.items():
            if isinstance(value, Tensor):
                if index == 0:
                    last = channels_last and value.dtype == torch.uint8 and value.dim() == 3
                    memory_format = torch.channels_last if last else torch.contiguous_format
                    batch[name] = torch.empty(count, *value.shape, dtype=value.dtype, memory_format=memory_format)
                into = batch[name][index]
                assert value.shape == into.shape, (value.shape, into.shape)
                if value.dtype == torch.uint8:
                    np.copyto(into.numpy(), value.numpy())  # images: permutes channels in half the time of torch
                else:
                    into.copy_(value)
            else:
                columns.setdefault(name, []).append(value)
    for name, column in columns.items():
        if isinstance(column[0], Ragged):
            lengths = [0, *(len(item.values) for item in column)]
            values = [item.values for item in column]
            room = 1 << sum(lengths).bit_length()
            batch[name] = torch.cat([*values, values[0].new_zeros(room - sum(lengths))])
            batch[f"{name}_offsets"] = torch.tensor(lengths).cumsum(0)
        else:
            batch[name] = torch.tensor(column)
    return batch


@dataclass
class Packed:
    """A batch as one tensor of bytes in shared memory: one file, one copy to a GPU. The DataLoader pins it.

    layout: name, dtype, shape, strides and first byte of each tensor.
    """

    data: Tensor
    layout: list[tuple[str, torch.dtype, torch.Size, tuple[int, ...], int]]

    def pin_memory(self) -> "Packed":
        """Return the batch in pinned memory."""
        return Packed(self.data.pin_memory(), self.layout)

    def unpack(self) -> Batch:
        """Return the batch, without a copy."""
        return {
            name: self.data[start : start + math.prod(shape) * dtype.itemsize].view(dtype).as_strided(shape, strides)
            for name, dtype, shape, strides, start in self.layout
        }


def pack(batch: Batch) -> Packed:
    """Return a copy of a batch in shared memory. Raises RuntimeError if there is no room."""
    parts = []
    layout = []
    start = 0
    for name, tensor in batch.items():
        content = tensor.as_strided([tensor.numel()], [1]).view(torch.uint8)  # in the order of its memory
        layout.append((name, tensor.dtype, tensor.shape, tensor.stride(), start))
        parts += [content, content.new_zeros(-len(content) % _ALIGNED_BYTES)]
        start += len(content) + len(parts[-1])
    return Packed(torch.cat(parts).share_memory_(), layout)


def multi_hot(values: Tensor, offsets: Tensor, width: int) -> Tensor:
    """Return [B, width] float32 with ones at the ragged ids of each sample, without a host synchronisation.

    Values outside the offsets belong to other slices of the batch; they go to extra rows, which are removed.
    """
    rows = torch.bucketize(torch.arange(len(values), device=values.device), offsets, right=True)
    targets = torch.zeros(len(offsets) + 1, width, device=values.device)
    return targets.index_put_((rows, values), torch.ones((), device=values.device))[1:-1]


@functools.cache  # torch caches memory per stream, and every evaluation has its own loader
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def to_device(batch: Batch | Packed, device: torch.device) -> Batch:
    """Move a batch to the device; from pinned memory, without waiting for the copy.

    On a GPU, copies run on their own stream and overlap with the previous step. On the compute stream, the copy would
    wait for that step.
    """
    if isinstance(batch, Packed):
        return Packed(to_device({"data": batch.data}, device)["data"], batch.layout).unpack()
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    copies = _copy_stream(device)
    current = torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    current.wait_stream(copies)
    for tensor in moved.values():
        tensor.record_stream(current)  # so its memory is not reused before the step is done
    return moved
