"""Types that several rooms share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Machine:
    """The machine, as a loader needs to know it; engine/update/runtime.py adds the precision."""

    device: torch.device  # the target of batches
    channels_last: bool  # the memory format of images
    workers: int  # loader processes of this rank
    prefetch_batches: int  # batches that each worker loads ahead


class TrainChoice(Protocol):
    """Which training images a run reads (`loop`); None: all."""

    find: str | None
    per_class: int | float | None
    count: int | None


class TrainStream(Protocol):
    """The endless training stream (data/stream/loader.py)."""

    epoch_length: int  # positions
    chunk: int | None  # neighbouring positions with images of one shape; None: all images have the same shape
    unreadable_count: int  # unreadable images so far, on this rank

    def trial_batches(self, size: int) -> Iterator[Batch]:
        """Yield a batch of one repeated sample for each shape, on the device; does not advance the stream."""

    def show(self, batch_size: int, micro_batch_size: int, ranks: int) -> Iterator[Batch]:
        """Yield the micro-batches of the first rank of a run, read in this process."""

    def steps(self, start_step: int, batch_size: int, micro_batch_size: int) -> Iterator[list[Batch]]:
        """Yield the list of this rank's micro-batches for each step, from `start_step` on.

        batch_size: samples per update, over all ranks. micro_batch_size: samples per forward pass.
        """

    def readings(self) -> Mapping[str, float]:
        """Return the counters of the data's caches, on this rank."""

    def path_of(self, sample_id: int) -> str:
        """Return a sample's path, for messages."""
